"""vlm-import: what it refuses, each in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.exchange import check_usage, import_


def test_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    check_usage(import_, "Make a run directory, for ckpt=, of weights that another program has trained.", capsys)


def test_what_it_refuses(tmp_path: Path, told: Any) -> None:
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "text.bin").write_text("not a pickle")
    before = {*tmp_path.rglob("*")}
    for arguments, message in (
        (("x",), "vlm-import needs out=<run dir>"),
        (("out=y",), "vlm-import needs one folder or file, and got 0"),
        (("x", "z", "out=y"), "vlm-import needs one folder or file, and got 2"),
        (
            ("x", "out=y", "trainer=cpu"),
            "there is no option trainer; choose one of out, chat_template, and those of train.py that begin with "
            "encoder, connector, llm, data",
        ),
        ((tmp_path / "none", "out=y"), f"{tmp_path / 'none'} does not exist; give a folder or a file"),
        ((tmp_path, "out=y"), f"{tmp_path} has no config.json; give a folder that Transformers reads"),
        (
            (tmp_path / "gpt", "out=y"),
            f"{tmp_path / 'gpt'} is a model of type gpt2, which cannot be imported; those that can are llava, "
            "blip-2, instructblip",
        ),
        (
            (tmp_path / "broken", "out=y"),
            f"{tmp_path / 'broken' / 'config.json'} is not JSON (Expecting property name enclosed in double quotes: "
            "line 1 column 2 (char 1)); download it again",
        ),
        (
            (tmp_path / "text.bin", f"out={tmp_path / 'y'}"),
            f"{tmp_path / 'text.bin'} has no tensors that can be read safely (UnpicklingError); take another",
        ),
    ):
        assert import_(*arguments) == 2
        assert told() == f"Error: {message}"
    assert {*tmp_path.rglob("*")} == before
