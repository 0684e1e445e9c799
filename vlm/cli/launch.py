"""One command, several processes: each of them runs train.py from its first line, and they must agree."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.types import RunMode

from vlm import build
from vlm.data.workers import SIGNALS

FORWARDED = (*SIGNALS, signal.SIGHUP)


def num_processes() -> int:
    """How many processes torchrun or srun started for this one command."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)


def check_ranks(hydra: Any) -> None:
    """Raise ValueError where torchrun or srun started several processes that each chose the time in their folder."""
    num = num_processes()
    given = [*hydra.overrides.task, *hydra.overrides.hydra]
    named = any(override.startswith(("run_dir=", "hydra.run.dir=")) for override in given)
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
    options = [*hydra.overrides.task, *searchpath(hydra), f"run_dir='{quoted}'"]
    if code := wait_for([sys.executable, script, *options]):
        sys.exit(code)
    return True


def searchpath(hydra: Any) -> list[str]:
    """The user's own config folders, as an override for a process that this one starts."""
    added = [s for s in hydra.runtime.config_sources if s.provider not in ("hydra", "main", "schema")]
    folders = ",".join(f"'{source.schema}://{source.path}'" for source in added)
    return [f"hydra.searchpath=[{folders}]"] if added else []


def wait_for(command: Sequence[str]) -> int:
    """The exit code of a command, as a shell tells it; the signals that would end this process go to the command.

    Those that this process ignores, as nohup has it ignore SIGHUP, the command ignores too.
    """
    received: list[int] = []
    heard = [signum for signum in FORWARDED if signal.getsignal(signum) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, lambda signum, _: received.append(signum)) for signum in heard}
    try:
        # In a group of its own, or Ctrl-C would reach it twice: from the terminal and from here.
        process = subprocess.Popen(command, process_group=0)
        sent = 0
        while process.poll() is None:
            for signum in received[sent:]:
                process.send_signal(signum)
                sent += 1
            time.sleep(0.05)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    code = process.returncode
    return 128 - code if code < 0 else code or (128 + received[0] if received else 0)
