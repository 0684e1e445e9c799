"""docs/extend.md: its files, written into an empty folder, and its commands make a system of other parts work."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.programs import ROOT, train

PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`(mine/[\w./]+)`:\n\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]
PROGRAMS = {"vlm-artifact": ["-m", "vlm.cli.artifact"]}


def start(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    program, *arguments = shlex.split(command)
    words = PROGRAMS.get(program) or [str(ROOT / arguments.pop(0))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", str(ROOT)]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extend")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_every_file_of_the_page_is_found() -> None:
    assert len(FILES) == PAGE.count("```python") + PAGE.count("```yaml") == 16
    assert len(COMMANDS) == 9


@pytest.mark.slow
def test_the_commands_in_their_order(folder: Path) -> None:
    said = {}
    for command in COMMANDS:
        done = start(folder, command)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        said[command] = done.stdout
    pooled, plan, trained, evaluated, shown, _, resumed, scored, asked = said.values()
    assert re.search(r"connector │ soft_pool +│ full +│ 0.001 +│", pooled)
    for text in (plan, trained):  # every part with its own state and rate, and the objective's one number
        assert re.search(r"backbone +│ +│ full +│ 0.003 +│", text)
        assert re.search(r"objective +│ contrastive +│ full +│ 0.03 +│ +1 │ +1 │", text)
    assert "mine.joint_stream.JointStream" in shown
    assert "train/temperature" in (folder / "runs/pairs/metrics.jsonl").read_text()
    metrics = json.loads((folder / "runs/pairs/metrics.json").read_text())
    assert metrics["status"] == "finished"
    assert metrics["val/recall_at_1"] > 0.5, "four colors: by chance 0.25"
    assert metrics["val/contrastive_loss"] == metrics["val/loss"]
    again = json.loads((folder / "runs/pairs/eval/results.json").read_text())["metrics"]
    assert again["val/recall_at_1"] == metrics["val/recall_at_1"]
    assert "val/exact_match" not in metrics
    assert "val/recall_at_1" in evaluated
    learned, inherited = (
        load_file(folder / run / "artifact" / "weights.safetensors")["objective.log_scale"]
        for run in ("runs/pairs", "runs/next")
    )
    assert abs(learned - 2.0) > 0.01
    most = 4 * 0.03  # of AdamW in four steps
    assert 0 < abs(inherited - learned) < most < abs(inherited - 2.0), "the next run starts from it"
    assert json.loads((folder / "runs/next/metrics.json").read_text())["status"] == "finished"
    checkpoint = torch.load(folder / "runs/next/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4
    assert torch.equal(checkpoint["state_dict"]["objective.log_scale"], inherited)
    assert "step 4" in resumed
    assert "val/first_word" in scored
    assert "val/exact_match" not in scored
    colors = json.loads((folder / "runs/scorer/eval/colors/results.json").read_text())
    assert (colors["n"], colors["num_groups"], colors["metrics"].keys()) == (16, 16, {"first_word"})
    assert colors["best_constant"]["first_word"] == {"value": 0.25, "answer": "red"}
    assert "colors: 16 answers in 16 groups" in asked


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            "model=joint_stream stage=pairs data=squares objective=language_modeling",
            "objective=LanguageModeling needs a model that predicts the next tokens of a row",
        ),
        ("connector=soft_pool connector._target_=mine.retrieval.Retrieval", "is not allowed; name a class of"),
        (
            "model=joint_stream stage=pairs data=squares stage.lr.objective=null",
            "1 parameters of the objective are trained but have no learning rate, first log_scale; set stage.lr.obj",
        ),
        ("model=joint_stream data=squares", "there is no option stage.encoder"),
        ("model=joint_stream stage=pairs data=squares encoder=tiny", "encoder"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    folder: Path, options: str, said: str, monkeypatch: pytest.MonkeyPatch, told: Any
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    assert train("hydra.searchpath=[file://mine/conf]", *options.split(), "run_dir=runs/refused") == 2
    assert said in told()
