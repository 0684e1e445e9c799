"""VQAv2, OK-VQA, TextVQA and VizWiz from files of the published forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.benchmarks import figures, values, write_images
from vlm.evaluation.benchmarks.vqa import Vqa
from vlm.launch.benchmarks import bind_benchmarks

QUESTIONS = [
    {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
    {"image_id": 262148, "question": "Is he old?", "question_id": 262148001},
    {"image_id": 393225, "question": "How many dogs?", "question_id": 393225000},
]
ANSWERS = [
    ("none of the above", "other", ["down"] * 8 + ["at table", "skateboard"]),
    ("is", "yes/no", ["no"] * 2 + ["yes"] * 8),
    ("how many", "number", ["2"] * 5 + ["two"] * 5),
]


def people(answers: list[str]) -> list[dict[str, Any]]:
    return [
        {"answer": answer, "answer_confidence": "yes", "answer_id": number}
        for number, answer in enumerate(answers, start=1)
    ]


def annotated(question: dict[str, Any], kind: str, answer_type: str, answers: list[str]) -> dict[str, Any]:
    return {
        "question_type": kind,
        "multiple_choice_answer": answers[0],
        "answers": people(answers),
        "image_id": question["image_id"],
        "answer_type": answer_type,
        "question_id": question["question_id"],
    }


@pytest.fixture
def vqa(tmp_path: Path) -> dict[str, Any]:
    """The options for VQAv2's files, the annotations in another order than the questions."""
    about = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}, "data_subtype": "val2014"}
    records = [annotated(question, *answer) for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
    (tmp_path / "questions.json").write_text(json.dumps({**about, "questions": QUESTIONS}))
    (tmp_path / "annotations.json").write_text(json.dumps({**about, "annotations": records[::-1]}))
    write_images(tmp_path / "val2014", "COCO_val2014_000000262148.jpg", "COCO_val2014_000000393225.jpg")
    paths = {"questions": "questions.json", "annotations": "annotations.json", "images": "val2014"}
    return {key: str(tmp_path / path) for key, path in paths.items()}


def test_questions_of_vqa(vqa: dict[str, Any]) -> None:
    benchmark = Vqa(**vqa)
    assert [(question.id, question.text, question.type) for question in benchmark.questions] == [
        ("262148000", "Where is he looking?", "other"),
        ("262148001", "Is he old?", "yes/no"),
        ("393225000", "How many dogs?", "number"),
    ]
    assert [question.references for question in benchmark.questions] == [tuple(answers) for _, _, answers in ANSWERS]
    assert benchmark.questions[1].images == ("COCO_val2014_000000262148.jpg",)
    assert benchmark.questions[0].cluster == benchmark.questions[1].cluster
    assert [benchmark.image(question.images[0]).size for question in benchmark.questions] == [(8, 8)] * 3
    assert [benchmark.answer(question) for question in benchmark.questions] == ["down", "yes", "2"]
    by_question = Vqa(**vqa, types="question_type").questions
    assert [question.type for question in by_question] == ["none of the above", "is", "how many"]


def test_metrics(vqa: dict[str, Any]) -> None:
    """By hand: one of ten said "at table", two said no, and all said two."""
    answers = {"262148000": "At the table", "262148001": "No", "393225000": "two"}
    benchmark = Vqa(**vqa)
    assert values(benchmark, answers) == {
        "vqa_accuracy": pytest.approx((0.3 + 0.6 + 1) / 3, abs=1e-6),
        "vqa_accuracy/other": pytest.approx(0.3),
        "vqa_accuracy/yes/no": pytest.approx(0.6),
        "vqa_accuracy/number": 1,
    }
    found = figures(benchmark, answers)
    assert found["metrics"]["vqa_accuracy/yes/no"]["n"] == 1
    assert found["num_groups"] == 2
    assert found["best_constant"]["vqa_accuracy/yes/no"] == {"value": 1, "answer": "yes"}
    assert found["best_constant"]["vqa_accuracy"]["answer"] == "2"


def test_questions_of_a_test_split_have_no_references(vqa: dict[str, Any]) -> None:
    benchmark = Vqa(**{**vqa, "annotations": None})
    assert figures(benchmark, {"262148000": "down"})["num_without_reference"] == 1


def test_textvqa(vqa: dict[str, Any], tmp_path: Path) -> None:
    record = {
        "question": "what is the brand of this camera?",
        "image_id": "003a8ae2ef43b901",
        "image_classes": ["Cassette deck"],
        "question_tokens": ["what"],
        "answers": ["nous les gosses", "dakota", *["dakota digital"] * 8],
        "question_id": 34602,
        "set_name": "val",
    }
    document = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": [record]}
    (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps(document))
    write_images(tmp_path / "train_images", "003a8ae2ef43b901.jpg")
    options = {"questions": str(tmp_path / "TextVQA_0.5.1_val.json"), "images": str(tmp_path / "train_images")}
    benchmark = Vqa(**options)
    (question,) = benchmark.questions
    assert (question.id, question.type, question.references) == ("34602", None, tuple(record["answers"]))
    assert benchmark.image(question.images[0]).size == (8, 8)
    assert values(benchmark, {"34602": "Dakota"}) == {"vqa_accuracy": pytest.approx(0.3)}
    with pytest.raises(ValueError, match=r"has its own answers; set benchmark.vqa.annotations=null"):
        bound({**options, "annotations": vqa["annotations"]})


def test_vizwiz(tmp_path: Path) -> None:
    records = [
        {"answers": people(["basil"] * 9 + ["unanswerable"]), "answer_type": "other", "answerable": 1},
        {"answers": people(["unanswerable"] * 10), "answer_type": "unanswerable", "answerable": 0},
        {},  # of the test split
    ]
    for number, record in enumerate(records):
        record |= {"image": f"VizWiz_val_{number:08d}.jpg", "question": "Can you tell me what this is please?"}
    (tmp_path / "val.json").write_text(json.dumps(records))
    write_images(tmp_path, *(record["image"] for record in records))
    benchmark = Vqa(questions=str(tmp_path / "val.json"), images=str(tmp_path))
    assert [(question.id, question.type, len(question.references)) for question in benchmark.questions] == [
        ("VizWiz_val_00000000.jpg", "other", 10),
        ("VizWiz_val_00000001.jpg", "unanswerable", 10),
        ("VizWiz_val_00000002.jpg", None, 0),
    ]
    said = {question.id: "Unanswerable" for question in benchmark.questions}
    assert values(benchmark, said) == {
        "vqa_accuracy": pytest.approx(0.65),
        "vqa_accuracy/other": pytest.approx(0.3),
        "vqa_accuracy/unanswerable": 1,
    }


def bound(options: dict[str, Any]) -> None:
    bind_benchmarks({"vqa": {"_target_": "vlm.evaluation.benchmarks.vqa.Vqa", **options}}, defaults={})


def test_annotations_of_another_split_are_refused(vqa: dict[str, Any]) -> None:
    file = Path(vqa["annotations"])
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "annotations": document["annotations"][:2]}))
    with pytest.raises(ValueError, match=r"question_id 262148000, which the 2 annotations do not have"):
        bound(vqa)


@pytest.mark.parametrize("answers", [None, [], "yes", [{"answer": None}]])
def test_records_without_answers_are_refused(vqa: dict[str, Any], answers: Any) -> None:
    file = Path(vqa["annotations"])
    document = json.loads(file.read_text())
    document["annotations"][1]["answers"] = answers
    file.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"annotations.json\[1\] has no list of answers"):
        bound(vqa)


def test_missing_files_name_the_option_and_the_source(vqa: dict[str, Any]) -> None:
    for key, path in vqa.items():
        with pytest.raises(ValueError, match=rf"no (file|folder) .*set benchmark.vqa.{key}=.*; https://visualqa.org"):
            bound({**vqa, key: f"{path}.old"})
