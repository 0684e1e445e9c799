"""Which samples share a batch: every one once an epoch, within the budget, the same on every rank."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import pytest

from tests.helpers.sources import K, Numbered, numbered
from vlm.data import batching
from vlm.data.batching import Batches, Rows, by_tokens, pack, split_evenly
from vlm.schema import Batch, Source

LENGTHS = [3 + (7 * index) % 29 for index in range(100)]  # of 100 samples: 3 to 31 tokens


class Sized(Source):
    """A source of which only the size matters here."""

    def __init__(self, size: int = 100) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("no sample is to be read")


class Ordered(Sized):
    """One that says what an epoch reads: sample 5 twice, and others not at all."""

    def order(self, epoch: int, *, seed: int) -> Sequence[int]:
        return [5, 9, 5, 20 + epoch, seed, 7]


class Mixed(Sized):
    """One of which every third sample has images."""

    def has_images(self) -> np.ndarray:
        return np.arange(self.size) % 3 == 0


def batches_of(source: Any = None, **options: Any) -> Batches:
    options = {"batching": "samples", "batch_size": 8, "batch_tokens": 64, "row_tokens": None, "seed": 0} | options
    return Batches(source or Sized(), length=LENGTHS.__getitem__, **options)


def flat(batches: Any) -> list[int]:
    return list(chain.from_iterable(chain.from_iterable(batches)))


def take(batches: Iterable[Rows], num: int) -> list[Rows]:
    return list(islice(batches, num))


def take_samples(batches: Iterable[Rows], num: int) -> list[Rows]:
    """Batches up to and with the one that holds the `num`-th sample."""
    taken: list[Rows] = []
    for batch in batches:
        taken.append(batch)
        if len(flat(taken)) >= num:
            break
    return taken


def test_batches_of_samples_read_each_once_in_another_order_every_epoch() -> None:
    read = flat(take(batches_of(), 25))  # two epochs
    assert sorted(read[:100]) == list(range(100))
    assert sorted(read[100:]) == list(range(100, 200)), "the same samples in the second epoch"
    assert read[:100] != [index - 100 for index in read[100:]]
    assert read == flat(take(batches_of(), 25))
    assert read != flat(take(batches_of(seed=1), 25))
    assert all(len(batch) == 8 and all(len(row) == 1 for row in batch) for batch in take(batches_of(), 25))


def test_a_split_smaller_than_a_batch_fills_it_with_the_next_epoch() -> None:
    batches = take(batches_of(Sized(3), batch_size=4), 3)
    assert [len(batch) for batch in batches] == [4, 4, 4]
    assert all(sorted(flat(batches)[at : at + 3]) == [at, at + 1, at + 2] for at in range(0, 12, 3))


KINDS: list[dict[str, Any]] = [
    {},
    {"batching": "tokens"},
    {"row_tokens": 32},
    {"batching": "tokens", "row_tokens": 32},
    {"batching": "modality", "num_together": 3, "source": Mixed()},
]


@pytest.mark.parametrize("options", KINDS)
def test_ranks_take_turns_at_what_one_rank_would_read(options: dict[str, Any]) -> None:
    alone = take(batches_of(batch_size=4, **options), 60)
    ranks = [take(batches_of(batch_size=4, rank=rank, num_ranks=3, **options), 20) for rank in range(3)]
    assert list(chain.from_iterable(zip(*ranks, strict=True))) == alone


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_later_run_goes_on_where_one_stopped(
    options: dict[str, Any], num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it stopped, however far ahead the loader had read, and also after a second stop."""
    monkeypatch.setattr(batching, "WINDOW", 40)
    options = {"batch_size": 6, "rank": num_ranks - 1, "num_ranks": num_ranks, **options}
    whole = take(batches_of(**options), 60)
    for stop in (0, 1, 7, 20, 41):
        first = batches_of(**options)
        take(first, stop + 5)
        start = json.loads(json.dumps(first.position(stop)))
        second = batches_of(**options, start=start)
        assert take(second, 60 - stop) == whole[stop:]
        again = batches_of(**options, start=second.position(stop + 3))
        assert take(again, 5) == whole[stop + 3 : stop + 8]


