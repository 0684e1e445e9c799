"""Benchmarks as eval.py asks them: what is written, continued, refused and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.benchmarks import Squares, Table, asked
from tests.helpers.programs import read
from vlm.evaluation.prompts import Prompts, choose_shots, nearest_shots
from vlm.launch import benchmarks

WHO = benchmarks.Who(name="a table", identity={"name": "table"}, methods=("generate",))


def ask(out: Path, respondent: Table, *, against: Path | None = None, **options: Any) -> dict[str, Any]:
    benchmarks.ask(asked(**options), WHO, respondent, out, against=against, about={})
    return json.loads((out / "squares" / "results.json").read_text())


def test_results_have_counts_metrics_and_the_best_constant_answer(tmp_path: Path) -> None:
    results = ask(tmp_path, Table(["red", "red", "blue", "no"]))
    assert {key: results[key] for key in ("n", "num_groups", "num_failed", "num_without_reference")} == {
        "n": 4,
        "num_groups": 3,
        "num_failed": 0,
        "num_without_reference": 0,
    }
    found = {name: (metric["value"], metric["n"]) for name, metric in results["metrics"].items()}
    assert found == {"exact_match": (0.5, 4), "accuracy/color": (0.666667, 3), "accuracy/yes": (0, 1)}
    assert results["metrics"]["exact_match"]["low"] < 0.5 < results["metrics"]["exact_match"]["high"]
    best = {name: (each["value"], each["answer"]) for name, each in results["best_constant"].items()}
    assert best == {
        "exact_match": (0.25, "red"),
        "accuracy/color": (0.333333, "red"),
        "accuracy/yes": (1, "yes"),
    }
    # "red" for colors and "yes" for the other question are right in two of four.
    assert results["best_without_image"] == {"exact_match": 0.5, "accuracy/color": 0.333333, "accuracy/yes": 1}
    assert results["prompt"] == "<image>\n{question}"
    assert results["generation"] == {"method": "generate", "max_new_tokens": 16}
    records = read(tmp_path / "squares" / "samples.jsonl")
    assert [(r["id"], r["group"], r["prediction"], r["score"]) for r in records] == [
        ("color-a.png", "a.png", "red", 1),
        ("color-b.png", "b.png", "red", 0),
        ("color-c.png", "c.png", "blue", 1),
        ("yes", "a.png", "no", 0),
    ]


def test_a_killed_evaluation_asks_only_what_is_missing(tmp_path: Path) -> None:
    answers = ["red", "red", "blue", "no"]
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path, Table(answers, stop_after=2))
    file = tmp_path / "squares" / "answers-0.jsonl"
    file.write_text(file.read_text()[:-20])  # the last line is cut
    again = Table(answers)
    results = ask(tmp_path, again)
    assert again.asked == [1, 2, 3]
    assert results["metrics"] == ask(tmp_path / "whole", Table(answers))["metrics"]
    assert {path.name for path in file.parent.iterdir()} == {"results.json", "samples.jsonl"}
    finished = Table(answers)
    assert ask(tmp_path, finished, against=tmp_path / "whole")["against"]["metrics"]["exact_match"]["value"] == 0
    assert finished.asked == []


def test_stored_answers_are_scored_anew(tmp_path: Path) -> None:
    """With the references, types and scorer of today."""
    first = ask(tmp_path, Table(["red", "red", "blue", "no"]))
    file = tmp_path / "squares" / "samples.jsonl"
    stale = [{**record, "score": 0.5, "references": ["?"], "type": "old"} for record in read(file)]
    file.write_text("".join(json.dumps(record) + "\n" for record in stale))
    assert ask(tmp_path, Table([]))["metrics"] == first["metrics"]


def test_answers_of_other_options_are_not_taken(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path, Table(["red"] * 4, stop_after=2))
    other = Table(["red"] * 4)
    ask(tmp_path, other, prompt="{question} One word.")
    assert other.asked == [0, 1, 2, 3]


def test_results_of_other_options_are_not_overwritten(tmp_path: Path) -> None:
    ask(tmp_path, Table(["red"] * 4))
    mine = asked(max_new_tokens=3)
    with pytest.raises(ValueError, match=r"holds results of other options or another model; give out=<folder>"):
        benchmarks.check({"squares": mine}, WHO, tmp_path, replace=False)
    benchmarks.check({"squares": mine}, WHO, tmp_path, replace=True)
    benchmarks.check({"squares": asked()}, WHO, tmp_path, replace=False)


def test_against_compares_the_same_questions(tmp_path: Path) -> None:
    ask(tmp_path / "theirs", Table(["red", "red", "red", "no"]))
    results = ask(tmp_path / "mine", Table(["red", "green", "blue", "no"]), against=tmp_path / "theirs")
    found = results["against"]
    assert found["n"] == 4
    assert found["metrics"]["exact_match"]["value"] == 0.5
    assert found["metrics"]["accuracy/yes"] == {"value": 0, "low": 0, "high": 0, "p": 1}
    file = tmp_path / "theirs" / "squares" / "results.json"
    few = ask(tmp_path / "few", Table(["red", "green", "blue", "no"]), against=file, num_samples=2)
    assert few["against"]["n"] == 2
    with pytest.raises(ValueError, match=r"has no results of squares"):
        ask(tmp_path / "none", Table(["red"] * 4), against=tmp_path / "nowhere")


def test_samples_are_spread_evenly(tmp_path: Path) -> None:
    table = Table(["red"] * 4)
    assert ask(tmp_path, table, num_samples=2)["n"] == 2
    assert table.asked == [0, 2]


def test_demonstrations_stand_before_the_question_and_show_other_images() -> None:
    squares = Squares()
    shots = choose_shots(squares, squares, num_shots=2, shots="fixed", seed=0)
    for question, chosen in zip(squares.questions, shots, strict=True):
        assert not {squares.questions[number].images for number in chosen} & {question.images}
    prompts = Prompts(benchmark=squares, demonstrations=squares, shots=[[1, 2]] * 4)
    (sample,) = prompts.samples([3])
    roles = [(m["role"], "".join(piece.get("text", "<image>") for piece in m["content"])) for m in sample.messages]
    assert roles == [
        ("user", "<image>\nWhich color?"),
        ("assistant", "green"),
        ("user", "<image>\nWhich color?"),
        ("assistant", "blue"),
        ("user", "<image>\nIs it red?"),
    ]
    assert [image.getpixel((0, 0)) for image in sample.images] == [(0, 255, 0), (0, 0, 255), (255, 0, 0)]


def test_the_nearest_demonstration_comes_last() -> None:
    squares = Squares()
    vectors = torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0.1], [0, 0, 1.0], [1.0, 0, 0]])
    shots = nearest_shots(squares, squares, num_shots=2, questions=vectors, shown=vectors)
    assert shots[0] == [2, 1]
    assert shots[2] == [0, 1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_shots": 1}, "benchmark.squares.num_shots=1 needs questions with answers to show"),
        ({"shots": "best"}, "benchmark.squares.shots='best' must be one of fixed, random, nearest"),
        ({"num_samples": 0}, "benchmark.squares.num_samples=0 must be"),
        ({"prompt": "What?"}, "benchmark.squares.prompt='What?' has no {question}"),
        ({"colors": 3}, "there is no option benchmark.squares.colors"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"benchmark\.squares") as error:
        asked(**options)
    assert said in str(error.value)


def test_options_for_all_benchmarks_give_way_to_those_of_one() -> None:
    target = {"_target_": "tests.helpers.benchmarks.Squares"}
    cfg = {"num_samples": 3, "first": target, "second": {**target, "num_samples": 1}}
    found = benchmarks.bind_benchmarks(cfg, defaults={"max_new_tokens": 5})
    assert [len(each.indices) for each in found.values()] == [3, 1]
    assert [each.benchmark.max_new_tokens for each in found.values()] == [5, 5]
    with pytest.raises(ValueError, match=r"benchmark.num_samples belongs to no benchmark"):
        benchmarks.bind_benchmarks({"num_samples": 3}, defaults={})


def test_too_few_demonstrations() -> None:
    squares = Squares()
    with pytest.raises(ValueError, match=r"num_shots=3 needs .* 'color-a.png', and there are 2"):
        choose_shots(squares, squares, num_shots=3, shots="random", seed=0)


def test_a_shared_option_that_a_benchmark_has_too_reaches_it() -> None:
    target = {"_target_": "vlm.evaluation.benchmarks.shapes.Shapes", "num_scenes": 2, "image_size": 32}
    first, second = (
        benchmarks.bind_benchmarks({"shapes": {**target, "seed": seed}}, defaults={})["shapes"] for seed in (0, 1)
    )
    assert first.benchmark.questions[0].id == "shapes/0/val/0"
    assert second.benchmark.questions[0].id == "shapes/1/val/0"
