"""Does the loss depend on the image? The same texts with the right image, with another sample's, with a blank one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlm.data.datamodule import VLMDataModule
from vlm.evaluation.base import Context, Evaluator, Means, total
from vlm.schema import Batch, LossOutput

CONDITIONS = ("correct", "shuffled", "blank")


class VisualGain(Evaluator):
    """`val/visual_gain`: by how much the loss rises where images change places, in nats a supervised token.

    `val/loss_shuffled` and `val/loss_blank` are the losses of the rows that can be compared, with the image of another
    sample and with a blank one. They hold all losses of the objective, as `val/loss` does. Rows with images that
    nothing could take the place of are counted as `val/num_not_compared`; where no row can be compared, there is no
    gain.
    """

    at: ClassVar[Literal["validation", "end"]] = "validation"

    def missing(self, data: VLMDataModule, *, num_ranks: int) -> dict[str, str]:
        # The batches of all ranks: one with nothing to compare runs along with the others.
        if any(swapped(batch)[1] for batch in data.val_batches(num_ranks)):
            return {}
        why = "no batch of the validation samples has two different images of one layout, whose places could be changed"
        return {"val/visual_gain": why}

    def start(self) -> None:
        self._means, self._num_not_compared = Means(), 0

    def update(self, context: Context, batch: Batch, output: LossOutput) -> None:
        pairs, rows = compared(batch)
        self._num_not_compared += num_with_images(batch) - len(rows)
        # Where the model is sliced, all ranks must run it equally often, also one that has nothing to compare.
        some, partly = context.sum_over_ranks([bool(rows), 0 < len(rows) < len(batch.num_images)])
        if some:
            for name in CONDITIONS:
                again = name != "correct" or partly
                same = context.objective(context.model, pairs.get(name, batch)) if again else output
                self._means.add_losses(f"{name}/", same, counts=bool(rows))

    def finish(self, context: Context) -> dict[str, float]:
        means = self._means.over_ranks(context)
        (left_out,) = context.sum_over_ranks([self._num_not_compared])
        figures = {"val/num_not_compared": left_out} if left_out else {}
        if not means:
            return figures
        correct, shuffled, blank = (total(means, f"{name}/") for name in CONDITIONS)
        gain = {"val/loss_shuffled": shuffled, "val/loss_blank": blank, "val/visual_gain": shuffled - correct}
        return {**gain, **figures}


def compared(batch: Batch) -> tuple[dict[str, Batch], list[int]]:
    """The rows of a batch that can be compared, under each of `CONDITIONS`, and which rows they are; both may be empty.

    These are the rows all of whose images change places with images of other rows that look different. A tiled image
    moves as a whole, and only to where one of the same layout was, so that the text has as many placeholders as before.
    """
    pixel_values, rows = swapped(batch)
    if not rows:
        return {}, []
    own = select(batch, rows)
    shuffled = select(replace(batch, pixel_values=pixel_values), rows)
    # Zero is the encoder's mean color once normalized.
    blank = replace(own, pixel_values=torch.zeros_like(own.pixel_values))
    return {"correct": own, "shuffled": shuffled, "blank": blank}, rows


def num_with_images(batch: Batch) -> int:
    """How many rows have an image."""
    return int((batch.num_images > 0).sum())


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
    pixel_values = batch.pixel_values.clone()
    kept: set[int] = set()  # rows that show something of their own
    for image, number in zip(images, source, strict=True):
        taken = images[number]
        pixel_values[image.tiles] = batch.pixel_values[taken.tiles]
        if taken.row == image.row or taken.look == image.look:
            kept.add(image.row)
    return pixel_values, sorted({image.row for image in images} - kept)


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
    pixel_values = batch.pixel_values.cpu()
    return [
        _Image(row, layout, slice(*bounds), hash(pixel_values[slice(*bounds)].numpy().tobytes()))
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
    pixel_values = tensors.pop("pixel_values")[torch.isin(owner, chosen)]
    cut = {name: tensor[chosen] for name, tensor in tensors.items()}
    numbers, new = cut["sample_index"].unique(return_inverse=True)  # sorted, and -1 for padding
    padded = int((numbers < 0).any())
    samples = numbers[padded:].tolist()
    return replace(
        batch,
        **{**cut, "sample_index": new - padded},
        pixel_values=pixel_values,
        layouts=[batch.layouts[row] for row in rows],
        ids=[batch.ids[number] for number in samples],
        samples=[batch.samples[number] for number in samples],
    )
