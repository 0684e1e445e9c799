"""How well an LLM talks without a picture: its loss on a fixed set of conversations, half English and half Japanese."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from vlm.data.collate import collate, make_row
from vlm.data.sources.instruct import Instruct
from vlm.schema import Batch, VisualSpec
from vlm.text.encode import TextEncoder

TEXTS = Path(__file__).with_name("texts.jsonl")  # general knowledge and instructions, written for this project
ROWS = 8  # a batch: its logits are no more than those of a small training batch


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
