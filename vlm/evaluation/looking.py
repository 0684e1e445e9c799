"""Does the model look? The same texts with the right image, with another sample's, and with none to see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor

from vlm.schema import Batch


def with_images(batch: Batch) -> Batch | None:
    """The rows that have an image, or None where no row has."""
    rows = (batch.num_images > 0).nonzero().flatten()
    if len(rows) == len(batch.num_images):
        return batch
    if len(rows) == 0:
        return None
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch) if isinstance(getattr(batch, f.name), Tensor)}
    del tensors["pixels"]
    chosen = {name: tensor[rows] for name, tensor in tensors.items()}
    samples = [int(number) for number in chosen["sample_index"].unique() if number >= 0]
    return replace(batch, **chosen, ids=[batch.ids[number] for number in samples])


def shuffled(batch: Batch) -> Batch | None:
    """Every image in the place of one of another row that looks different, or None where the batch has no such one.

    Equal pictures are put side by side, then all are handed on by the shift that leaves the fewest unchanged; two
    captions of one picture do not count as two pictures.
    """
    num = len(batch.pixels)
    owner = torch.repeat_interleave(torch.arange(len(batch.num_images)), batch.num_images.cpu()).tolist()
    look = [hash(image.numpy().tobytes()) for image in batch.pixels.cpu()]
    order = sorted(range(num), key=lambda i: look.index(look[i]))
    unchanged = {
        shift: sum(
            owner[i] == owner[j] or look[i] == look[j] for i, j in zip(order, order[-shift:] + order, strict=False)
        )
        for shift in range(1, num)
    }
    if not unchanged or min(unchanged.values()) == num:
        return None
    shift = min(unchanged, key=lambda shift: unchanged[shift])
    pixels = torch.empty_like(batch.pixels)
    pixels[order] = batch.pixels[order[-shift:] + order[:-shift]]
    return replace(batch, pixels=pixels)


def blank(batch: Batch) -> Batch:
    """Every image painted over with the encoder's mean colour, which is zero once normalised."""
    return replace(batch, pixels=torch.zeros_like(batch.pixels))


CONDITIONS: dict[str, Callable[[Batch], Batch | None]] = {"shuffled": shuffled, "blank": blank}
