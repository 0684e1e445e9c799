"""What training costs the LLM: its loss on plain conversations, beside that of the LLM before training.

The conversations are fixed, half of them English and half Japanese.
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
ROWS = 8  # a batch: its logits are no more than those of a small training batch


class Forgetting(Evaluator):
    """`text/loss`, `text/loss_base` and their difference `text/forgetting` at every validation, in nats a token.

    The LLM reads the texts alone: no image, no connector. Its base is the LLM as the stage found it, without the
    adapter if it has one. It is measured once, before the first step.

    Nothing is measured where the stage freezes the LLM: no step can change what it says.

    Args:
        max: the forgetting above which the run stops, with its artifact saved; None stops none.
    """

    at: ClassVar[Literal["validation", "end"]] = "validation"
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
            return None  # NaN goes on to the sentence
        return (
            f"text/forgetting is {self._forgetting:.3f} nats a token at step {step}, above "
            f"evaluators.forgetting.max={self.max}; the artifact of this step is kept: lower stage.lr.llm, or raise "
            "data.text_replay"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"base": self._base}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._base = state["base"]

    def _loss(self, context: Context) -> float:
        """Each rank reads all the texts, which are few, and all go by the figure of the first."""
        if not hasattr(self, "_batches"):
            self._batches = text_batches(context.data.text, context.data.spec)
        with context.autocast():
            return context.from_first_rank(text_loss(context.model, self._batches, device=context.device))


def text_batches(encoder: TextEncoder, spec: VisualSpec, *, file: Path = TEXTS) -> list[Batch]:
    """The conversations of a file as training would read them, in rows of like length.

    The figure must not depend on how the run cuts and supervises its own data: all of every answer is supervised.
    """
    whole = copy(encoder)
    whole.max_length, whole.train_on = 10**9, "assistant"
    source = Instruct(split="train", annotations=file, images=None, val_fraction=0.0)
    samples = [source[index] for index in range(len(source))]
    rows = [make_row(sample, whole.encode(sample.id, sample.messages, 0), spec) for sample in samples]
    rows.sort(key=lambda row: len(row.encoded[0].input_ids))
    return [collate(rows[at : at + ROWS], spec=spec, pad_id=whole.pad_id) for at in range(0, len(rows), ROWS)]


@torch.no_grad()
def text_loss(model: Any, batches: Sequence[Batch], *, device: torch.device) -> float:
    """Mean cross-entropy over all supervised tokens of the batches, in nats; the model's LLM alone reads them."""
    total, num_tokens = 0.0, 0
    for batch in batches:
        batch = batch.to(device)
        logits = model.without_images(batch)  # M V
        total += F.cross_entropy(logits.float(), batch.targets, reduction="sum").item()
        num_tokens += len(batch.targets)
    return total / num_tokens