def test_batches_of_tokens_keep_to_the_budget_and_pad_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "WINDOW", 40)
    batches = take_samples(batches_of(batching="tokens"), 100)
    assert sorted(flat(batches)) == list(range(100))
    places = tokens = 0
    for batch in batches:
        lengths = [LENGTHS[index] for (index,) in batch]
        assert len(lengths) * max(lengths) <= 64
        places, tokens = places + len(lengths) * max(lengths), tokens + sum(lengths)
    mean = sum(LENGTHS) / 100 / 31  # filled share of batches that mix all lengths
    assert tokens / places > 0.85 > mean + 0.2


def test_a_row_beyond_the_budget_stands_alone() -> None:
    assert by_tokens([[0], [1], [2], [3]], [90, 10, 70, 10], 64) == [[[1], [3]], [[2]], [[0]]]


def test_packed_rows_hold_every_sample_once_and_have_little_room_left() -> None:
    rows = pack(list(enumerate(LENGTHS)), 64)
    sums = [sum(length for _, length in row) for row in rows]
    assert sorted(index for row in rows for index, _ in row) == list(range(100))
    assert max(sums) <= 64
    assert len(rows) == -(-sum(LENGTHS) // 64), "as few rows as can be"


def test_packed_batches_have_batch_size_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "WINDOW", 40)
    batches = take_samples(batches_of(row_tokens=64, batch_size=4), 90)
    assert all(len(batch) == 4 for batch in batches)
    assert len(set(flat(batches))) == len(flat(batches))


def test_a_sources_own_order_is_kept() -> None:
    assert take(batches_of(Ordered(), batch_size=2, seed=3), 6) == [
        [[5], [9]],
        [[5], [20]],
        [[3], [7]],
        [[105], [109]],
        [[105], [121]],
        [[103], [107]],
    ]


def samples_of(batches: list[Batch]) -> list[str]:
    return sorted(sample for batch in batches for sample in batch.ids)


