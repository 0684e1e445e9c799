"""Tokenized samples and their images -> Row -> Batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlm.schema import IGNORE, Batch, Sample, VisualSpec
from vlm.text.row import Encoded


@dataclass(frozen=True)
class Row:
    """One row of a batch: a tokenized sample with its transformed images, or several packed one after the other."""

    samples: list[Sample]  # without their images
    encoded: list[Encoded]
    pixel_values: list[Tensor]  # each [3, H, W], of an image or a tile
    layouts: list[tuple[int, ...]]  # of each image, the number of tiles in each row of tiles
    kept_patches: list[tuple[int, int]] = field(default_factory=list)  # of each image, with `VisualSpec.kept_patches`
    instructions: list[list[int]] = field(default_factory=list)  # of each image or tile, if the connector reads them


def make_row(sample: Sample, encoded: Encoded, spec: VisualSpec) -> Row:
    """The row of one sample."""
    made = [spec.transform(image) for image in sample.images]
    tiles = [tile for pixels in made for tile in (pixels if pixels.ndim == 4 else [pixels])]
    layouts = [tuple(spec.tile_rows(size)) if spec.tile_rows else (1,) for size in sample.sizes]
    kept = [spec.kept_patches(size) for size in sample.sizes] if spec.kept_patches else []
    instructions = []
    if spec.instruction is not None:
        for message in sample.messages:
            images = sum(item["type"] == "image" for item in message["content"])
            if images:
                text = "".join(item.get("text", "") for item in message["content"])
                instructions += [spec.instruction(text)] * images
        instructions = [ids for ids, layout in zip(instructions, layouts, strict=True) for _ in range(sum(layout))]
    return Row([replace(sample, images=[])], [encoded], tiles, layouts, kept, instructions)


def join(rows: Sequence[Row]) -> Row:
    """One row with the samples of several rows."""
    return Row(
        samples=list(chain.from_iterable(row.samples for row in rows)),
        encoded=list(chain.from_iterable(row.encoded for row in rows)),
        pixel_values=list(chain.from_iterable(row.pixel_values for row in rows)),
        layouts=list(chain.from_iterable(row.layouts for row in rows)),
        kept_patches=list(chain.from_iterable(row.kept_patches for row in rows)),
        instructions=list(chain.from_iterable(row.instructions for row in rows)),
    )


def collate(
    rows: Sequence[Row],
    *,
    spec: VisualSpec,
    pad_id: int,
    side: Literal["left", "right"] = "right",
    sources: Sequence[str] = (),
    share_images: bool = False,
    with_keys: bool = False,
) -> Batch:
    """A batch of rows, padded to the longest: on the right to train, on the left to generate.

    With `share_images`, a tensor that several images have is in `pixel_values` once. With `with_keys`, the batch has
    the keys of the images in the feature cache.
    """
    first = accumulate((len(row.samples) for row in rows), initial=0)
    columns = [_columns(row, number) for row, number in zip(rows, first, strict=False)]
    longest = max(len(column["input_ids"]) for column in columns)

    def padded(name: str, fill: int = 0) -> Tensor:
        values = np.full((len(columns), longest), fill)  # B T
        for row_values, column in zip(values, columns, strict=True):
            size = len(column[name])
            row_values[slice(size) if side == "right" else slice(longest - size, longest)] = column[name]
        return torch.from_numpy(values)

    samples = list(chain.from_iterable(row.samples for row in rows))
    images = list(chain.from_iterable(row.pixel_values for row in rows))
    distinct = {pixels.data_ptr(): pixels for pixels in images} if share_images else dict(enumerate(images))
    numbers = {pointer: number for number, pointer in enumerate(distinct)}
    channels_last = (
        torch.stack([pixels.permute(1, 2, 0) for pixels in distinct.values()])
        if images
        else torch.zeros(0, *spec.image_size, 3)
    )  # N H W 3, the memory layout of what `Transform` returns
    instructions = list(chain.from_iterable(row.instructions for row in rows))
    lengths = torch.tensor([len(ids) for ids in instructions])  # N
    return Batch(
        pixel_values=channels_last.permute(0, 3, 1, 2),
        input_ids=padded("input_ids", pad_id),
        attention_mask=padded("attention_mask").bool(),
        position_ids=padded("position_ids"),
        image_mask=padded("image_mask").bool(),
        images_before=padded("images_before"),
        images_hidden=padded("images_hidden"),
        labels=padded("labels", IGNORE),
        sample_index=padded("sample_index", -1),
        num_images=torch.tensor([len(row.pixel_values) for row in rows]),
        layouts=[row.layouts for row in rows],
        kept_patches=[row.kept_patches for row in rows],
        ids=[sample.id for sample in samples],
        samples=samples,
        sources=tuple(sources),
        image_index=torch.tensor([numbers[pixels.data_ptr()] for pixels in images], dtype=torch.long)
        if share_images
        else None,
        image_keys=tuple(map(image_key, distinct.values())) if with_keys else None,
        instruction_ids=pad_sequence(list(map(torch.tensor, instructions)), True) if instructions else None,
        instruction_mask=torch.arange(int(lengths.max())) < lengths[:, None] if instructions else None,
    )


def image_key(pixel_values: Float[Tensor, "3 h w"]) -> bytes:
    """The key of an image in the feature cache: a hash of what the encoder gets."""
    content: Any = pixel_values.permute(1, 2, 0).contiguous().numpy()
    return hashlib.blake2b(content, digest_size=16).digest()


def _columns(row: Row, first: int) -> dict[str, np.ndarray]:
    """One value for each token of the row, by the names in `Batch`; `first` is the index of the row's first sample."""
    parts = []
    images = 0
    for number, (sample, encoded) in enumerate(zip(row.samples, row.encoded, strict=True), start=first):
        size = len(encoded.input_ids)
        part = {
            "input_ids": np.array(encoded.input_ids),
            "attention_mask": np.ones(size, dtype=int),
            "position_ids": np.arange(size),
            "image_mask": np.array(encoded.image_mask, dtype=int),
            "images_before": images + np.array(encoded.images_before),
            "images_hidden": np.full(size, images),
            "labels": np.array(encoded.labels),
            "sample_index": np.full(size, number),
        }
        part["labels"][0] = IGNORE  # the first token has no logits before it
        parts.append(part)
        images += sample.num_images
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
