"""The number of steps of a run, which follows the size of the data."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.helpers.programs import QUICK, read, train
from tests.helpers.sources import numbered
from vlm.build import num_steps
from vlm.launch.sweep import SweepReport
from vlm.schema import Batch

TEN = ["data.num_train=10", "data.batch_size=4"]


@pytest.mark.parametrize(
    ("trainer", "data", "steps"),
    [
        ({"max_steps": 7}, {"epochs": 3}, 7),
        ({}, {}, 240),
        ({}, {"epochs": 3}, 8),  # 30 samples
        ({}, {"epochs": 0.4}, 1),  # 4 samples
        ({"accumulate_grad_batches": 2}, {"epochs": 3}, 4),
    ],
)
def test_the_steps_of_a_run(trainer: dict[str, Any], data: dict[str, Any], steps: int) -> None:
    module = numbered(size=10, **data)
    cfg = {"trainer": {"max_steps": "auto", "accumulate_grad_batches": 1, **trainer}}
    assert num_steps(cfg, module) == steps


def test_batches_of_tokens_are_counted_by_the_mean_length() -> None:
    data = numbered(size=10, epochs=3, batching="tokens", batch_tokens=500, max_length=400)
    total = sum(len(batch.input_ids[0]) for batch in epoch_of_single_rows(10))
    cfg = {"trainer": {"max_steps": "auto", "accumulate_grad_batches": 1}}
    assert num_steps(cfg, data) == math.ceil(3 * total / 500) > 1


def test_two_ranks_need_half_of_the_steps() -> None:
    cfg = {"trainer": {"max_steps": "auto", "accumulate_grad_batches": 1}}
    assert num_steps(cfg, numbered(size=40, epochs=2), num_ranks=2) == 10


def test_a_run_reads_its_data_so_often_and_goes_on_for_longer(tmp_path: Path) -> None:
    options = [*QUICK, *TEN, "trainer.max_steps=auto", "data.epochs=1.2"]
    assert train(*options, f"run_dir={tmp_path}") == 0
    assert _last_step(tmp_path) == 3
    assert train(f"resume={tmp_path}", "data.epochs=2", "resume.allow=[data.epochs]") == 0
    assert _last_step(tmp_path) == 5


@pytest.mark.parametrize(
    ("max_steps", "epochs", "said"), [(300, 6, "300 steps"), ("auto", None, "240 steps"), ("auto", 6, "data.epochs=6")]
)
def test_a_sweep_says_how_long_its_jobs_train(
    max_steps: Any, epochs: float | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = OmegaConf.create(
        {
            "trainer": {"max_steps": max_steps},
            "data": {"epochs": epochs},
            "sweep": {"match": "steps"},
            "hydra": {"sweep": {"dir": str(tmp_path)}, "sweeper": {"n_trials": 2}, "overrides": {"task": []}},
        }
    )
    SweepReport().on_multirun_start(config)
    assert capsys.readouterr().out.splitlines()[-1] == f"Equal budget: every job trains for {said} (sweep.match=steps)"


def epoch_of_single_rows(size: int) -> list[Batch]:
    return list(itertools.islice(numbered(size=size, batch_size=1).train_dataloader(), size))


def _last_step(run_dir: Path) -> int:
    return max(line["step"] for line in read(run_dir / "metrics.jsonl") if "train/loss" in line)
