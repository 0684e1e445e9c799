"""Sources mixed: their shares, their rounds over epochs, and how they are written."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from tests.helpers.sources import Numbers, mixture
from vlm import config
from vlm.data.sources.mixture import Mixture
from vlm.launch.entry import CONF
from vlm.schema import BadSample


class Backwards(Numbers):
    def order(self, epoch: int, *, seed: int) -> range:
        return range(self.size - 1, -1, -1)


def drawn(source: Mixture, epochs: int, seed: int = 0) -> list[Counter[int]]:
    return [Counter(map(int, source.order(epoch, seed=seed))) for epoch in range(epochs)]


def of(counts: Counter[int], first: int, last: int) -> int:
    return sum(counts[index] for index in range(first, last))


def test_samples_are_concatenated_and_say_where_they_come_from() -> None:
    source = mixture()
    assert len(source) == 40
    assert [source[index].id for index in (0, 29, 30, 39)] == ["a/train/0", "a/train/29", "b/train/0", "b/train/9"]
    assert source[30].meta == {"n": "0", "source": "b"}
    assert source.outline(31) == source[31]
    with pytest.raises(BadSample, match=r"^source 'b': sample '6' is a seventh$"):
        source[36]
    with pytest.raises(IndexError):
        source[40]
    val = mixture(split="val")
    assert [val[index].id for index in range(4)] == ["a/val/0", "a/val/1", "a/val/2", "b/val/0"]


def test_by_size_an_epoch_reads_everything_once() -> None:
    orders = [mixture().order(epoch, seed=3) for epoch in (0, 1)]
    assert [sorted(order) for order in orders] == [list(range(40))] * 2
    assert list(orders[0]) != list(orders[1])
    assert list(orders[0]) == list(mixture().order(0, seed=3))
    assert list(orders[0]) != list(mixture().order(0, seed=4))
    assert {index >= 30 for index in orders[0][:8]} == {True, False}  # the sources are mixed


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"weights": {"a": 1, "b": 3}}, 0.25),
        ({"weights": {"b": 1, "a": 0}}, 0.0),
        ({"temperature": 2.0}, 3**0.5 / (3**0.5 + 1)),
        ({"temperature": 1e9}, 0.5),
    ],
)
def test_shares(options: dict[str, Any], share: float) -> None:
    for counts in drawn(mixture(**options, num_samples=100), 3):
        assert counts.total() == 100
        assert abs(of(counts, 0, 30) - 100 * share) <= 1


def test_a_source_is_exhausted_before_a_sample_comes_again_over_epochs_too() -> None:
    epochs = drawn(mixture(weights={"a": 1, "b": 1}, num_samples=25), 12)
    for until in range(1, 13):
        total = sum(epochs[:until], Counter())
        for first, last in ((0, 30), (30, 40)):
            times = [total[index] for index in range(first, last)]
            assert max(times) - min(times) <= 1
    assert abs(of(total, 0, 30) - 150) <= 12  # the odd sample of an epoch goes to either


def test_a_source_keeps_its_own_order() -> None:
    order = mixture(kind=Backwards).order(1, seed=0)
    assert [int(index) for index in order if index >= 30] == list(range(39, 29, -1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"a": 1}}, r"data\.weights has the keys a and data\.sources a, b; give every source a weight"),
        ({"weights": {"a": 1, "b": -1}}, r"must be at least 0, and one of them above 0"),
        ({"weights": {"a": 0, "b": 0}}, r"must be at least 0"),
        ({"temperature": 0.0}, r"data\.temperature=0\.0 must be above 0"),
        ({"num_samples": 0}, r"data\.num_samples=0 must be at least 1"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture(**options)


def test_a_name_that_reads_like_a_loss_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.sources has the name 'b_loss', .* choose another name"):
        Mixture(split="train", sources={name: partial(Numbers, split="train", size=9) for name in ("a", "b_loss")})


def settings(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(CONF, version_base="1.3"):
        return config.plain(compose("train", ["llm=tiny", "encoder=tiny", "run_dir=x", "data=mixture", *overrides]))


def test_the_shipped_mixture_shows_captions_and_questions() -> None:
    _, options = config.split_data(settings("data.weights={captions: 1, questions: 3}")["data"])
    source = config.bind_source("data", options)(split="train")
    assert len(source) == 1_000_000
    assert source[0].meta == {"type": "caption", "source": "captions"}
    assert source[500_000].meta["source"] == "questions"
    assert source[500_000].meta["type"] != "caption"
    assert list(source.ratios) == [0.25, 0.75]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "+data.sources.captions.languages=en",
            "data.sources.captions.languages; did you mean language? choose one of",
        ),
        ("data.sources.captions.num_train=x", "data.sources.captions.num_train='x' must be a whole number from 1"),
        ("data.sources.captions._target_=os.system", "data.sources.captions._target_=os.system is not allowed"),
        ("+data.sources.more={}", "data.sources.more._target_=None is not allowed"),
        ("+data.weight={}", "data.weight; did you mean weights?"),
        ("data.weights={captions: much}", "data.weights.captions='much' must be a number from 0 to"),
    ],
)
def test_a_slip_in_a_mixed_source(override: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"^data\.|^there is no option data\.") as caught:
        config.bind_source("data", config.split_data(settings(override)["data"])[1])
    assert said in str(caught.value)
