"""Choices, their spread and their paired differences, on numbers computed by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.helpers.reports import write_results, write_run, write_sweep
from vlm.report.compare import differing, mean_and_spread, paired_difference, t_quantile
from vlm.report.runs import read_runs
from vlm.report.tables import Comparison, table_of_choices, table_of_differences, table_of_runs, tables_of_scores


@pytest.mark.parametrize(
    ("degrees", "published"),  # two-sided 95 %, NIST/SEMATECH e-Handbook, 1.3.6.7.2
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228), (30, 2.042), (100, 1.984)],
)
def test_quantiles_of_student(degrees: int, published: float) -> None:
    assert t_quantile(degrees) == pytest.approx(published, abs=6e-4)


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    write_sweep(tmp_path, {"mlp": [0.5, 0.7, 0.9], "linear": [0.6, 0.9, 1.2], "qformer": [2.0]})
    comparison = Comparison(read_runs([tmp_path]))
    assert list(comparison.choices) == ["connector=mlp", "connector=linear", "connector=qformer"]
    mlp, linear, qformer = comparison.choices.values()
    found = paired_difference(linear, mlp, "val/loss")
    assert found is not None
    half = 4.3027 * 0.1 / math.sqrt(3)  # differences 0.1, 0.2, 0.3
    assert (found.mean, found.low, found.high) == pytest.approx((0.2, 0.2 - half, 0.2 + half), abs=1e-4)
    alone = paired_difference(qformer, mlp, "val/loss")
    assert alone is not None
    assert (alone.mean, alone.low, alone.num_pairs) == (pytest.approx(1.5), None, 1)
    assert paired_difference(qformer, mlp[1:], "val/loss") is None
    rows = table_of_differences(comparison).rows
    assert list(rows[0]) == ["connector=linear", "3", "+0.200 [-0.048, +0.448]", "-0.200 [-0.448, +0.048]"]
    assert list(rows[1]) == ["connector=qformer", "1", "+1.500", "-1.500"]
    assert table_of_choices(comparison).rows[0][:3] == ["connector=mlp", "3", "0.700 ± 0.200"]
    assert mean_and_spread([1.0]) == (1.0, None)


def test_the_table_of_runs_has_what_differs(tmp_path: Path) -> None:
    write_sweep(tmp_path, {"mlp": [0.5], "linear": [0.6]})
    table = table_of_runs(Comparison(read_runs([tmp_path])))
    costs = ["trainable parameters", "visual tokens in the input", "seconds per step"]
    score = "val/exact_match (n 128, constant 0.250)"
    assert list(table.headings) == ["connector", "status", "val/loss", score, *costs]  # llm=tiny is that of all
    assert list(table.rows[0]) == ["mlp", "finished", "0.500", "0.500", "3,000", "64", "0.100"]


def test_scores_by_type_have_a_table_of_their_own(tmp_path: Path) -> None:
    """The table of runs has the headline alone; a choice with one run has its interval, one with two their spread."""
    write_sweep(tmp_path, {"mlp": [0.5, 0.6], "linear": [0.6]})
    for name, value in {"mlp,seed=0": 0.2, "mlp,seed=1": 0.4, "linear,seed=0": 0.5}.items():
        metrics = {
            "accuracy": {"value": value, "n": 90},
            "accuracy/x": {"value": value, "low": 0.1, "high": 0.9, "n": 9},
        }
        constants = {"accuracy/x": {"value": 0.75}}
        best = {"best_constant": constants, "best_without_image": {"accuracy/x": 0.875}}
        write_results(tmp_path / f"connector={name}", "gqa", metrics, headline="accuracy", **best)
    comparison = Comparison(read_runs([tmp_path]))
    assert [name for name in comparison.qualities if "gqa" in name] == ["gqa: accuracy"]
    (table,) = tables_of_scores(comparison)
    assert list(table.headings) == [
        "metric",
        "n",
        "best constant",
        "best without image",
        "connector=mlp",
        "connector=linear",
    ]
    assert list(table.rows[0]) == ["accuracy", "90", "-", "-", "0.300 ± 0.141", "0.500"]
    assert list(table.rows[1]) == ["accuracy/x", "9", "0.750", "0.875", "0.300 ± 0.141", "0.500 [0.100, 0.900]"]


def test_runs_that_no_sweep_made_differ_by_their_config(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / str(seed), seed=seed, loss=1.0)
    for number, line in enumerate(("data: {seed: 0, batch_size: 8}", "data: {seed: 1, batch_size: 4}")):
        file = tmp_path / str(number) / "config.yaml"
        file.write_text(file.read_text().replace("data: {}", line))
    assert differing(read_runs([tmp_path])) == {"data.batch_size": ["8", "4"], "seed": ["0", "1"]}
