"""jobs.jsonl of a sweep's folder: which jobs it started, in which order, with which options, and which failed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm import files

FILE = "jobs.jsonl"
MAX_BYTES = 2**26


@dataclass(frozen=True)
class Job:
    """A job of a sweep.

    Attributes:
        folder: its folder, from that of the sweep.
        num: its number, from 0.
        options: its command-line options by key.
        error: why it failed, else None.
        is_last: whether the last command in the sweep's folder has started it.
    """

    folder: str
    num: int
    options: Mapping[str, str]
    error: str | None = None
    is_last: bool = True


def start_sweep(folder: Path, *, num_jobs: int | None) -> None:
    """Note that a command has started a sweep in this folder, with so many jobs where that is known."""
    folder.mkdir(parents=True, exist_ok=True)
    _append(folder, {"num_jobs": num_jobs})


def start_job(folder: Path, job: str, *, num: int, options: Sequence[str]) -> None:
    """Note that a job has started."""
    _append(folder, {"job": job, "num": num, "options": list(options)})


def fail_job(folder: Path, job: str, *, error: str) -> None:
    """Note that a job has failed."""
    _append(folder, {"job": job, "error": error})


def num_jobs(folder: Path) -> int | None:
    """The number of jobs of the last command."""
    found = [line["num_jobs"] for line in _lines(folder / FILE) if "num_jobs" in line]
    return found[-1] if found else None


def read_jobs(file: Path) -> list[Job]:
    """The jobs of all commands, those of the last command first, in its order."""
    jobs: dict[str, Job] = {}
    for line in _lines(file):
        name = line.get("job")
        if "num_jobs" in line:
            jobs = {name: replace(job, is_last=False) for name, job in jobs.items()}
        elif not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            continue  # not below the sweep's folder
        elif "num" in line and isinstance(line.get("options"), list):
            pairs = (str(option).partition("=") for option in line["options"])
            options = {key.lstrip("+~"): value for key, _, value in pairs}
            jobs[name] = Job(folder=name, num=int(line["num"]), options=options)
        elif "error" in line and name in jobs:
            jobs[name] = replace(jobs[name], error=str(line["error"]))
    return sorted(jobs.values(), key=lambda job: (not job.is_last, job.num))


def _append(folder: Path, content: Mapping[str, Any]) -> None:
    with files.append(folder / FILE) as file:
        file.write(json.dumps(content) + "\n")


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        return
    for line in files.read(file, max_bytes=MAX_BYTES).decode(errors="replace").splitlines():
        try:
            content = json.loads(line)
        except ValueError:  # cut, because the disk was full
            continue
        if isinstance(content, dict):
            yield content
