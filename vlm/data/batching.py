"""Which samples make a batch: in what order, packed into rows or not, of so many rows or so many tokens."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch.utils.data import Sampler

from vlm.schema import Source

WINDOW = 512  # samples whose lengths are looked at together

Rows = list[list[int]]  # a batch: rows, each the indices of the samples in it


class Batches(Sampler[Rows]):
    """The training batches of one rank, without end: epoch follows epoch, each in an order of its own.

    All ranks work out the same batches and take turns at them, so that R ranks with batches of a size read what one
    rank with batches R times as large would. A batch may hold the end of one epoch and the start of the next. Sample i
    of a source of n is called i in the first epoch, n + i in the second, and so on.

    Args:
        source: whose indices to hand out; in its own `order`, if it has one.
        length: tokens that a sample takes in a row; asked only for packing and for batches of tokens, when the sample's
            turn has come.
        batch_size: rows a batch, with batching by samples.
        batch_tokens: the most tokens a batch may have, padding included, with batching by tokens: rows of like length.
        row_tokens: the most tokens a row of several samples may have, with packing (first fit, longest first); None
            packs nothing.
        start: where to go on, from `position`; None is the beginning.
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
        start: Mapping[str, Any] | None = None,
    ) -> None:
        self.source, self.length, self.batching, self.seed = source, length, batching, seed
        self.batch_size, self.batch_tokens, self.row_tokens = batch_size, batch_tokens, row_tokens
        self.rank, self.num_ranks = rank, num_ranks
        self.start = start or {"epoch": 0, "index": 0, "waiting": [], "number": 0, "batches": 0}
        if (before := self.start.get("num_samples", len(source))) != len(source):
            raise ValueError(
                f"the training data has {len(source)} samples, and had {before} when this run was saved; put them "
                "back, or start a new run with ckpt="
            )

    def __iter__(self) -> Iterator[Rows]:
        return itertools.islice(self._batches(), self.rank, None, self.num_ranks)

    def position(self, num_batches: int) -> dict[str, Any]:
        """Where a run stands after `num_batches` batches of each rank: all that `start` needs to go on from there."""
        batches = num_batches * self.num_ranks
        while len(self._windows) > 1 and self._windows[1]["number"] <= batches:  # loaders read windows ahead
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
        if (order := self.source.order(epoch, seed=self.seed)) is not None:
            return order
        shuffled = list(range(len(self.source)))
        random.Random(f"{self.seed} {epoch}").shuffle(shuffled)
        return shuffled

    def _window(self, indices: Sequence[int], waiting: Rows, rng: random.Random, first: int) -> tuple[list[Rows], Rows]:
        """The batches of some samples and of the rows that wait since the window before, and the rows left to wait.

        `first` is what the epoch calls sample 0.
        """
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


class EvenBatches(Sampler[Rows]):
    """The validation batches of one rank, of one sample a row.

    Their sizes differ by one at most, so that the last never holds a lonely image, and every rank has as many.
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
    """Pairs (sample, tokens) in rows of at most `capacity` tokens: the longest first, each into the first with room."""
    rows: list[list[tuple[int, int]]] = []
    room: list[int] = []
    for pair in sorted(lengths, key=lambda pair: -pair[1]):
        place = next((i for i, left in enumerate(room) if left >= pair[1]), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(capacity)
        rows[place].append(pair)
        room[place] -= pair[1]
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
