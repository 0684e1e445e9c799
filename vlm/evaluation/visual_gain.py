"""Image ablation: the loss of the same texts with the correct image, another sample's image and a blank image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, chain, compress, pairwise
from typing import Literal

import torch
from torch import Tensor

from vlm.data.collate import image_key
from vlm.data.datamodule import VLMDataModule
from vlm.evaluation.base import Context, Evaluator, Means, total
from vlm.schema import Batch, LossOutput

OF_IMAGES = ("instruction_ids", "instruction_mask")  # tensors of a batch with a row for each image
CONDITIONS = ("correct", "shuffled", "blank")


class VisualGain(Evaluator):
    """`val/visual_gain`: increase of the loss with shuffled images, in nats per supervised token.

    `val/loss_shuffled` and `val/loss_blank` are the losses with the image of another sample and with a blank image,
    over the rows that can be compared. They hold all losses of the objective, as `val/loss` does. Rows whose images
    cannot be swapped are counted as `val/num_not_compared`. If no row can be compared, there is no gain.
    """

    at: Literal["validation", "end"] = "validation"

    def missing(self, data: VLMDataModule, *, num_ranks: int) -> dict[str, str]:
        # The batches of all ranks: a rank with nothing to compare still takes part.
        if any(swapped(batch)[1] for batch in data.val_batches(num_ranks)):
            return {}
        why = "no validation batch has two different images of the same layout to swap"
        return {"val/visual_gain": why}

    def start(self) -> None:
        self._means, self._num_not_compared = Means(), 0

    def update(self, context: Context, batch: Batch, output: LossOutput) -> None:
        pairs, rows = compared(batch)
        self._num_not_compared += num_with_images(batch) - len(rows)
        # All ranks must run a sharded model equally often, also a rank with nothing to compare.
        some, partly = context.sum_over_ranks([bool(rows), 0 < len(rows) < len(batch.num_images)])
        if some:
            for name in CONDITIONS:
                rerun = name != "correct" or partly
                result = context.objective(context.model, pairs.get(name, batch)) if rerun else output
                self._means.add_losses(f"{name}/", result, counts=bool(rows))

    def finish(self, context: Context) -> dict[str, float]:
        means = self._means.over_ranks(context)
        (num_not_compared,) = context.sum_over_ranks([self._num_not_compared])
        metrics = {"val/num_not_compared": num_not_compared} if num_not_compared else {}
        if not means:
            return metrics
        correct, shuffled, blank = (total(means, f"{name}/") for name in CONDITIONS)
        gain = {"val/loss_shuffled": shuffled, "val/loss_blank": blank, "val/visual_gain": shuffled - correct}
        return {**gain, **metrics}


def compared(batch: Batch) -> tuple[dict[str, Batch], list[int]]:
    """The rows of a batch that can be compared, under each of `CONDITIONS`, and their indices; both may be empty.

    A row can be compared if each of its images can be swapped for a different image of another row. A tiled image is
    swapped as a whole and only for one of the same layout, so the number of placeholders stays.
    """
    exchanged, rows = swapped(batch)
    if not rows:
        return {}, []
    own = select(batch, rows)
    # Zero is the mean color after normalization.
    blank = replace(own, pixel_values=torch.zeros_like(own.pixel_values))
    if own.image_keys is not None:
        key = image_key(torch.zeros(blank.pixel_values.shape[1:]))
        blank = replace(blank, image_keys=(key,) * len(own.image_keys))
    shuffled = select(exchanged, rows)
    return {"correct": own, "shuffled": shuffled, "blank": blank}, rows


def num_with_images(batch: Batch) -> int:
    """Number of rows with an image."""
    return int((batch.num_images > 0).sum())


def swapped(batch: Batch) -> tuple[Batch, list[int]]:
    """The batch with images swapped between rows, and the rows with none of their own images."""
    images = _images(batch)
    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for number, image in enumerate(images):
        groups.setdefault(image.layout, []).append(number)
    source = list(range(len(images)))  # index of the image whose pixels each image gets
    for members in groups.values():
        for number, other in zip(members, _permuted([images[number] for number in members]), strict=True):
            source[number] = members[other]
    tiles = list(range(len(batch.pixel_values)))  # index of the tile whose pixels each tile gets
    unchanged: set[int] = set()  # rows with one of their own images
    for image, number in zip(images, source, strict=True):
        other_image = images[number]
        tiles[image.tiles] = range(len(tiles))[other_image.tiles]
        if other_image.row == image.row or other_image.pixel_hash == image.pixel_hash:
            unchanged.add(image.row)
    keys = batch.image_keys and tuple(batch.image_keys[tile] for tile in tiles)
    exchanged = replace(batch, pixel_values=batch.pixel_values[tiles], image_keys=keys)
    return exchanged, sorted({image.row for image in images} - unchanged)


@dataclass(frozen=True)
class _Image:
    row: int
    layout: tuple[tuple[int, ...], tuple[int, ...]]  # of its tiles, and of the patches that are not padding
    tiles: slice  # of the batch's pixel_values
    pixel_hash: int


def _images(batch: Batch) -> list[_Image]:
    """All images of a batch, in order."""
    layouts = [(row, layout) for row, images in enumerate(batch.layouts) for layout in images]
    kept: list[tuple[int, ...]] = [*chain.from_iterable(batch.kept_patches)] or [()] * len(layouts)
    ends = accumulate((sum(layout) for _, layout in layouts), initial=0)
    pixel_values = batch.pixel_values.cpu()
    return [
        _Image(row, (layout, patches), slice(*bounds), hash(pixel_values[slice(*bounds)].numpy().tobytes()))
        for (row, layout), patches, bounds in zip(layouts, kept, pairwise(ends), strict=True)
    ]


def _permuted(images: Sequence[_Image]) -> list[int]:
    """A permutation of images of one layout that changes as many of them as possible.

    Equal images are sorted next to each other, then rolled by the shift that leaves the fewest unchanged. Images with
    equal pixels count as unchanged.
    """
    num = len(images)
    hashes = [image.pixel_hash for image in images]
    order = sorted(range(num), key=lambda i: hashes.index(hashes[i]))

    def num_unchanged(shift: int) -> int:
        pairs = zip(order, order[-shift:] + order[:-shift], strict=True)
        return sum(images[i].row == images[j].row or hashes[i] == hashes[j] for i, j in pairs)

    shift = min(range(1, num), key=num_unchanged, default=0)
    source = [0] * num
    for index, other in zip(order, order[-shift:] + order[:-shift] if shift else order, strict=True):
        source[index] = other
    return source


def select(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some rows of a batch, with their images and samples."""
    chosen = torch.tensor(rows, device=batch.input_ids.device)
    owner = torch.repeat_interleave(torch.arange(len(batch.num_images), device=chosen.device), batch.num_images)
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch) if isinstance(getattr(batch, f.name), Tensor)}
    with_images = torch.isin(owner, chosen)
    pixel_values = tensors.pop("pixel_values")[with_images]
    of_images = {name: tensors.pop(name)[with_images] for name in OF_IMAGES if name in tensors}
    selected = {name: tensor[chosen] for name, tensor in tensors.items()}
    numbers, renumbered = selected["sample_index"].unique(return_inverse=True)  # sorted; -1 is padding
    padded = int((numbers < 0).any())
    samples = numbers[padded:].tolist()
    return replace(
        batch,
        **{**selected, "sample_index": renumbered - padded},
        **of_images,
        pixel_values=pixel_values,
        image_keys=batch.image_keys and tuple(compress(batch.image_keys, with_images.tolist())),
        layouts=[batch.layouts[row] for row in rows],
        kept_patches=[batch.kept_patches[row] for row in rows],
        ids=[batch.ids[number] for number in samples],
        samples=[batch.samples[number] for number in samples],
    )
