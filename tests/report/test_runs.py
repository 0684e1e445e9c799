"""What is read of a folder: order, failed jobs, benchmarks, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.reports import write_results, write_run, write_sweep
from vlm.report import jobs
from vlm.report.runs import Score, read_runs
from vlm.report.tables import Comparison, tables


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
    metrics = {
        "f1": {"value": 0.9},
        "accuracy": {"value": 0.6, "low": 0.5, "high": 0.7, "n": 50},
        "no": {"value": None},
    }
    constants = {"accuracy": {"value": 0.4, "answer": "no"}}
    write_results(tmp_path / "run", "pope", metrics, best_constant=constants, headline="accuracy", n=50)
    (run,) = read_runs([tmp_path])
    accuracy = Score(0.6, 50, 0.4, 0.5, 0.7)
    assert run.scores == {"pope: accuracy": accuracy}
    assert run.details["pope"] == {"f1": Score(0.9, 50, None), "accuracy": accuracy}
    assert run.status == "finished"


def test_scores_by_type_of_the_validation_answers(tmp_path: Path) -> None:
    write_run(
        tmp_path,
        **{f"val/exact_match{kind}": value for kind, value in {"": 0.5, "/count": 0.2, "/color": 0.8}.items()},
        **{f"val/exact_match_constant{kind}": 0.1 for kind in ("", "/count", "/color")},
        **{f"val/num_answers{kind}": value for kind, value in {"": 64, "/count": 32, "/color": 32}.items()},
    )
    (run,) = read_runs([tmp_path])  # of an earlier version, without intervals
    assert run.scores == {"val/exact_match": Score(0.5, 64, 0.1)}
    assert run.details["validation"]["val/exact_match/count"] == Score(0.2, 32, 0.1)


def test_a_score_has_its_interval_and_the_best_answers_without_the_image(tmp_path: Path) -> None:
    beside = {"constant": 0.1, "no_image": 0.2, "low": 0.4, "high": 0.6}
    metrics = {f"val/exact_match_{name}": value for name, value in beside.items()}
    write_run(tmp_path, **{"val/exact_match": 0.5, "val/num_answers": 64}, **metrics)
    (run,) = read_runs([tmp_path])
    assert run.scores == {"val/exact_match": Score(0.5, 64, 0.1, 0.4, 0.6, 0.2)}
    (table,) = tables(Comparison([run]))
    assert "val/exact_match (n 64, without image 0.200)" in table.headings
    assert "0.500 [0.400, 0.600]" in table.rows[0]


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
