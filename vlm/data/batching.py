"""Which samples make a batch: in what order, packed into rows or not, of so many rows or so many tokens."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from torch.utils.data import Sampler

from vlm.schema import Source

WINDOW = 512  # samples whose lengths are looked at together

Rows = list[list[int]]  # a batch: rows, each the indices of the samples in it


class Batches(Sampler[Rows]):
    """The training batches of one rank, epoch after epoch, each epoch in an order of its own.

    All ranks work out the same batches and take turns at them, so that ranks × batches of a size are the batches of one
    rank that are as much larger. What is left at the end of an epoch and fills no batch on every rank is left out.

    Args:
        source: whose indices to hand out; in its own `order`, if it has one.
        length: tokens that a sample takes in a row; asked only for packing and for batches of tokens, when the sample's
            turn has come.
        batch_size: rows a batch, with batching by samples.
        batch_tokens: the most tokens a batch may have, padding included, with batching by tokens: rows of like length.
        row_tokens: the most tokens a row of several samples may have, with packing (first fit, longest first); None
            packs nothing.
        same_every_epoch: the first epoch's order again and again, to overfit its first batches.
    """

    def __init__(
        self,
        source: Source,
        *,
        length: Callable[[int], int],
        batching: Literal["samples", "tokens"],
        batch_size: int,
        batch_tokens: int,
        row_tokens: int | None,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
        same_every_epoch: bool = False,
    ) -> None:
        self.source: Any = source
        self.length, self.batching, self.seed = length, batching, seed
        self.batch_size, self.batch_tokens, self.row_tokens = batch_size, batch_tokens, row_tokens
        self.rank, self.num_ranks, self.same_every_epoch = rank, num_ranks, same_every_epoch
        self.epoch = 0

    def __iter__(self) -> Iterator[Rows]:
        epoch = 0 if self.same_every_epoch else self.epoch
        self.epoch += 1
        batches = self._batches(epoch)
        while len(turn := list(itertools.islice(batches, self.num_ranks))) == self.num_ranks:
            yield turn[self.rank]

    def __len__(self) -> int:
        """Raises TypeError where only reading the samples would tell."""
        if self.batching == "tokens" or self.row_tokens is not None:
            raise TypeError("how many batches an epoch has is known only at its end")
        return len(self._order(0)) // (self.batch_size * self.num_ranks)

    def _order(self, epoch: int) -> Sequence[int]:
        if hasattr(self.source, "order"):
            return self.source.order(epoch, seed=self.seed)
        order = list(range(len(self.source)))
        random.Random(f"{self.seed} {epoch}").shuffle(order)
        return order

    def _batches(self, epoch: int) -> Iterator[Rows]:
        order = self._order(epoch)
        if self.batching == "samples" and self.row_tokens is None:
            yield from _full([[index] for index in order], self.batch_size)
            return
        rng = random.Random(f"{self.seed} {epoch} rows")
        waiting: Rows = []
        for start in range(0, len(order), WINDOW):
            lengths = {index: self.length(index) for index in order[start : start + WINDOW]}
            rows = [[index] for index in lengths] if self.row_tokens is None else pack(lengths, self.row_tokens)
            if self.batching == "tokens":
                batches = by_tokens(rows, [sum(lengths[index] for index in row) for row in rows], self.batch_tokens)
                rng.shuffle(batches)
                yield from batches
            else:
                rng.shuffle(rows)
                waiting += rows
                full = len(waiting) // self.batch_size * self.batch_size
                yield from _full(waiting, self.batch_size)
                waiting = waiting[full:]


class EvenBatches(Sampler[Rows]):
    """The validation batches of one rank, of one sample a row.

    Their sizes differ by one at most, so that the last never holds a lonely image.
    """

    def __init__(self, indices: Sequence[int], *, batch_size: int, rank: int = 0, num_ranks: int = 1) -> None:
        num = -(-len(indices) // batch_size)
        bounds = [i * len(indices) // num for i in range(num + 1)]
        batches = [[[index] for index in indices[a:b]] for a, b in itertools.pairwise(bounds)]
        self.batches = batches[rank::num_ranks]

    def __iter__(self) -> Iterator[Rows]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def pack(lengths: dict[int, int], capacity: int) -> Rows:
    """Samples in rows of at most `capacity` tokens: the longest first, each into the first row that has room."""
    rows: Rows = []
    room: list[int] = []
    for index in sorted(lengths, key=lambda index: -lengths[index]):
        place = next((i for i, left in enumerate(room) if left >= lengths[index]), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(capacity)
        rows[place].append(index)
        room[place] -= lengths[index]
    return rows


def by_tokens(rows: Rows, lengths: Sequence[int], budget: int) -> list[Rows]:
    """Batches of rows of like length, each of at most `budget` tokens once padded; a longer row stands alone."""
    batches: list[Rows] = []
    for length, row in sorted(zip(lengths, rows, strict=True), key=lambda pair: pair[0]):
        # Rows come in rising length, so the newest is what the batch is padded to.
        if not batches or (len(batches[-1]) + 1) * length > budget:
            batches.append([])
        batches[-1].append(row)
    return batches


def _full(rows: Rows, size: int) -> Iterator[Rows]:
    """The rows in batches of `size`, without what fills none."""
    for start in range(0, len(rows) - size + 1, size):
        yield rows[start : start + size]
