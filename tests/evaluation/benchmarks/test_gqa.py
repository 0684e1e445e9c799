"""GQA from a file of the published form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.benchmarks import figures, values, write_images
from vlm.evaluation.benchmarks.gqa import Gqa
from vlm.launch.benchmarks import bind_benchmarks


def record(image: str, question: str, answer: str, structural: str, semantic: str) -> dict[str, Any]:
    return {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "man (1)"}],
        "entailed": [],
        "equivalent": ["1"],
        "question": question,
        "imageId": image,
        "isBalanced": True,
        "groups": {"global": None, "local": "c-man"},
        "answer": answer,
        "semanticStr": "select: man (1)",
        "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
        "types": {"detailed": "existAttrC", "semantic": semantic, "structural": structural},
        "fullAnswer": f"It is {answer}.",
    }


RECORDS = {
    "201307251": record("n161313", "Is it overcast?", "no", "verify", "global"),
    "201640614": record("n235859", "Who is wearing the dress?", "woman", "query", "rel"),
    "202225914": record("n161313", "Which color is the baseball bat?", "light blue", "query", "attr"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "testdev_balanced_questions.json").write_text(json.dumps(RECORDS))
    write_images(tmp_path / "images", "n161313.jpg", "n235859.jpg")
    return tmp_path


def options(folder: Path) -> dict[str, Any]:
    return {"annotations": str(folder / "testdev_balanced_questions.json"), "images": str(folder / "images")}


def test_questions(folder: Path) -> None:
    benchmark = Gqa(**options(folder))
    assert [(q.id, q.text, q.references, q.images, q.type) for q in benchmark.questions] == [
        ("201307251", "Is it overcast?", ("no",), ("n161313.jpg",), "verify"),
        ("201640614", "Who is wearing the dress?", ("woman",), ("n235859.jpg",), "query"),
        ("202225914", "Which color is the baseball bat?", ("light blue",), ("n161313.jpg",), "query"),
    ]
    assert [benchmark.image(question.images[0]).size for question in benchmark.questions] == [(8, 8)] * 3
    assert [question.type for question in Gqa(**options(folder), types="semantic").questions] == [
        "global",
        "rel",
        "attr",
    ]


def test_metrics(folder: Path) -> None:
    found = values(Gqa(**options(folder)), {"201307251": " No.", "201640614": "a woman", "202225914": "Light  blue"})
    assert found == {"exact_match": pytest.approx(2 / 3, abs=1e-6), "accuracy/query": 0.5, "accuracy/verify": 1}


def test_questions_without_answers_are_asked_and_not_scored(folder: Path) -> None:
    unanswered = {key: {name: record[name] for name in ("question", "imageId")} for key, record in RECORDS.items()}
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(unanswered))
    benchmark = Gqa(**options(folder))
    found = figures(benchmark, {"201307251": "no"})
    assert (found["n"], found["num_without_reference"], found["metrics"]) == (0, 1, {})


def bound(folder: Path) -> None:
    bind_benchmarks({"gqa": {"_target_": "vlm.evaluation.benchmarks.gqa.Gqa", **options(folder)}}, defaults={})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([RECORDS["201307251"]], "holds a list where an object is published"),
        ({"1": 3}, "testdev_balanced_questions.json[1] is not an object"),
        ({"1": {**RECORDS["201307251"], "imageId": ""}}, "[1] has '' as 'imageId'"),
        (
            {"1": {**RECORDS["201307251"], "types": {"semantic": "obj"}}},
            "[1][types] has no 'structural' but 'semantic'",
        ),
    ],
)
def test_other_records_are_refused(folder: Path, content: Any, said: str) -> None:
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"testdev_balanced") as error:
        bound(folder)
    assert said in str(error.value)


def test_a_missing_file_names_the_option_and_the_source(folder: Path) -> None:
    (folder / "testdev_balanced_questions.json").unlink()
    with pytest.raises(
        ValueError, match=r"set benchmark.gqa.annotations=.*; https://cs.stanford.edu/people/dorarad/gqa"
    ):
        bound(folder)
