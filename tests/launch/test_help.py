"""`--help` of the programs: complete, and without the seconds that PyTorch takes to import."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.helpers.programs import QUICK, ROOT, read, train
from vlm.launch.configs import OF_EVAL


@pytest.mark.parametrize("program", ["train", "eval", "doctor"])
def test_help_comes_without_torch_and_names_every_group_and_key(program: str) -> None:
    command = ["-m", "vlm.cli.doctor"] if program == "doctor" else [f"{program}.py"]
    line = [sys.executable, "-X", "importtime", *command, "--help"]
    shown = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert not re.search(r"\| +(torch|hydra|transformers)$", shown.stderr, re.MULTILINE)
    groups = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()} - {"hydra", *OF_EVAL}
    for group in {"trainer", *OF_EVAL} if program == "eval" else groups:
        listed = re.search(rf"^  {group} +((.+\n)(?: {{24}}.+\n)*)", shown.stdout, re.MULTILINE)
        assert listed, group
        options = sorted(file.stem for file in (ROOT / "conf" / group).glob("*.yaml") if file.stem[0] != "_")
        assert re.sub(r"[\[\]]", "", listed[1]).split() == options
    config: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / f"{program}.yaml"))
    for key, value in config.items():
        if key not in ("defaults", "hydra"):
            names = [f"{key}.{inner}=" for inner in value] if isinstance(value, dict) and value else [f"{key}="]
            assert [name for name in names if f"\n  {name}" not in shown.stdout] == []
    assert "VLM_TRACEBACK=1" in shown.stdout


def test_help_explains_every_figure_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train(*QUICK, f"run_dir={run}") == 0
    figures = {name for line in read(run / "metrics.jsonl") for name in line}
    figures |= json.loads((run / "metrics.json").read_text()).keys()
    capsys.readouterr()
    assert train("--help") == 0
    text = capsys.readouterr().out.replace("<name>_loss", "lm_loss").replace("<type>", "caption")
    text = text.replace("grad_norm/<part>", "grad_norm/connector").replace("lr/<group>", "lr/connector")
    assert {name for name in figures - {"step", "status"} if name not in text} == set()


@pytest.mark.parametrize("program", ["labels", "options"])
def test_help_of_a_program_that_writes_pages_writes_none(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"vlm.cli.{program}")
    monkeypatch.setattr(module, "write" if program == "options" else "page", lambda: pytest.fail("it wrote"))
    for word, code in (("--help", 0), ("run", 2)):
        monkeypatch.setattr(sys, "argv", ["program", word])
        with pytest.raises(SystemExit, match=f"^{code}$"):
            module.main()
    assert f"usage: python -m vlm.cli.{program}" in capsys.readouterr().out
