"""`plan.against`: the prediction of an earlier plan beside what the run measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from vlm import config, files
from vlm.training import run, trust

PREDICTED = {  # keys of the plan: name, metric of the run, unit
    "peak_memory_gb": ("peak memory", "perf/peak_memory_gb", "GB"),
    "step_seconds": ("seconds per step", "perf/step_seconds", "s"),
}
REMEDY = "plan.against={file} holds no prediction; write one with plan=true plan.json={file}"
# Options that change neither a step nor its memory.
NOT_COMPARED = (
    "trainer.max_steps",
    "trainer.val_check_interval",
    "trainer.log_every_n_steps",
    "data.num_val_samples",
    "data.epochs",
)


def compared(settings: Mapping[str, Any]) -> list[str]:
    """The sections of a config that decide what a step takes."""
    return [key for key in (*config.model_class(settings).groups(settings), "objective", "data", "stage", "trainer")]


def read_prediction(file: str | Path) -> dict[str, Any]:
    """The content of a `plan.json` with a prediction. Raises ValueError if there is none in it."""
    try:
        report = json.loads(files.read(Path(file), max_bytes=run.MAX_METRICS))
        ok = all(isinstance(report[key], float) for key in PREDICTED) and isinstance(report["settings"], dict)
    except (OSError, ValueError, KeyError, TypeError) as error:
        cause = f"{type(error).__name__}: {error}" if isinstance(error, KeyError | TypeError) else str(error)
        raise ValueError(f"{REMEDY.format(file=file)} ({cause})") from error
    if not ok:
        raise ValueError(REMEDY.format(file=file))
    return dict(report)


def other_options(report: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """`key=value, now value` for each option with another value than in the plan."""
    then = trust.leaves(report["settings"])
    now = trust.leaves({section: settings[section] for section in compared(settings)})
    before, after = dict(then), dict(now)
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key) and key not in NOT_COMPARED]
    return [f"{key}={before.get(key)}, now {after.get(key)}" for key in keys]


def beside(report: Mapping[str, Any], metrics: Mapping[str, float]) -> Table:
    """A table of what a plan predicted and what the run measured."""
    table = Table(title="Plan and run")
    for heading in ("quantity", "predicted", "measured", "difference"):
        table.add_column(heading, justify="left" if heading == "quantity" else "right")
    for key, (name, metric, unit) in PREDICTED.items():
        if measured := metrics.get(metric):
            values = (f"{value:,.3f} {unit}" for value in (report[key], measured))
            table.add_row(name, *values, f"{report[key] / measured - 1:+.0%}")
    return table
