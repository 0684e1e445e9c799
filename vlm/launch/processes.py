"""Runs on several processes: each of them runs train.py from its first line, and all must agree."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from vlm import build
from vlm.data.workers import SIGNALS
from vlm.launch.overrides import override

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


def check_machine(settings: Mapping[str, Any], run_dir: Path) -> Any:
    """The trainer without callbacks and loggers, made before anything loads, to refuse early.

    Raises ValueError for more devices than the machine has, for machines on which nothing starts the run, and for
    processes that would each train alone.
    """
    asked = settings["trainer"]
    num, gpus = asked.get("devices", "auto"), _num_gpus(asked["accelerator"])
    if isinstance(num, int) and num > gpus > 0:
        raise ValueError(_too_many(num, gpus, "GPUs"))
    if not gpus and asked["accelerator"] in ("auto", "cpu") and not re.fullmatch(r"auto|\d+", str(num)):
        raise ValueError(
            f"trainer.devices={num} is for GPUs, and this run is on the CPU; set a number of processes, such as 1"
        )
    trainer = build.build_trainer({**settings, "logger": {}, "callbacks": {}}, run_dir)
    if (started := num_processes()) > 1 and trainer.world_size == 1:
        raise ValueError(
            f"{started} processes were started, but trainer.devices={trainer.num_devices} uses 1; set trainer=ddp and "
            "trainer.devices=<processes on a machine>"
        )
    if started_from_outside(trainer):
        return trainer
    if trainer.num_nodes > 1 and "MASTER_ADDR" not in os.environ:
        raise ValueError(
            f"trainer.num_nodes={trainer.num_nodes} needs the command on {trainer.num_nodes} machines, and it was "
            "started on 1; start it with torchrun or srun, or set trainer.num_nodes=1"
        )
    cores = os.cpu_count() or 1
    if not gpus and trainer.num_devices > cores:
        raise ValueError(_too_many(trainer.num_devices, cores, "CPU cores"))
    return trainer


def _num_gpus(accelerator: str) -> int:
    """How many devices this machine has for an accelerator of Lightning's; 0 for the CPU."""
    return torch.accelerator.device_count() if accelerator != "cpu" and torch.accelerator.is_available() else 0


def _too_many(asked: int, available: int, what: str) -> str:
    return f"trainer.devices={asked} is more than the number of {what} here, {available}; set {available} at most"


def started_from_outside(trainer: Any) -> bool:
    """Whether all processes of a run are there already, from torchrun, srun or Lightning's own start."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return trainer.world_size == 1 or getattr(environment, "creates_processes_externally", False)


def run_apart(trainer: Any, script: str, *, resumes: bool) -> bool:
    """Whether this job of a sweep was one for several devices, and has been run in a process made for it.

    Lightning starts the other ranks by the command line, which is that of the whole sweep here, and leaves the process
    in a state that no second job can start from.
    """
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN or started_from_outside(trainer):
        return False
    folders = {"run_dir": hydra.runtime.output_dir, "hydra.sweep.dir": hydra.sweep.dir}
    if resumes:
        folders["resume.run"] = hydra.runtime.output_dir
    options = [override(key, str(folder)) for key, folder in folders.items()]
    if code := wait_for([sys.executable, script, *hydra.overrides.task, *searchpath(hydra), *options]):
        sys.exit(code)
    return True


def searchpath(hydra: Any) -> list[str]:
    """The user's own config folders, as an override for a process that this one starts."""
    added = [s for s in hydra.runtime.config_sources if s.provider not in ("hydra", "main", "schema")]
    folders = ",".join(f"'{source.schema}://{source.path}'" for source in added)
    return [f"hydra.searchpath=[{folders}]"] if added else []


def wait_for(command: Sequence[str]) -> int:
    """The exit code of a command, as a shell reports it; the signals that would end this process go to the command.

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
