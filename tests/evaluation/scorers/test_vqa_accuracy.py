"""VQA's accuracy, against what the official script computes.

`vqa_normalization.json` has 300 generated texts with the result of processPunctuation and processDigitArticle of the
official vqaEval.py (as in Vision-CAIR/MiniGPT-4 @1e04b44, minigpt4/common/vqa_tools/vqa_eval.py), recorded once.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from vlm.evaluation.benchmarks.base import Question, as_sample
from vlm.evaluation.scorers.vqa_accuracy import VqaAccuracy, normalize

CASES = json.loads((Path(__file__).parent / "vqa_normalization.json").read_text(encoding="utf-8"))


def accuracy(prediction: str, answers: list[str]) -> float:
    return VqaAccuracy()(prediction, as_sample(Question(id="1", text="", references=tuple(answers))))


def test_normalization_is_that_of_the_official_script() -> None:
    assert len(CASES) == 300
    assert [[text, normalize(text)] for text, _ in CASES] == CASES


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Dogs", "dogs"),
        ("t-shirt", "t shirt"),
        ("t- shirt", "t shirt"),
        ("1,000 a-b", "1000 ab"),
        ("3.5 m.", "3.5 m"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("none", "0"),
        ("ten", "10"),
        ("somebody'd", "somebodyd"),
        ("shes", "shes"),
    ],
)
def test_normalization(text: str, expected: str) -> None:
    assert normalize(text) == expected


@pytest.mark.parametrize(("same", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_accuracy_by_the_number_of_people_who_said_so(same: int, expected: float) -> None:
    """The published values."""
    assert accuracy("Yes.", ["yes"] * same + ["no"] * (10 - same)) == pytest.approx(expected)


def test_accuracy_is_the_mean_over_nine_of_ten_people() -> None:
    rng = random.Random(0)
    words = ["a dog", "Dog", "dogs", "2", "two", "cat."]
    for _ in range(200):
        answers = [rng.choice(words) for _ in range(10)]
        prediction = rng.choice([*words, "bird"])
        scores = []
        for left_out in range(10):
            others = [normalize(answer) for number, answer in enumerate(answers) if number != left_out]
            scores.append(min(1, others.count(normalize(prediction)) / 3))
        assert accuracy(prediction, answers) == pytest.approx(sum(scores) / 10)


def test_a_single_reference_is_compared() -> None:
    assert accuracy("the dog", ["Dog"]) == 1
    assert accuracy("cat", ["Dog"]) == 0
