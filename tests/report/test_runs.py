"""What is read of a folder: order, failed jobs, benchmarks, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.reports import write_run, write_sweep
from vlm.report import jobs
from vlm.report.runs import Score, read_runs


def test_jobs_are_in_the_order_of_the_sweep_and_failed_ones_are_there(tmp_path: Path) -> None:
    write_sweep(tmp_path, {"mlp": [0.5], "linear": [0.6]})
    jobs.start_job(tmp_path, "connector=a", num=2, options=["connector=a", "llm=tiny"])
    jobs.fail_job(tmp_path, "connector=a", error="no such grid")
    jobs.start_job(tmp_path, "../elsewhere", num=3, options=[])
    found = [(run.name, run.status, run.error) for run in read_runs([tmp_path])]
    assert found == [
        ("connector=mlp,seed=0", "finished", None),
        ("connector=linear,seed=0", "finished", None),
        ("connector=a", "failed", "no such grid"),
    ]


def test_the_last_command_of_a_folder_comes_first(tmp_path: Path) -> None:
    write_sweep(tmp_path, {"mlp": [0.5, 0.6]})
    jobs.start_job(tmp_path, "failed", num=2, options=["connector=a"])
    jobs.start_sweep(tmp_path, num_jobs=1)
    jobs.start_job(tmp_path, "connector=mlp,seed=1", num=0, options=["connector=mlp", "seed=1"])
    assert jobs.num_jobs(tmp_path) == 1
    assert [run.name for run in read_runs([tmp_path])] == ["connector=mlp,seed=1", "connector=mlp,seed=0"]


def test_benchmarks_are_scores(tmp_path: Path) -> None:
    write_run(tmp_path / "run", loss=1.0)
    metrics = {"accuracy": {"value": 0.6, "low": 0.5, "high": 0.7, "n": 50}, "other": {"value": None}}
    content = {"n": 50, "metrics": metrics, "best_constant": {"accuracy": {"value": 0.4, "answer": "no"}}}
    (tmp_path / "run" / "eval" / "pope").mkdir(parents=True)
    (tmp_path / "run" / "eval" / "pope" / "results.json").write_text(json.dumps(content))
    (run,) = read_runs([tmp_path])
    assert run.scores == {"pope: accuracy": Score(0.6, 50, 0.4, 0.5, 0.7)}
    assert run.status == "finished"


def test_a_killed_run_is_unfinished_and_its_cut_line_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, lines=({"step": 1, "train/loss": 2.0},))
    (tmp_path / "metrics.json").unlink()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "train/l')
    (run,) = read_runs([tmp_path])
    assert (run.status, run.lines) == ("unfinished", [{"step": 1, "train/loss": 2.0}])


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run: there is no"):
        read_runs([tmp_path])
    with pytest.raises(ValueError, match="there is no folder"):
        read_runs([tmp_path / "none"])
