"""Questions of one's own: without an answer they are asked and not scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.benchmarks import Table
from tests.helpers.programs import read
from vlm.evaluation.benchmarks.questions import Questions
from vlm.launch import benchmarks

WHO = benchmarks.Who(name="a table", identity={}, methods=("generate",))


def write(folder: Path, *records: Any) -> Path:
    Image.new("RGB", (8, 8), (255, 0, 0)).save(folder / "red.png")
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def ask(file: Path, *answers: str) -> dict[str, Any]:
    target = {"_target_": "vlm.evaluation.benchmarks.questions.Questions"}
    asked = benchmarks.bind_benchmarks({"questions": {**target, "annotations": str(file)}}, defaults={})["questions"]
    benchmarks.ask(asked, WHO, Table(answers), file.parent / "out", against=None, about={})
    return json.loads((file.parent / "out" / "questions" / "results.json").read_text())


def test_one_question_without_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "question.json"
    file.write_text(json.dumps({"image": "red.png", "question": "Which color?"}))
    results = ask(file, "crimson")
    assert (results["n"], results["num_without_reference"], results["metrics"]) == (0, 1, {})
    assert results["note"] == (
        "no answer is scored, because no question has a reference; samples.jsonl has the predictions"
    )
    (record,) = read(tmp_path / "out" / "questions" / "samples.jsonl")
    assert (record["prompt"], record["prediction"], record["references"]) == ("Which color?", "crimson", [])
    assert "score" not in record
    printed = capsys.readouterr().out
    assert results["note"] in printed
    assert "crimson" in printed


def test_every_layout_with_and_without_an_answer(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        {"id": 1, "image": "red.png", "question": "Which color?", "answer": "red"},
        {"id": 2, "image": "red.png", "question": "Which shape?"},
        {"id": 3, "messages": [{"role": "user", "content": "Hello"}]},
        {"id": 4, "conversations": [{"from": "human", "value": "<image>\nA?"}, {"from": "gpt", "value": "B"}]}
        | {"image": "red.png"},
        {"id": 5, "image": "red.png", "messages": [{"role": "user", "content": "<image>A?"}]},
    )
    benchmark = Questions(annotations=str(file))
    assert [(q.id, q.references, len(q.images)) for q in benchmark.questions] == [
        ("1", ("red",), 1),
        ("2", (), 1),
        ("3", (), 0),
        ("4", ("B",), 1),
        ("5", (), 1),
    ]
    assert benchmark.image(benchmark.questions[4].images[0]).getpixel((0, 0)) == (255, 0, 0)
    assert [m["role"] for m in benchmark.messages(benchmark.questions[2])] == ["user"]
    results = ask(file, "red", "x", "x", "no", "x")
    assert (results["n"], results["num_without_reference"]) == (2, 3)
    assert results["metrics"]["exact_match"]["value"] == 0.5


def test_a_record_that_cannot_be_read(tmp_path: Path) -> None:
    file = write(tmp_path, {"question": "Which?", "image": "red.png", "video": "a.mp4"})
    with pytest.raises(ValueError, match=r"^the question 'questions.jsonl:1' has the key 'video', which is not read"):
        Questions(annotations=str(file))
