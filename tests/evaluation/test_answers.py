"""Scores of answers: how many there are, their intervals, and what the best answers without the image would get."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.programs import QUICK, train
from tests.helpers.text import say
from vlm.evaluation.answers import MAX_CONSTANTS, mean_scores, scores_without_image
from vlm.evaluation.intervals import wilson
from vlm.evaluation.scorers.base import Scorer
from vlm.evaluation.scorers.exact_match import ExactMatch
from vlm.evaluation.scorers.token_f1 import TokenF1
from vlm.schema import Sample


def sample(*answers: str, type_: str | None = None, text: str = "What?", id_: str = "a") -> Sample:
    meta = {"references": json.dumps(answers)} if len(answers) > 1 else {}
    messages = [say("user", None, text), say("assistant", answers[0])]
    return Sample(id=id_, images=[], messages=messages, meta=meta | ({"type": type_} if type_ else {}))


def test_the_number_of_answers_stands_beside_their_score() -> None:
    records = [{"type": kind, "score": score} for kind, score in (("b", 1.0), (None, 0.0), ("a", 0.5), ("b", 0.0))]
    found = mean_scores(records, ExactMatch())
    bounds = {
        name: (found.pop(name), found.pop(name.replace("_low", "_high"))) for name in list(found) if "_low" in name
    }
    assert found == {
        **{"exact_match": 0.375, "num_answers": 4},
        **{"accuracy/a": 0.5, "num_answers/a": 1},
        **{"accuracy/b": 0.5, "num_answers/b": 2},
    }
    assert bounds.keys() == {"exact_match_low", "accuracy_low/a", "accuracy_low/b"}
    assert bounds["accuracy_low/b"] == pytest.approx((0.0945, 0.9055), abs=1e-4)
    assert mean_scores([], ExactMatch()) == {}


def constants(samples: list[Sample], scorer: Scorer) -> dict[str, float]:
    return {name: value for name, value in scores_without_image(samples, scorer).items() if "_constant" in name}


def no_image(samples: list[Sample]) -> dict[str, float]:
    found = scores_without_image(samples, ExactMatch())
    return {name.replace("_no_image", ""): value for name, value in found.items() if "_no_image" in name}


def test_without_the_image_each_type_has_its_best_answer() -> None:
    """One answer gets three of six; "red" for colors and "2" for counts get four."""
    colors = [sample("red", type_="color"), sample("red", type_="color"), sample("blue", type_="color")]
    counts = [sample("2", type_="count"), sample("2", type_="count"), sample("3", type_="count")]
    assert no_image([*colors, *counts]) == pytest.approx(
        {"exact_match": 4 / 6, "accuracy/color": 2 / 3, "accuracy/count": 2 / 3}
    )


def test_without_the_image_the_words_of_the_question_count() -> None:
    """Any one answer gets half; the answers of the other half of the questions get all."""
    samples = [sample(*pair, text=f"The {pair[0]} one?", id_=str(n)) for n, pair in enumerate([("a",), ("b",)] * 20)]
    assert no_image(samples) == {"exact_match": 1}
    assert constants(samples, ExactMatch()) == {"exact_match_constant": 0.5}


def test_the_source_of_a_mixture_is_the_type_of_a_sample_without_one() -> None:
    one, other = sample("a"), sample("b", type_="count")
    mixed = [replace(each, meta={**each.meta, "source": "stamps"}) for each in (one, other)]
    assert no_image(mixed).keys() == {"exact_match", "accuracy/count", "accuracy/stamps"}


def test_a_question_is_no_evidence_for_its_own_answer() -> None:
    """Each question has words of its own, which say nothing: then one answer to all is best."""
    samples = [sample("ab"[n % 3 == 0], text=f"Is {n} there?", id_=str(n)) for n in range(60)]
    assert no_image(samples) == {"exact_match": pytest.approx(2 / 3)}


def test_wilsons_interval() -> None:
    """Of no right answer among 10, published tables have 0.278; the others are computed by hand."""
    assert wilson(0.844, 128) == pytest.approx((0.7713, 0.8968), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.27754), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.72246, 1.0), abs=1e-4)


def test_the_best_constant_answer() -> None:
    """Of all questions "2" gets three of six; of each type its own best answer counts."""
    colors = [sample("red", type_="color"), sample("blue", "red", type_="color"), sample("2", type_="color")]
    counts = [sample("2", type_="count"), sample("2", type_="count"), sample("3", type_="count")]
    assert constants([*colors, *counts], ExactMatch()) == pytest.approx(
        {"exact_match_constant": 3 / 6, "accuracy_constant/color": 2 / 3, "accuracy_constant/count": 2 / 3}
    )
    assert scores_without_image([], ExactMatch()) == {}


def test_the_scorer_of_the_run_is_used() -> None:
    """By the F1 of words "a red star" gets 1 and 2/3; any other answer gets less."""
    samples = [sample("a red star"), sample("a red dog")]
    assert constants(samples, TokenF1()) == pytest.approx({"token_f1_constant": (1 + 2 / 3) / 2})


def test_of_many_captions_the_most_frequent_are_tried() -> None:
    tried: set[str] = set()

    class Noting(ExactMatch):
        def __call__(self, prediction: str, sample: Sample) -> float:
            tried.add(prediction)
            return super().__call__(prediction, sample)

    samples = [sample(str(number)) for number in range(MAX_CONSTANTS + 50)] + [sample("149")]
    assert constants(samples, Noting()) == {"exact_match_constant": 2 / len(samples)}
    assert len(tried) <= MAX_CONSTANTS + 1  # and what the other half has most often
    assert "149" in tried


def test_answers_at_every_validation(tmp_path: Path) -> None:
    options = ["trainer.max_steps=4", "evaluators.answers.at=validation", f"run_dir={tmp_path / 'run'}"]
    assert train(*(line for line in QUICK if line != "trainer.max_steps=2"), *options) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scored = [line for line in lines if "val/exact_match" in line]
    assert [line["step"] for line in scored] == [2, 4]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["val/num_answers"] == scored[-1]["val/num_answers"] == 2
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len({sample["id"] for sample in samples}) == len(samples) == 2
