"""Samples that were tokenised -> Batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vlm.schema import IGNORE, Batch, Sample, VisualSpec
from vlm.text.encode import Encoded


@dataclass(frozen=True)
class Row:
    """One sample as the model will read it, its images transformed."""

    sample: Sample  # without its pictures
    encoded: Encoded
    pixels: list[Tensor]  # each [3, H, W], of an image or a tile


def make_row(sample: Sample, encoded: Encoded, spec: VisualSpec) -> Row:
    made = [spec.transform(image) for image in sample.images]
    tiles = [tile for pixels in made for tile in (pixels if pixels.ndim == 4 else [pixels])]
    return Row(replace(sample, images=[]), encoded, tiles)


def collate(rows: Sequence[Row], *, spec: VisualSpec, pad_id: int, side: Literal["left", "right"] = "right") -> Batch:
    """Pad rows to the longest: on the right to train, on the left to generate."""
    longest = max(len(row.encoded.input_ids) for row in rows)

    def pad(values: Sequence[int], fill: int) -> list[int]:
        padding = [fill] * (longest - len(values))
        return [*values, *padding] if side == "right" else [*padding, *values]

    mask = torch.tensor([pad([1] * len(row.encoded.input_ids), 0) for row in rows], dtype=torch.bool)
    pixels = [image for row in rows for image in row.pixels]
    return Batch(
        pixels=torch.stack(pixels) if pixels else torch.zeros(0, 3, *spec.image_size),
        input_ids=torch.tensor([pad(row.encoded.input_ids, pad_id) for row in rows]),
        attention_mask=mask,
        positions=(mask.long().cumsum(1) - 1).clamp(min=0),
        image_mask=torch.tensor([pad(row.encoded.image_mask, 0) for row in rows], dtype=torch.bool),
        images_before=torch.tensor([pad(row.encoded.images_before, 0) for row in rows]),
        labels=torch.tensor([pad(row.encoded.labels, IGNORE) for row in rows]),
        num_images=torch.tensor([len(row.pixels) for row in rows]),
        ids=[row.sample.id for row in rows],
        samples=[row.sample for row in rows],
    )
