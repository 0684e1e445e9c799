"""Batch samplers: the order of samples, their packing into rows, and batches of a fixed number of rows or tokens."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool
from torch.utils.data import Sampler

from vlm.schema import Source

WINDOW = 512  # samples that are packed together, or sorted by length together

Rows = list[list[int]]  # one batch; each row is the indices of its samples
Batching = Literal["samples", "tokens", "modality"]


class Batches(Sampler[Rows]):
    """The training batches of one rank, in endless epochs. Each epoch has its own order.

    All ranks compute the same batches, and rank r of R takes batches r, r + R, r + 2R, … So R ranks read what one rank
    with batches R times as large would read. A batch may hold the end of one epoch and the start of the next. For a
    source of n samples, sample i has the index i in the first epoch, n + i in the second, and so on.

    Args:
        source: the split to read, in its own `order` or shuffled.
        length: the number of tokens of a sample. It is not called for batching by samples without packing.
        batching: batches of `batch_size` rows (`samples`), of `batch_tokens` tokens (`tokens`), or of `batch_size` rows
            of which all have images or none has (`modality`, see `by_modality`).
        batch_size: rows per batch, with batching by samples or modality.
        batch_tokens: maximum tokens of a batch, padding included, with batching by tokens; its rows are of similar
            length.
        row_tokens: maximum tokens of a row of several samples (first fit, longest first); None does not pack.
        num_together: with batching by modality, consecutive batches that have the same modality and share their
            samples evenly by length: those of all ranks in one optimizer step.
        start: the `position` to resume from; None starts at the beginning.
    """

    def __init__(
        self,
        source: Source,
        *,
        length: Callable[[int], int],
        batching: Batching,
        batch_size: int,
        batch_tokens: int,
        row_tokens: int | None,
        seed: int,
        num_together: int = 1,
        rank: int = 0,
        num_ranks: int = 1,
        start: Mapping[str, Any] | None = None,
    ) -> None:
        self.source, self.length, self.batching, self.seed = source, length, batching, seed
        self.batch_size, self.batch_tokens, self.row_tokens = batch_size, batch_tokens, row_tokens
        self.rank, self.num_ranks, self.num_together = rank, num_ranks, num_together
        self.start = start or {"epoch": 0, "index": 0, "waiting": [], "number": 0, "batches": 0}
        if (before := self.start.get("num_samples", len(source))) != len(source):
            raise ValueError(
                f"the training data has {len(source)} samples but had {before} when this run was saved; restore the "
                "data, or start a new run with ckpt="
            )

    def __iter__(self) -> Iterator[Rows]:
        return itertools.islice(self._batches(), self.rank, None, self.num_ranks)

    def position(self, num_batches: int) -> dict[str, Any]:
        """The position after `num_batches` batches of each rank, to be given as `start`."""
        batches = num_batches * self.num_ranks
        while len(self._windows) > 1 and self._windows[1]["number"] <= batches:  # a loader reads ahead
            self._windows.pop(0)
        return {**self._windows[0], "batches": batches, "num_samples": len(self.source)}

    def _batches(self) -> Iterator[Rows]:
        epoch, index, number, waiting = (self.start[key] for key in ("epoch", "index", "number", "waiting"))
        skip = self.start["batches"] - number
        self._windows: list[dict[str, Any]] = []
        while True:
            if index == 0 or not self._windows:
                order = self._order(epoch)
            self._windows.append({"epoch": epoch, "index": index, "waiting": waiting, "number": number})
            rng = random.Random(f"{self.seed} {epoch} {index}")
            indices = [int(i) for i in order[index : index + WINDOW]]
            batches, waiting = self._window(indices, waiting, rng, epoch * len(self.source))
            yield from batches[skip:]
            number, skip = number + len(batches), max(0, skip - len(batches))
            epoch, index = (epoch, index + WINDOW) if index + WINDOW < len(order) else (epoch + 1, 0)

    def _order(self, epoch: int) -> Sequence[int] | np.ndarray:
        order: Any = self.source.order(epoch, seed=self.seed)
        if order is None:
            order = _shuffled(len(self.source), f"{self.seed} {epoch}")
        if self.batching != "modality":
            return order
        size = self.batch_size * self.num_together
        missing = -epoch * len(order) % size  # to fill the last group of the epoch before
        rng = random.Random(f"{self.seed} {epoch} groups")
        return by_modality(order, self.has_images, size=size, missing=missing, rng=rng)

    @cached_property
    def has_images(self) -> Bool[np.ndarray, " n"]:
        """Whether each sample of the source has images."""
        return self.source.has_images()

    def _window(self, indices: Sequence[int], waiting: Rows, rng: random.Random, first: int) -> tuple[list[Rows], Rows]:
        """The batches of a window, and the rows that wait for the next window.

        `waiting` are the rows that the window before has left. `first` is the index of the epoch's sample 0.
        """
        if self.batching == "modality":
            return self._grouped(waiting + [[first + index] for index in indices])
        if self.batching == "samples" and self.row_tokens is None:
            rows = [[first + index] for index in indices]
        else:
            lengths = [(first + index, self.length(index)) for index in indices]
            packed = [[pair] for pair in lengths] if self.row_tokens is None else pack(lengths, self.row_tokens)
            rows = [[index for index, _ in row] for row in packed]
            rng.shuffle(rows)
            if self.batching == "tokens":
                sizes = dict(lengths)
                batches = by_tokens(rows, [sum(sizes[index] for index in row) for row in rows], self.batch_tokens)
                rng.shuffle(batches)
                return batches, []
        rows = waiting + rows
        full = len(rows) - len(rows) % self.batch_size
        return [rows[at : at + self.batch_size] for at in range(0, full, self.batch_size)], rows[full:]

    def _grouped(self, rows: Rows) -> tuple[list[Rows], Rows]:
        """The batches of the full groups of `num_together` batches, and the rows after them."""
        size, num = self.batch_size * self.num_together, len(self.source)
        full = len(rows) - len(rows) % size
        batches: list[Rows] = []
        for at in range(0, full, size):
            pairs = [(index, self.length(index % num)) for (index,) in rows[at : at + size]]
            batches += [[[index] for index in batch] for batch in split_evenly(pairs, self.num_together)]
        return batches, rows[full:]


@lru_cache(maxsize=1)  # the jobs of a sweep have it from the first: a million samples take a third of a second
def _shuffled(num: int, seed: str) -> Sequence[int]:
    order = list(range(num))
    random.Random(seed).shuffle(order)
    return tuple(order)


class EvenBatches(Sampler[Rows]):
    """The validation batches of one rank, with one sample per row.

    The sizes of batches differ by at most one, so no batch has a single image. All ranks have the same number of
    batches.
    """

    def __init__(self, indices: Sequence[int], *, batch_size: int, rank: int = 0, num_ranks: int = 1) -> None:
        if num_ranks > 1 and len(indices) < 2 * num_ranks:
            raise ValueError(
                f"validation has {len(indices)} samples for {num_ranks} processes, each of which needs two images to "
                f"compare; set data.num_val_samples={2 * num_ranks} or more"
            )
        num = num_ranks * -(-len(indices) // (num_ranks * batch_size))
        bounds = [i * len(indices) // num for i in range(num + 1)]
        batches = [[[index] for index in indices[a:b]] for a, b in itertools.pairwise(bounds)]
        self.batches = batches[rank::num_ranks]

    def __iter__(self) -> Iterator[Rows]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def pack(lengths: Sequence[tuple[int, int]], capacity: int) -> list[list[tuple[int, int]]]:
    """Rows of at most `capacity` tokens for pairs (sample, tokens): longest first, into the first row that fits."""
    rows: list[list[tuple[int, int]]] = []
    free: list[int] = []  # tokens left in each row
    for pair in sorted(lengths, key=lambda pair: -pair[1]):
        row = next((i for i, left in enumerate(free) if left >= pair[1]), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(capacity)
        rows[row].append(pair)
        free[row] -= pair[1]
    return rows


def by_tokens(rows: Rows, lengths: Sequence[int], budget: int) -> list[Rows]:
    """Batches of rows of similar length with at most `budget` tokens, padding included.

    A row longer than `budget` is a batch of its own.
    """
    batches: list[Rows] = []
    for length, row in sorted(zip(lengths, rows, strict=True), key=lambda pair: pair[0]):
        # Lengths increase, so the batch is padded to the length of this row.
        if not batches or (len(batches[-1]) + 1) * length > budget:
            batches.append([])
        batches[-1].append(row)
    return batches


def by_modality(
    order: Sequence[int], has_images: Bool[np.ndarray, " n"], *, size: int, missing: int, rng: random.Random
) -> list[int]:
    """The samples of an epoch in groups of `size`, each of samples with images or of samples without, as in LLaVA.

    The full groups are shuffled. The rest of both kinds, fewer than two groups, comes first as far as it fills groups,
    and last otherwise; its groups are mixed. `missing` samples of the rest complete the group that the epoch before has
    begun; if they are more than the rest, one group is dissolved.
    """
    kinds = [[index for index in order if has_images[index] == kind] for kind in (True, False)]
    groups = [kind[at : at + size] for kind in kinds for at in range(0, len(kind) - size + 1, size)]
    rest = [index for kind in kinds for index in kind[len(kind) - len(kind) % size :]]
    rng.shuffle(groups)
    if groups and len(rest) < missing:
        rest += groups.pop()
    first = missing + max(0, len(rest) - missing) // size * size
    return [*rest[:first], *itertools.chain.from_iterable(groups), *rest[first:]]


def split_evenly(lengths: Sequence[tuple[int, int]], num: int) -> list[list[int]]:
    """`num` batches of equally many of the samples, given as pairs (sample, tokens), with similar sums of tokens.

    Longest first, each sample goes to the batch with the fewest tokens that is not full, as in LLaVA.
    """
    batches: list[list[int]] = [[] for _ in range(num)]
    tokens = [0] * num
    for sample, length in sorted(lengths, key=lambda pair: -pair[1]):
        free = (number for number in range(num) if len(batches[number]) < len(lengths) // num)
        fewest = min(free, key=lambda number: tokens[number])
        batches[fewest].append(sample)
        tokens[fewest] += length
    return batches
