"""Run directories that earlier versions of the code have written still work: next stage, evaluation, resumption.

A folder below `earlier_runs` is named after the day of the code that wrote it. Never write one anew; add another.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vlm import config

ROOT = Path(__file__).parents[1]
EARLIER = Path(__file__).parent / "earlier_runs"
# Evaluations of later code on questions about shapes that are others since that day (each answer as frequent as any).
OTHER_QUESTIONS = {"instruct": {"val/loss": 5.640564918518066, "val/loss_blank": 5.749469757080078}}
DAYS = sorted(folder.name for folder in EARLIER.iterdir())
TINY = ("llm=tiny", "encoder=tiny", "connector=linear", "debug=fast", "trainer=cpu", "trainer.precision=32-true")


def call(program: str, *options: str, folder: Path) -> str:
    command = [sys.executable, str(ROOT / program), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(params=DAYS)
def runs(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with `align` and `instruct` as they were written on that day."""
    return Path(shutil.copytree(EARLIER / request.param, tmp_path / "runs"))


@pytest.mark.slow
def test_a_next_stage_starts_from_it(runs: Path) -> None:
    call("train.py", *TINY, "stage=vision_tune", "ckpt=instruct", "run_dir=next", folder=runs)
    manifest = json.loads((runs / "next" / "artifact" / "manifest.json").read_text())
    assert [stage["name"] for stage in manifest["stages"]] == ["align", "instruct", "vision_tune"]
    assert manifest["lora"]["r"] == 2  # of the stage before, kept though this one freezes the LLM


@pytest.mark.slow
@pytest.mark.parametrize("name", ["align", "instruct"])
def test_evaluation_finds_the_figures_of_that_day(runs: Path, name: str) -> None:
    call("eval.py", f"ckpt={name}", "num_samples=8", "batch_size=4", "trainer=cpu", folder=runs)
    results = json.loads((runs / name / "eval" / "results.json").read_text())["metrics"]
    before = json.loads((runs / name / "metrics.json").read_text()) | OTHER_QUESTIONS.get(name, {})
    for figure in ("val/loss", "val/loss_blank"):
        assert results[figure] == pytest.approx(before[figure], rel=1e-4)


@pytest.mark.slow
def test_it_is_resumed(runs: Path) -> None:
    before = (runs / "align" / "metrics.jsonl").read_text()
    call("train.py", "resume=align", "trainer.max_steps=8", "resume.allow=[trainer.max_steps]", folder=runs)
    after = (runs / "align" / "metrics.jsonl").read_text()
    assert after.startswith(before)
    steps = [json.loads(line)["step"] for line in after.removeprefix(before).splitlines()]
    assert steps == [7, 8]


def test_the_strategy_of_a_sharded_run_is_found_where_it_is_now() -> None:
    stored: dict[str, Any] = {
        "stage": {},
        "objective": {},
        "evaluators": {},
        "logger": None,
        "trainer": {"strategy": {"_target_": "vlm.sharding.FullyShard"}},
    }
    assert config.migrated(stored)["trainer"]["strategy"] == {"_target_": "vlm.training.sharding.FullyShard"}
