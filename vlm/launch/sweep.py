"""Failed jobs of a sweep: the others still run, and the sweep exits with 2."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback

from vlm.files import escape_controls

FILE = "failed_jobs.jsonl"  # in the sweep's folder, because a launcher may run the jobs in other processes


def folder_name(options: str) -> str:
    r"""The options of a job as the name of one folder: paths have _ for /, and Hydra's quotes and \ are dropped."""
    return re.sub(r"[\\'\"]", "", options).replace("/", "_")


def place_in_sweep(hydra: Any) -> dict[str, str | None]:
    """The names of a run's `sweep` and of its `job` in it, both by their folders; None for a run of its own."""
    root, folder = Path(hydra.runtime.cwd, hydra.sweep.dir), Path(hydra.runtime.output_dir)
    if not folder.is_relative_to(root):
        return {"job": None, "sweep": None}
    return {"job": str(folder.relative_to(root)), "sweep": root.name}


def record_failure(message: str) -> None:
    """Note that this job has failed, for the process that started the sweep."""
    hydra = HydraConfig.get()
    root = Path(hydra.runtime.cwd, hydra.sweep.dir)
    job = os.path.relpath(hydra.runtime.output_dir, root)
    with open(root / FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps({"job": job, "error": message}) + "\n")


class FailedJobs(Callback):
    """Hydra calls it around a sweep: it names the failed jobs at the end and exits with 2."""

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        Path(config.hydra.sweep.dir, FILE).unlink(missing_ok=True)

    def on_multirun_end(self, config: Any, **_: Any) -> None:
        file = Path(config.hydra.sweep.dir, FILE)
        if not file.exists():
            return
        failed = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        names = "; ".join(f"{each['job']} ({each['error']})" for each in failed)
        jobs = "1 job of the sweep" if len(failed) == 1 else f"{len(failed)} jobs of the sweep"
        print(f"Error: {jobs} failed, the others ran: {escape_controls(names)}", file=sys.stderr)
        sys.exit(2)
