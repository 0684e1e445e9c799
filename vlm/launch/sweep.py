"""A sweep of train.py -m: it numbers its jobs, goes on when one fails, and ends with the tables of vlm-report.

The same command again in the same folder leaves finished jobs as they are and resumes the others.
"""

from __future__ import annotations

import math
import os
import re
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.experimental.callback import Callback
from hydra.types import RunMode

from vlm.files import escape_controls
from vlm.ranges import NUM_STEPS
from vlm.report import jobs


def folder_name(options: str) -> str:
    r"""The options of a job as the name of one folder: paths have _ for /, and Hydra's quotes and \ are dropped."""
    return re.sub(r"[\\'\"]", "", options).replace("/", "_")


def place_in_sweep(hydra: Any) -> dict[str, str | None]:
    """The names of a run's `sweep` and of its `job` in it, both by their folders; None for a run of its own."""
    root, folder = Path(hydra.runtime.cwd, hydra.sweep.dir), Path(hydra.runtime.output_dir)
    if not folder.is_relative_to(root):
        return {"job": None, "sweep": None}
    return {"job": str(folder.relative_to(root)), "sweep": root.name}


def start_job() -> None:
    """Print which job of the sweep this is, and note it in the sweep's folder."""
    hydra = HydraConfig.get()
    root, job = _root_and_job()
    jobs.start_job(root, job, num=hydra.job.num, options=list(hydra.overrides.task))
    num = jobs.num_jobs(root)
    print(f"\nJob {hydra.job.num + 1}{f' of {num}' if num else ''}: {escape_controls(job)}", flush=True)


def record_failure(message: str) -> None:
    """Note that this job has failed, for the process that started the sweep."""
    root, job = _root_and_job()
    jobs.fail_job(root, job, error=message)


def figure(settings: Any, run_dir: Path) -> float | None:
    """What a job of a sweep returns to Hydra's sweeper: `sweep.metric` of its run. None outside a sweep.

    Raises ValueError where the run has no such figure.
    """
    from vlm.training import run

    if HydraConfig.get().mode != RunMode.MULTIRUN or not run.is_rank_zero():
        return None
    metrics, name = run.read_metrics(run_dir), settings["sweep"]["metric"]
    if name not in metrics:
        raise ValueError(f"sweep.metric={name} is not a figure of this run; choose one of {', '.join(sorted(metrics))}")
    return float(metrics[name])


def continues(settings: dict[str, Any], run_dir: Path) -> bool:
    """Whether an earlier command has started this job of a sweep, whose loggers `settings` then get.

    Raises ValueError where that run has other settings.
    """
    from vlm import config
    from vlm.launch.resume import differences

    if HydraConfig.get().mode != RunMode.MULTIRUN or not (run_dir / "config.yaml").exists():
        return False
    before, _, _ = config.stored_config(run_dir)
    if changed := differences(before, settings):
        values = ", ".join(f"{key} was {old} and is {new}" for key, (old, new) in changed.items())
        raise ValueError(f"{run_dir} holds a run with other settings: {values}; set hydra.sweep.dir= to another folder")
    settings["logger"] = before["logger"]  # they have the id of the run at a logging service
    return True


def number_of_jobs(config: Any) -> int | None:
    """How many jobs a sweep has; None where the sweeper alone knows."""
    sweeper = config.hydra.sweeper
    if "n_trials" in sweeper:
        return int(sweeper.n_trials)
    given = [*(f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()), *config.hydra.overrides.task]
    counts = {}
    for each in OverridesParser.create().parse_overrides(given):
        is_sweep = each.is_sweep_override()
        if is_sweep and (not each.is_discrete_sweep() or isinstance(each.value(), Glob)):
            return None
        counts[each.get_key_element()] = len(list(each.sweep_string_iterator())) if is_sweep else 1
    return math.prod(counts.values())


class SweepReport(Callback):
    """Hydra calls it around a sweep: it prints the tables at the end, and exits with 2 where jobs have failed."""

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        jobs.start_sweep(Path(config.hydra.sweep.dir), num_jobs=number_of_jobs(config))
        sweep: Any = config.get("sweep") or {}  # eval.py has none
        if match := sweep.get("match"):
            print(f"Equal budget: every job trains for {_budget(config, match)} (sweep.match={match})", flush=True)

    def on_multirun_end(self, config: Any, **_: Any) -> None:
        root = Path(config.hydra.sweep.dir)
        _show(root)
        failed = [job for job in jobs.read_jobs(root / jobs.FILE) if job.is_last and job.error]
        if not failed:
            return
        names = "; ".join(f"{job.folder} ({job.error})" for job in failed)
        count = "1 job of the sweep" if len(failed) == 1 else f"{len(failed)} jobs of the sweep"
        print(f"Error: {count} failed, the others ran: {escape_controls(names)}", file=sys.stderr)
        sys.exit(2)


def _budget(config: Any, match: str) -> str:
    """What `sweep.match` gives every job."""
    if match != "steps":
        return f"{config.sweep.budget:,} {match}"
    if (num := config.trainer.max_steps) != "auto":
        return f"{num:,} steps"
    epochs = config.data.get("epochs")
    return f"{NUM_STEPS:,} steps" if epochs is None else f"data.epochs={epochs:g}"


def _show(root: Path) -> None:
    """Print the tables of the runs in the sweep's folder, if there are any: eval.py and plan=true make none."""
    from vlm.report import page
    from vlm.report.runs import read_runs
    from vlm.report.tables import Comparison
    from vlm.training.run import CONSOLE

    if not any(root.rglob("config.yaml")):
        return
    page.show(Comparison(read_runs([root])))
    CONSOLE.print(f"Sweep: {root} (vlm-report {root} writes a page with pictures)", soft_wrap=True)


def _root_and_job() -> tuple[Path, str]:
    """The sweep's folder, and that of this job from there."""
    hydra = HydraConfig.get()
    root = Path(hydra.runtime.cwd, hydra.sweep.dir)
    return root, os.path.relpath(hydra.runtime.output_dir, root)
