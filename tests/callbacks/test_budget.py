"""A run ends at the budget of its sweep, and is finished then."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.programs import QUICK, read, train
from vlm.training import run


@pytest.mark.parametrize("match", ["tokens", "seconds"])
def test_a_run_ends_at_its_budget(match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=10)
    monkeypatch.setattr("vlm.callbacks.budget.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    # A step has 2 samples of more than 50 tokens each, and takes 10 s; a budget of 15 is spent by the second one.
    budget = {"tokens": 250, "seconds": 15}[match]
    options = ["trainer.max_steps=9", f"sweep.match={match}", f"sweep.budget={budget}"]
    assert train(*QUICK, *options, f"run_dir={tmp_path}") == 0
    assert run.status(tmp_path) == "finished"
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl") if "train/loss" in line] == [1, 2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["sweep.match=tokens"], "sweep.match=tokens needs the number of tokens of a job; set sweep.budget=<tokens>"),
        (["sweep.budget=9"], "sweep.budget=9 is a number of tokens or seconds, and sweep.match is null"),
        (["sweep=connectors"], "sweep= chooses the jobs of a sweep; add -m"),
    ],
)
def test_refusals(options: list[str], said: str, tmp_path: Path, told: Any) -> None:
    assert train(*QUICK, *options, f"run_dir={tmp_path / 'run'}") == 2
    assert said in told()
