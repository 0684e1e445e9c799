"""One command, several processes: each of them runs train.py from its first line, and they must agree."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.types import RunMode

from vlm import build


def check_ranks(hydra: Any) -> None:
    """Raise ValueError where torchrun or srun started several processes that each chose the time in their folder."""
    num = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)
    given = [*hydra.overrides.task, *hydra.overrides.hydra]
    named = any(override.startswith(("run_dir=", "resume=", "hydra.run.dir=")) for override in given)
    if num > 1 and not named and hydra.launcher["_target_"].endswith(".BasicLauncher"):
        raise ValueError(f"{num} processes were started and need one run directory between them; set run_dir=<folder>")


def in_its_own_process(hydra: Any, settings: Mapping[str, Any], script: str) -> bool:
    """Whether this job of a sweep was one for several devices, and has been run in a process made for it.

    Lightning starts the other ranks by the command line, which is that of the whole sweep here, and leaves the process
    in a state that no second job can start from.
    """
    if hydra.mode != RunMode.MULTIRUN:
        return False
    run_dir = Path(hydra.runtime.output_dir)
    trainer = build.build_trainer({**settings, "logger": {}, "callbacks": {}}, run_dir, [])
    outside = getattr(getattr(trainer.strategy, "cluster_environment", None), "creates_processes_externally", False)
    if trainer.world_size == 1 or outside:
        return False
    quoted = str(run_dir).replace("'", r"\'")
    process = subprocess.Popen([sys.executable, script, *hydra.overrides.task, f"run_dir='{quoted}'"])
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:  # the job has had the Ctrl-C too, and ends after its step
            pass
    if code:
        sys.exit(code)
    return True
