"""What eval.py needs beside a run: no training data, and one sample or one question without an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.programs import QUICK, evaluate, read, train


def write(file: Path, *records: dict[str, Any]) -> str:
    file.write_text(json.dumps(records))
    return str(file)


def record(number: int, **answer: str) -> dict[str, Any]:
    return {"id": number, "image": f"{number}.png", "question": "Which color?", **answer}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose annotations are gone."""
    folder = tmp_path_factory.mktemp("trained")
    for number in range(6):
        Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(folder / f"{number}.png")
    annotations = write(folder / "train.json", *(record(number, answer="red") for number in range(6)))
    data = ["data=instruct", f"data.annotations={annotations}", f"data.images={folder}", "data.val_fraction=0.5"]
    assert train(*QUICK, *data, f"run_dir={folder / 'run'}") == 0
    (folder / "train.json").unlink()
    return folder


def test_one_sample_without_the_training_data(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    test = write(tmp_path / "test.json", record(3, answer="red"))
    options = [f"ckpt={trained / 'run'}", f"out={tmp_path}", "trainer=cpu"]
    assert evaluate(*options, f"data.val_annotations={test}") == 0
    assert "There will be no val/visual_gain: no validation batch has two different images" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert metrics["val/num_answers"] == 1
    assert {"val/loss", "val/exact_match"} <= metrics.keys()
    assert "val/visual_gain" not in metrics
    (sample,) = read(tmp_path / "samples.jsonl")
    assert (sample["id"], sample["reference"]) == ("3", "red")


def test_questions_without_answers_are_asked(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    test = write(tmp_path / "test.json", record(3), record(4, answer="red"))
    options = [f"ckpt={trained / 'run'}", f"out={tmp_path}", "trainer=cpu"]
    assert evaluate(*options, f"data.val_annotations={test}", "max_new_tokens=2") == 0
    assert f"1 question of {test} has no answer, so that there is no loss" in " ".join(capsys.readouterr().out.split())
    samples = read(tmp_path / "questions" / "samples.jsonl")
    assert [(sample["id"], sample["references"]) for sample in samples] == [("3", []), ("4", ["red"])]
    assert json.loads((tmp_path / "questions" / "results.json").read_text())["n"] == 1
    assert not (tmp_path / "results.json").exists()


def test_the_held_out_part_of_the_training_file_needs_that_file(trained: Path, tmp_path: Path, told: Any) -> None:
    assert evaluate(f"ckpt={trained / 'run'}", f"out={tmp_path}", "trainer=cpu") == 2
    assert "there is no file" in (said := told())
    assert "data.annotations=" in said
