"""Scores of answers: how many there are, and what the best answer that is always the same would get."""

from __future__ import annotations

import json

import pytest

from tests.helpers.text import say
from vlm.evaluation.answers import MAX_CONSTANTS, constant_scores, mean_scores
from vlm.evaluation.scorers.exact_match import ExactMatch
from vlm.evaluation.scorers.token_f1 import TokenF1
from vlm.schema import Sample


def sample(*answers: str, type_: str | None = None) -> Sample:
    meta = {"references": json.dumps(answers)} if len(answers) > 1 else {}
    messages = [say("user", None, "What?"), say("assistant", answers[0])]
    return Sample(id="a", images=[], messages=messages, meta=meta | ({"type": type_} if type_ else {}))


def test_the_number_of_answers_stands_beside_their_score() -> None:
    records = [{"type": kind, "score": score} for kind, score in (("b", 1.0), (None, 0.0), ("a", 0.5), ("b", 0.0))]
    assert mean_scores(records, ExactMatch()) == {
        **{"exact_match": 0.375, "num_answers": 4},
        **{"accuracy/a": 0.5, "num_answers/a": 1},
        **{"accuracy/b": 0.5, "num_answers/b": 2},
    }
    assert mean_scores([], ExactMatch()) == {}


def test_the_best_constant_answer() -> None:
    """Of all questions "2" gets three of six; of each type its own best answer counts."""
    colors = [sample("red", type_="color"), sample("blue", "red", type_="color"), sample("2", type_="color")]
    counts = [sample("2", type_="count"), sample("2", type_="count"), sample("3", type_="count")]
    assert constant_scores([*colors, *counts], ExactMatch()) == pytest.approx(
        {"exact_match_constant": 3 / 6, "accuracy_constant/color": 2 / 3, "accuracy_constant/count": 2 / 3}
    )
    assert constant_scores([], ExactMatch()) == {}


def test_the_scorer_of_the_run_is_used() -> None:
    """By the F1 of words "a red star" gets 1 and 2/3; any other answer gets less."""
    samples = [sample("a red star"), sample("a red dog")]
    assert constant_scores(samples, TokenF1()) == pytest.approx({"token_f1_constant": (1 + 2 / 3) / 2})


def test_of_many_captions_the_most_frequent_are_tried() -> None:
    tried: set[str] = set()

    class Noting(ExactMatch):
        def __call__(self, prediction: str, sample: Sample) -> float:
            tried.add(prediction)
            return super().__call__(prediction, sample)

    samples = [sample(str(number)) for number in range(MAX_CONSTANTS + 50)] + [sample("149")]
    assert constant_scores(samples, Noting()) == {"exact_match_constant": 2 / len(samples)}
    assert len(tried) == MAX_CONSTANTS
    assert "149" in tried
