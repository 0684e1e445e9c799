"""Words for colors that only demonstrations tell: what a sample shows, and demonstrations of the question's task."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from vlm.data.sources.names import INITIALS, Names
from vlm.data.sources.shapes_scene import COLORS
from vlm.evaluation.benchmarks import names
from vlm.evaluation.prompts import Prompts, choose_shots
from vlm.schema import Sample


def words(sample: Sample) -> list[str]:
    return [m["content"][0]["text"] for m in sample.messages if m["role"] == "assistant"]


def color(image: Any) -> tuple[int, int, int]:
    """The most frequent one that is not the background."""
    found = Counter(image.get_flattened_data() if hasattr(image, "get_flattened_data") else image.getdata())
    return next(value for value, _ in found.most_common() if value != (250, 250, 250))


@pytest.mark.parametrize("num_names", [2, 4])
def test_a_word_is_a_color_within_a_sample(num_names: int) -> None:
    source = Names(split="train", num_names=num_names, image_size=32)
    mappings = []
    for index in range(12):
        sample = source[index]
        pairs = list(zip(map(color, sample.images), words(sample), strict=True))
        assert len(pairs) == 9
        assert len(set(pairs)) == len({word for _, word in pairs}) == num_names
        assert set(Counter(word for _, word in pairs[:-1]).values()) == {8 // num_names}
        assert {value for value, _ in pairs} <= set(COLORS.values())
        mappings.append(frozenset(pairs))
    assert len(set(mappings)) == 12
    assert source[3].messages == source[3].messages


def test_the_words_of_validation_are_never_trained() -> None:
    train, val = (Names(split=split) for split in ("train", "val"))
    assert not set(train.words) & set(val.words)
    assert len(val.words) == 18
    assert len({word for index in range(99) for word in words(val[index])}) > 10


def test_a_task_of_several_samples() -> None:
    source = Names(split="val", num_shots=0, num_tasks=3, image_size=32)
    tasks: dict[str, set[tuple[Any, str]]] = {}
    for index in range(30):
        sample = source[index]
        tasks.setdefault(sample.meta["task"], set()).add((color(sample.images[0]), words(sample)[0]))
    assert [len(pairs) for pairs in tasks.values()] == [2, 2, 2]
    with pytest.raises(ValueError, match=r"data.num_names=8 is more than the 7 colors; set it lower"):
        Names(split="val", num_names=8)


def test_the_same_task_as_text() -> None:
    """The letter of a color is in the place of its image."""
    options: dict[str, Any] = {"split": "train", "letters": True, "image_size": 32}
    for index in range(6):
        drawn, written = Names(**options)[index], Names(**options, as_text=True)[index]
        assert (len(drawn.images), written.num_images) == (9, 0)
        assert words(drawn) == words(written)
        letters = [m["content"][0]["text"] for m in written.messages if m["role"] == "user"]
        named = {COLORS[name]: letter for name, letter in INITIALS.items()}
        assert letters == [named[color(image)] for image in drawn.images]
        assert {len(word) for word in words(drawn)} == {1}


@pytest.fixture(scope="module")
def benchmark() -> names.Names:
    return names.Names(num_tasks=4, num_questions=64, image_size=32)


def test_demonstrations_are_of_the_questions_task(benchmark: names.Names) -> None:
    shots = choose_shots(benchmark, benchmark, num_shots=4, shots="random", seed=0)
    for question, chosen in zip(benchmark.questions, shots, strict=True):
        shown = [benchmark.questions[number] for number in chosen]
        assert {each.meta["task"] for each in shown} == {question.meta["task"]}
        assert question.id not in {each.id for each in shown}
    with pytest.raises(ValueError, match=r"num_shots=16 needs .* and there are 15"):
        choose_shots(benchmark, benchmark, num_shots=16, shots="random", seed=0)


def test_controls_of_demonstrations(benchmark: names.Names) -> None:
    """Shuffled answers are those of the same demonstrations; images can be left out."""
    shots = choose_shots(benchmark, benchmark, num_shots=4, shots="random", seed=0)
    options: dict[str, Any] = {"benchmark": benchmark, "demonstrations": benchmark, "shots": shots}
    right, shuffled, blind = (
        Prompts(**options, **more) for more in ({}, {"shuffled_answers": True}, {"without_images": True})
    )
    differ = 0
    for index in range(len(benchmark.questions)):
        one, other = right.outline(index), shuffled.outline(index)
        assert sorted(words(one)) == sorted(words(other))
        differ += words(one) != words(other)
        assert replace(one, messages=[]) == replace(other, messages=[])
    assert 20 < differ < 64
    assert (right.outline(0).num_images, blind.outline(0).num_images) == (5, 1)
    assert words(blind.outline(0)) == words(right.outline(0))
    (sample,), (bare,) = right.samples([0]), blind.samples([0])
    assert isinstance(sample, Sample)
    assert isinstance(bare, Sample)
    assert (len(sample.images), len(bare.images)) == (5, 1)
    assert sample.images[-1] == bare.images[0]
