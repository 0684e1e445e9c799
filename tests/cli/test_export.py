"""vlm-export: what it refuses, each in one sentence, before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.exchange import check_usage, export
from tests.helpers.programs import LIVELY, QUICK, train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("export") / "run"
    assert train(*QUICK, *LIVELY, "encoder.tiles.grids=[[1,2]]", f"run_dir={run}") == 0
    return run


def test_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    check_usage(export, "Write a trained run as a folder that Transformers reads", capsys)


def test_options_that_it_refuses(run: Path, tmp_path: Path, told: Any, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    for arguments, message in (
        ((run,), "vlm-export needs out=<folder>"),
        (("out=x",), "vlm-export needs ckpt=<run dir>"),
        ((run, "out=x", "to=gguf"), "to='gguf' must be hf"),
        ((run, "out=x", "lora=drop"), "lora='drop' must be one of merge, keep"),
        (
            (run, "out=x", "sample=2"),
            "there is no option sample; did you mean samples? choose one of ckpt, dtype, lora, max_new_tokens, out, "
            "samples, to",
        ),
        ((run, "out=x", "lora=keep"), f"ckpt={run} has no LoRA to keep apart; leave out lora=keep"),
        ((run, f"out={run}"), f"out={run} exists and is not an empty folder; choose another one"),
        (
            (run / "artifact", "out=x"),
            f"ckpt={run / 'artifact'} is a part of a run directory; give the whole directory, ckpt={run}",
        ),
        (
            (tmp_path, "out=x"),
            f"ckpt={tmp_path} is not a run directory: it has no artifact/manifest.json; give the folder of a run",
        ),
    ):
        assert export(*arguments) == 2
        assert told() == f"Error: {message}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora": {"r": 2, "tokens": "after_image"}},
            "was trained with stage.lora.tokens=after_image, which the model itself must apply; leave out lora=keep",
        ),
        (
            {"quantization": "nf4"},
            "was trained with an LLM in nf4, whose weights no export writes; train with llm.quantization=none",
        ),
    ],
)
def test_what_no_export_holds(run: Path, tmp_path: Path, told: Any, changes: dict[str, Any], message: str) -> None:
    manifest = json.loads((run / "artifact" / "manifest.json").read_text())
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "manifest.json").write_text(json.dumps({**manifest, **changes}))
    before = {*tmp_path.rglob("*")}
    assert export(tmp_path, f"out={tmp_path / 'out'}", "lora=keep") == 2
    assert told() == f"Error: ckpt={tmp_path} {message}"
    assert {*tmp_path.rglob("*")} == before


def test_a_run_that_does_not_fit(run: Path, tmp_path: Path, told: Any, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert export(run, f"out={tmp_path / 'out'}") == 2
    assert told() == (
        f"Error: ckpt={run} cannot be exported: encoder.tiles.grids=[[1, 2]] must be []; train with other options"
    )
    assert list(tmp_path.iterdir()) == []
