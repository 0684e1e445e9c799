"""What users' data say is shown and written as it is: never markup, an emoji code or a command to a terminal."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from tests.helpers.programs import METRICS, QUICK, evaluate, losses, of_answers, read, train, weights
from vlm import config
from vlm.evaluation.answers import Answers, mean_scores, write_samples
from vlm.evaluation.scorers.exact_match import ExactMatch
from vlm.files import escape_controls
from vlm.module import VLMModule
from vlm.training import artifact, results, run

HOSTILE = ["[/b] and [red]", "a :smile: b", r"a \[bold]", "[link=x]", "\x1b[31mred", "Z\udcfcrich", "\u202etxt.exe"]


def test_printable() -> None:
    assert [escape_controls(text) for text in HOSTILE] == [
        *HOSTILE[:4],
        r"\x1b[31mred",
        r"Z\udcfcrich",
        r"\u202etxt.exe",
    ]
    assert escape_controls("a\tb\n日本 👩‍🚀\x9b\r") == "a\tb\n日本 👩‍🚀" + r"\x9b\r"


def test_tables_show_texts_as_they_are() -> None:
    samples = [
        {"id": text, "prompt": text, "prediction": text, "reference": f"{text}.", "score": 0.0} for text in HOSTILE
    ]
    with run.CONSOLE.capture() as shown:
        results.print_samples(samples, num=len(samples))
        results.print_metrics({f"val/accuracy/{text}": 0.5 for text in HOSTILE})
        run.CONSOLE.print("runs/" + "".join(HOSTILE), soft_wrap=True)
    lines = shown.get().splitlines()
    for text in map(escape_controls, HOSTILE):
        row = next(line for line in lines if f"│ {text}. " in line)
        assert row.count(f"│ {text} ") == 3, "id, question and prediction"
        assert "wrong" in row
        assert any(line.startswith(f"│ val/accuracy/{text} ") for line in lines), text
    assert lines[-1] == "runs/" + escape_controls("".join(HOSTILE))
    assert not {character for line in lines for character in line} & {"\x1b", "\udce9", "\u202e", "😄"}


def test_figures_have_no_minus_zero() -> None:
    assert [results.format_metric(value) for value in (-0.0004, 0.0, -0.0006, 1234567, -1234.5)] == [
        *("0.000", "0.000", "-0.001", "1,234,567", "-1,234.500"),
    ]


def test_files_keep_what_is_no_unicode(tmp_path: Path) -> None:
    records = [{"id": text, "type": text, "score": 1.0} for text in HOSTILE]
    write_samples(tmp_path / "samples.jsonl", records)
    artifact.write_json(tmp_path / "metrics.json", records)
    assert read(tmp_path / "samples.jsonl") == json.loads((tmp_path / "metrics.json").read_text("utf-8")) == records
    assert artifact.short_hash(HOSTILE) == artifact.short_hash(json.loads(json.dumps(HOSTILE)))
    assert f"accuracy/{escape_controls(HOSTILE[5])}" in mean_scores(records, ExactMatch())
    settings: Any = {"seed": 0, "data": {"annotations": HOSTILE[5]}}
    config.write_config(tmp_path, settings, {})
    assert OmegaConf.load(tmp_path / "config.yaml").data == settings["data"]


@pytest.mark.slow
def test_a_run_whose_files_have_names_in_latin_1(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One of them cannot be read; all figures and samples are there, in a folder as a sweep names it."""
    folder = tmp_path / "pictures"
    for split, num in (("train", 6), ("val", 5)):
        for number in range(num):
            file = folder / split / os.fsdecode(f"Z\xfcrich [/b] :smile: {number}.png".encode("latin-1"))
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), (40 * number, 99 if split == "train" else 0, 200)).save(file)
            file.with_suffix(".txt").write_text(f"[/b] number {number} :smile:")
    file.write_bytes(b"no picture")
    out = tmp_path / "llm.lora.target_modules=[q_proj,v_proj] :smile:"
    options = [
        "evaluators.answers.num_samples=5",
        "data=image_folder",
        f"data.root={folder / 'train'}",
        f"data.val_root={folder / 'val'}",
        "data.max_bad_ratio=0.5",
        "logger=csv",
        "data.num_val_samples=5",
    ]
    assert train(*QUICK, *options, f"run_dir='{out}'") == 0
    printed = capfd.readouterr().out
    assert f"Run directory: {out}" in printed
    assert printed.count(r"Z\udcfcrich [/b] :smile: 0.png") == 1
    (sample, *_) = read(out / "samples.jsonl")
    assert sample["reference"] == "[/b] number 0 :smile:"
    assert escape_controls(sample["id"]).endswith(r"Z\udcfcrich [/b] :smile: 0.png")
    (bad,) = read(out / "bad_samples.jsonl")
    assert r"Z\udcfcrich [/b] :smile: 4.png" in escape_controls(bad["error"])
    with open(out / "csv" / "metrics.csv") as table:
        assert "val/exact_match" in next(csv.reader(table))
    assert evaluate(f"ckpt='{out}'", "trainer=cpu", "num_samples=5", "batch_size=2", "max_new_tokens=2") == 0
    assert read(out / "eval" / "samples.jsonl")[0]["id"] == sample["id"]


@pytest.mark.parametrize("what", ["answers", "last validation"])
def test_what_fails_after_the_last_step_takes_no_figures_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Any, what: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("there is nothing to compare")

    if what == "answers":
        monkeypatch.setattr(Answers, "finish", fail)
    else:
        monkeypatch.setattr(VLMModule, "on_validation_epoch_end", fail)
    assert train(*QUICK, f"run_dir={tmp_path / 'run'}") == 2
    assert told() == "Error: there is nothing to compare"
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    left_out = of_answers("caption")
    if what == "last validation":
        left_out |= {name for name in METRICS if name.startswith(("val/", "perf/", "time/"))}
    assert metrics.keys() == METRICS - left_out
    assert run.status(tmp_path / "run") == "failed"


@pytest.mark.slow
def test_a_run_whose_last_validation_failed_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It repeats that validation, and trains on like a run in which nothing failed."""
    failed, whole = tmp_path / "failed", tmp_path / "whole"
    with monkeypatch.context() as patched:
        patched.setattr(VLMModule, "on_validation_epoch_end", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(*QUICK, f"run_dir={failed}")
    assert run.status(failed) == "failed"
    assert train(f"resume={failed}") == train(*QUICK, f"run_dir={whole}") == 0
    metrics, expected = (json.loads((folder / "metrics.json").read_text()) for folder in (failed, whole))
    assert metrics["status"] == "finished"
    assert metrics["val/loss"] == expected["val/loss"]
    longer = ["trainer.max_steps=4", "resume.allow=[trainer.max_steps]"]
    assert train(f"resume={failed}", *longer) == train(f"resume={whole}", *longer) == 0
    torch.testing.assert_close(weights(failed), weights(whole), rtol=0, atol=0)
    assert losses(failed)[-3:] == losses(whole)[-3:]


@pytest.mark.slow
def test_an_evaluation_that_fails_in_its_answers_keeps_its_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Any
) -> None:
    assert train(*QUICK, f"run_dir={tmp_path / 'run'}") == 0

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("a prompt is too long")

    monkeypatch.setattr(Answers, "finish", fail)
    assert evaluate(f"ckpt={tmp_path / 'run'}", "trainer=cpu", "num_samples=2") == 2
    assert told() == "Error: a prompt is too long"
    results = json.loads((tmp_path / "run" / "eval" / "results.json").read_text())
    assert results["metrics"]["val/loss"] > 0
    assert results["num_samples"] == 0