def groups_of(size: int, num: int, **options: Any) -> list[list[int]]:
    """The samples of the first groups of batches of four rows."""
    found = take(
        batches_of(Mixed(), batching="modality", batch_size=4, num_together=size // 4, **options), num * size // 4
    )
    assert all(len(batch) == 4 and all(len(row) == 1 for row in batch) for batch in found)
    return [flat(found[at : at + size // 4]) for at in range(0, len(found), size // 4)]


@pytest.mark.parametrize(("size", "mixed"), [(4, 1), (8, 0), (12, 1), (16, 0), (64, 0)])
def test_batches_by_modality_are_grouped_as_llavas(monkeypatch: pytest.MonkeyPatch, size: int, mixed: int) -> None:
    """34 samples with images, 66 without: the rest of both is mixed in the first group, and beyond that comes last."""
    monkeypatch.setattr(batching, "WINDOW", 40)
    whole = 100 // size
    groups = groups_of(size, whole)
    assert len({*flat_(groups)}) == whole * size, "no sample twice"
    kinds = [{index % 3 == 0 for index in group} for group in groups]
    rest = 34 % size + 66 % size
    assert [len(kind) for kind in kinds] == [1 + (number == 0 and rest >= size) for number in range(whole)]
    assert sum(len(kind) == 2 for kind in kinds) == mixed
    if size < 12:  # the full groups are shuffled
        assert kinds[1:] != sorted(kinds[1:], key=max)
    assert groups != groups_of(size, whole, seed=1)


def flat_(groups: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(groups))


def test_epochs_by_modality_follow_each_other_without_a_gap() -> None:
    groups = groups_of(16, 25)  # four epochs
    read = flat_(groups)
    assert sorted(read) == list(range(400))
    crossing = [{index // 100 for index in group} for group in groups]
    assert [number for number, epochs in enumerate(crossing) if len(epochs) == 2] == [6, 12, 18]
    pure = [len({index % 100 % 3 == 0 for index in group}) == 1 for group in groups]
    assert sum(pure) >= 20, "at most one mixed group an epoch, and one dissolved"


def test_the_batches_of_a_step_share_their_tokens_evenly() -> None:
    """By LLaVA's rule, written again: to the shortest of the chunks that are not full."""
    lengths = [(index, LENGTHS[index]) for index in range(24)]
    chunks, sums = [[] for _ in range(4)], [0.0] * 4
    for index, length in sorted(lengths, key=lambda pair: pair[1], reverse=True):
        shortest = sums.index(min(sums))
        chunks[shortest].append(index)
        sums[shortest] = sums[shortest] + length if len(chunks[shortest]) < 6 else float("inf")
    assert split_evenly(lengths, 4) == chunks
    tokens = [sum(LENGTHS[index] for index in chunk) for chunk in chunks]
    assert max(tokens) - min(tokens) <= 2
    (group,) = groups_of(24, 1)
    again = split_evenly([(i, LENGTHS[i]) for i in group], 6)
    assert [LENGTHS[i] for i in group] == [LENGTHS[i] for i in flat_(again)]  # samples of one length may change places


def test_packed_rows_of_real_samples() -> None:
    data = numbered(packing=True, max_length=220, batch_size=2)
    batches: list[Batch] = list(islice(data.train_dataloader(), 2))
    for batch in batches:
        assert samples_of([batch]) == sorted(f"train/{index}" for index in range(12))
        assert len(batch.input_ids) == 2 < len(batch.ids)
        assert batch.input_ids.shape[1] <= 220
        assert batch.llm_mask is None
        numbers = [int(number) for row in batch.sample_index for number in row.unique() if number >= 0]
        assert numbers == list(range(len(batch.ids)))
        for number, name in enumerate(batch.ids):
            mine = batch.sample_index == number
            images = int(name.split("/")[1]) % 3
            assert batch.position_ids[mine].tolist() == list(range(int(mine.sum())))
            assert int(batch.image_mask[mine].sum()) == K * images
            assert (batch.images_before - batch.images_hidden)[mine].max() == images


def test_batches_of_tokens_of_real_samples() -> None:
    data = numbered(batching="tokens", batch_tokens=300, max_length=100)
    batches: list[Batch] = []
    loader = iter(data.train_dataloader())
    while len(samples_of(batches)) < 12:
        batches.append(next(loader))
    assert samples_of(batches) == sorted(f"train/{index}" for index in range(12))
    assert max(batch.input_ids.numel() for batch in batches) <= 300
    assert len({len(batch.ids) for batch in batches}) > 1


def test_the_outline_is_read_instead_of_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    plain = Numbered.__getitem__
    monkeypatch.setattr(Numbered, "__getitem__", lambda self, index: read.append(index) or plain(self, index))
    monkeypatch.setattr(Numbered, "outline", plain, raising=False)
    data = numbered(batching="tokens", batch_tokens=300, max_length=100)
    next(iter(data.train_dataloader().batch_sampler))
    assert read == []


def test_a_bad_sample_leaves_its_row_to_the_others(tmp_path: Any) -> None:
    data = numbered(tmp_path, bad=(2, 7), packing=True, max_length=220, batch_size=2, max_bad_ratio=0.5)
    seen = samples_of(list(islice(data.train_dataloader(), 1)))
    assert seen == sorted(f"train/{index}" for index in range(12) if index not in (2, 7))


def test_a_budget_below_the_longest_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data.batch_tokens=99 is less than one row of data.max_length=100 tokens"):
        numbered(batching="tokens", batch_tokens=99, max_length=100)
