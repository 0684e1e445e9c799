"""Does the loss depend on the image? The same texts with the right image, with another sample's, with a blank one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from vlm.data.datamodule import VLMDataModule
from vlm.schema import Batch

CONDITIONS = ("correct", "shuffled", "blank")


def compared(batch: Batch) -> tuple[dict[str, Batch], list[int]]:
    """The rows of a batch that can be compared, under each of `CONDITIONS`, and which rows they are; both may be empty.

    These are the rows all of whose images change places with images of other rows that look different. A tiled image
    moves as a whole, and only to where one of the same layout was, so that the text has as many placeholders as before.
    """
    pixels, rows = swapped(batch)
    if not rows:
        return {}, []
    own = select(batch, rows)
    shuffled = select(replace(batch, pixels=pixels), rows)
    # Zero is the encoder's mean color once normalized.
    blank = replace(own, pixels=torch.zeros_like(own.pixels))
    return {"correct": own, "shuffled": shuffled, "blank": blank}, rows


def num_with_images(batch: Batch) -> int:
    """How many rows have an image."""
    return int((batch.num_images > 0).sum())


def check_comparison(data: VLMDataModule, *, num_ranks: int, best: str | None = None) -> str | None:
    """What to say of a validation that has no rows to compare, or None; reads as far as the first batch that has some.

    Those of all ranks are looked at: one with nothing to compare runs along with the others.

    Raises ValueError where the artifact of the `best` visual gain is to be kept, which there will not be.
    """
    if any(swapped(batch)[1] for batch in data.val_batches(num_ranks)):
        return None
    why = "no batch of the validation samples has two different images of one layout, whose places could be changed"
    if best == "val/visual_gain":
        raise ValueError(f"checkpoint.best={best} needs a visual gain, but {why}; set checkpoint.best=val/loss")
    return f"There will be no val/visual_gain: {why}."


def swapped(batch: Batch) -> tuple[Tensor, list[int]]:
    """Pixels with images swapped between rows, and the rows that hold none of their own images any more."""
    images = _images(batch)
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, image in enumerate(images):
        groups.setdefault(image.layout, []).append(number)
    source = list(range(len(images)))  # whose pixels each image gets
    for members in groups.values():
        for number, other in zip(members, _permuted([images[number] for number in members]), strict=True):
            source[number] = members[other]
    pixels = batch.pixels.clone()
    kept: set[int] = set()  # rows that show something of their own
    for image, number in zip(images, source, strict=True):
        taken = images[number]
        pixels[image.tiles] = batch.pixels[taken.tiles]
        if taken.row == image.row or taken.look == image.look:
            kept.add(image.row)
    return pixels, sorted({image.row for image in images} - kept)


@dataclass(frozen=True)
class _Image:
    row: int
    layout: tuple[int, ...]
    tiles: slice  # its place in the batch's pixels
    look: int  # equal for equal pixels


def _images(batch: Batch) -> list[_Image]:
    """All images of a batch, in order."""
    layouts = [(row, layout) for row, images in enumerate(batch.layouts) for layout in images]
    ends = accumulate((sum(layout) for _, layout in layouts), initial=0)
    pixels = batch.pixels.cpu()
    return [
        _Image(row, layout, slice(*bounds), hash(pixels[slice(*bounds)].numpy().tobytes()))
        for (row, layout), bounds in zip(layouts, pairwise(ends), strict=True)
    ]


def _permuted(images: Sequence[_Image]) -> list[int]:
    """Which of some images of one layout each of them becomes: every one is used once.

    Equal images are put side by side, then all are handed on by the shift that leaves the fewest unchanged; two
    captions of one picture do not count as two pictures.
    """
    num = len(images)
    looks = [image.look for image in images]
    order = sorted(range(num), key=lambda i: looks.index(looks[i]))

    def unchanged(shift: int) -> int:
        pairs = zip(order, order[-shift:] + order[:-shift], strict=True)
        return sum(images[i].row == images[j].row or looks[i] == looks[j] for i, j in pairs)

    shift = min(range(1, num), key=unchanged, default=0)
    source = [0] * num
    for place, other in zip(order, order[-shift:] + order[:-shift] if shift else order, strict=True):
        source[place] = other
    return source


def select(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some rows of a batch, with their images and samples."""
    chosen = torch.tensor(rows, device=batch.input_ids.device)
    owner = torch.repeat_interleave(torch.arange(len(batch.num_images), device=chosen.device), batch.num_images)
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch) if isinstance(getattr(batch, f.name), Tensor)}
    pixels = tensors.pop("pixels")[torch.isin(owner, chosen)]
    cut = {name: tensor[chosen] for name, tensor in tensors.items()}
    numbers, new = cut["sample_index"].unique(return_inverse=True)  # sorted, and -1 for padding
    padded = int((numbers < 0).any())
    samples = numbers[padded:].tolist()
    return replace(
        batch,
        **{**cut, "sample_index": new - padded},
        pixels=pixels,
        layouts=[batch.layouts[row] for row in rows],
        ids=[batch.ids[number] for number in samples],
        samples=[batch.samples[number] for number in samples],
    )
