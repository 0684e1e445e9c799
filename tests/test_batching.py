"""Which samples share a batch: every one once an epoch, within the budget, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest

from tests.test_datamodule import K, Numbered, module
from vlm.data import batching
from vlm.data.batching import Batches, by_tokens, pack
from vlm.schema import Batch

LENGTHS = [3 + (7 * index) % 29 for index in range(100)]  # of 100 samples: 3 to 31 tokens


class Sized:
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


def batches_of(source: Any = None, **options: Any) -> Batches:
    options = {"batching": "samples", "batch_size": 8, "batch_tokens": 64, "row_tokens": None, "seed": 0} | options
    return Batches(source or Sized(), length=LENGTHS.__getitem__, **options)


def flat(batches: Any) -> list[int]:
    return list(chain.from_iterable(chain.from_iterable(batches)))


def test_batches_of_samples_read_each_once_in_another_order_every_epoch() -> None:
    batches = batches_of()
    first, second = list(batches), list(batches)
    assert len(batches) == len(first) == len(second) == 12
    assert all(len(batch) == 8 and all(len(row) == 1 for row in batch) for batch in first)
    assert len(set(flat(first))) == 96
    assert flat(first) != flat(second)
    assert flat(first) == flat(batches_of())
    assert flat(first) != flat(batches_of(seed=1))


def test_to_overfit_an_epoch_is_the_one_before() -> None:
    batches = batches_of(same_every_epoch=True)
    assert list(batches) == list(batches)


@pytest.mark.parametrize(
    "options", [{}, {"batching": "tokens"}, {"row_tokens": 32}, {"batching": "tokens", "row_tokens": 32}]
)
def test_ranks_share_what_one_rank_would_read(options: dict[str, Any]) -> None:
    alone = list(batches_of(batch_size=4, **options))
    ranks = [list(batches_of(batch_size=4, rank=rank, num_ranks=3, **options)) for rank in range(3)]
    turns = list(chain.from_iterable(zip(*ranks, strict=True)))
    assert turns == alone[: len(turns)]
    assert 0 <= len(alone) - len(turns) < 3


def test_batches_of_tokens_keep_to_the_budget_and_pad_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "WINDOW", 40)
    batches = list(batches_of(batching="tokens"))
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
    rows = pack(dict(enumerate(LENGTHS)), 64)
    sums = [sum(LENGTHS[index] for index in row) for row in rows]
    assert sorted(chain.from_iterable(rows)) == list(range(100))
    assert max(sums) <= 64
    assert len(rows) == -(-sum(LENGTHS) // 64), "as few rows as can be"


def test_packed_batches_have_batch_size_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "WINDOW", 40)
    batches = list(batches_of(row_tokens=64, batch_size=4))
    assert all(len(batch) == 4 for batch in batches)
    assert len(set(flat(batches))) == len(flat(batches)) > 80


def test_the_number_of_batches_is_unknown_where_it_depends_on_lengths() -> None:
    for options in ({"batching": "tokens"}, {"row_tokens": 64}):
        with pytest.raises(TypeError, match="known only at its end"):
            len(batches_of(**options))


def test_a_sources_own_order_is_kept() -> None:
    batches = batches_of(Ordered(), batch_size=2, seed=3)
    assert list(batches) == [[[5], [9]], [[5], [20]], [[3], [7]]]
    assert list(batches)[1] == [[5], [21]]
    assert len(batches) == 3


def samples_of(batches: Any) -> list[str]:
    return sorted(sample for batch in batches for sample in batch.ids)


def test_packed_rows_of_real_samples() -> None:
    data = module(packing=True, max_length=220, batch_size=2)
    batches: list[Batch] = list(data.train_dataloader())
    assert len(samples_of(batches)) == len(set(samples_of(batches))) >= 8
    for batch in batches:
        assert len(batch.input_ids) == 2 < len(batch.ids)
        assert batch.input_ids.shape[1] <= 220
        assert batch.llm_mask is None
        numbers = [int(number) for row in batch.sample_index for number in row.unique() if number >= 0]
        assert numbers == list(range(len(batch.ids)))
        for number, name in enumerate(batch.ids):
            mine = batch.sample_index == number
            images = int(name.split("/")[1]) % 3
            assert batch.positions[mine].tolist() == list(range(int(mine.sum())))
            assert int(batch.image_mask[mine].sum()) == K * images
            assert (batch.images_before - batch.images_hidden)[mine].max() == images


def test_batches_of_tokens_of_real_samples() -> None:
    data = module(batching="tokens", batch_tokens=300, max_length=100)
    batches: list[Batch] = list(data.train_dataloader())
    assert samples_of(batches) == sorted(f"train/{index}" for index in range(12))
    assert max(batch.input_ids.numel() for batch in batches) <= 300
    assert len({len(batch.ids) for batch in batches}) > 1


def test_the_outline_is_read_instead_of_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    plain = Numbered.__getitem__
    monkeypatch.setattr(Numbered, "__getitem__", lambda self, index: read.append(index) or plain(self, index))
    monkeypatch.setattr(Numbered, "outline", plain, raising=False)
    data = module(batching="tokens", batch_tokens=300, max_length=100)
    list(iter(data.train_dataloader().batch_sampler))
    assert read == []


def test_a_bad_sample_leaves_its_row_to_the_others(tmp_path: Any) -> None:
    data = module(tmp_path, bad=(2, 7), packing=True, max_length=220, batch_size=2, max_bad_share=0.5)
    seen = samples_of(data.train_dataloader())
    assert len(seen) == len(set(seen)) >= 6
    assert not {"train/2", "train/7"} & set(seen)


def test_a_budget_below_the_longest_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data.batch_tokens=99 does not hold a row of data.max_length=100 tokens"):
        module(batching="tokens", batch_tokens=99, max_length=100)


def test_a_batch_larger_than_the_split_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has 12 samples, fewer than the 16 x 1 of a step; set data.batch_size=12"):
        module(batch_size=16).train_dataloader()
