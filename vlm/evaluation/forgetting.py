"""Forgetting: the change of the LLM's loss on text-only conversations by training.

The conversations are fixed, half English, half Japanese.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F

from vlm.data.collate import collate, make_row
from vlm.data.sources.instruct import Instruct
from vlm.evaluation.base import Context, Evaluator
from vlm.models.base import AnswersText
from vlm.ranges import Number, Range
from vlm.schema import Batch, VisualSpec
from vlm.text.encode import TextEncoder

TEXTS = Path(__file__).with_name("texts.jsonl")  # general knowledge and instructions, written for this project
BATCH_SIZE = 8  # its logits need no more memory than those of a small training batch


class Forgetting(Evaluator):
    """`text/loss`, `text/loss_base` and their difference `text/forgetting` at every validation, in nats per token.

    The LLM reads the texts without images and connector. `text/loss_base` is the loss of the LLM at the start of the
    stage without its adapter, measured once before the first step. With a frozen LLM nothing is measured.

    Args:
        max: the run stops, with its artifact saved, if the forgetting is above it; None never stops.
    """

    at: Literal["validation", "end"] = "validation"
    needs: ClassVar[tuple[type, ...]] = (AnswersText,)

    def __init__(self, *, max: Annotated[Number, Range(-1_000, 1_000)] | None = None) -> None:
        self.max = max
        self._base: float | None = None
        self._forgetting = 0.0

    def before_training(self, context: Context) -> None:
        model = context.model
        if self._base is None and any(parameter.requires_grad for parameter in model.text_parameters()):
            with model.without_adapter():
                self._base = self._loss(context)

    def finish(self, context: Context) -> dict[str, float]:
        if self._base is None:
            return {}
        loss = self._loss(context)
        self._forgetting = loss - self._base
        return {"text/loss": loss, "text/loss_base": self._base, "text/forgetting": self._forgetting}

    def reason_to_stop(self, step: int) -> str | None:
        if self.max is None or self._forgetting <= self.max:
            return None  # NaN is not returned here
        return (
            f"text/forgetting is {self._forgetting:.3f} nats per token at step {step}, above "
            f"evaluators.forgetting.max={self.max}; the artifact of this step is saved; lower stage.lr.llm or raise "
            "data.text_replay"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"base": self._base}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._base = state["base"]

    def _loss(self, context: Context) -> float:
        """Each rank reads all texts, because they are few; all use the value of rank 0."""
        if not hasattr(self, "_batches"):
            self._batches = text_batches(context.data.text, context.data.spec)
        with context.autocast():
            return context.from_rank_zero(text_loss(context.model, self._batches, device=context.device))


def text_batches(encoder: TextEncoder, spec: VisualSpec, *, file: Path = TEXTS) -> list[Batch]:
    """Batches of the conversations of a file, encoded as in training, in rows of similar length.

    Nothing is truncated and every answer is supervised; the run's options of the data do not apply.
    """
    text_encoder = copy(encoder)
    text_encoder.max_length, text_encoder.train_on = 10**9, "assistant"
    source = Instruct(split="train", annotations=file, images=None, val_fraction=0.0)
    samples = [source[index] for index in range(len(source))]
    rows = [make_row(sample, text_encoder.encode(sample), spec) for sample in samples]
    rows.sort(key=lambda row: len(row.encoded[0].input_ids))
    return [
        collate(rows[at : at + BATCH_SIZE], spec=spec, pad_id=text_encoder.pad_id)
        for at in range(0, len(rows), BATCH_SIZE)
    ]


@torch.no_grad()
def text_loss(model: Any, batches: Sequence[Batch], *, device: torch.device) -> float:
    """Mean cross-entropy over all supervised tokens of the batches, in nats, of the LLM alone."""
    total, num_tokens = 0.0, 0
    for batch in batches:
        batch = batch.to(device)
        logits = model.without_images(batch)  # M V
        total += F.cross_entropy(logits.float(), batch.targets, reduction="sum").item()
        num_tokens += len(batch.targets)
    return total / num_tokens
