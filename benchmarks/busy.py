"""The default run alone and beside two other single-threaded processes, with several settings of waiting threads.

Tokens a second of `train.py`, in turns. The first setting is the default (`vlm.launch.entry.sleep_early`).

    python -m benchmarks.busy
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=300000": {"GOMP_SPINCOUNT": "300000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
SHORT = (
    *("trainer.max_steps=12", "trainer.val_check_interval=12", "data.num_val_samples=4", "seed=0"),
    *("evaluators.answers.num_samples=2", "evaluators.answers.max_new_tokens=2"),
)


def _turn() -> None:
    number = 0
    while True:
        number += 1


@contextmanager
def others(number: int) -> Iterator[None]:
    """Context in which this many processes keep a core busy each."""
    processes = [multiprocessing.Process(target=_turn, daemon=True) for _ in range(number)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def tokens_per_second(setting: dict[str, str], *options: str) -> float:
    """The speed of a short default run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", *SHORT, *options, f"run_dir={folder}/run"]
        subprocess.run(command, cwd=ROOT, env={**os.environ, **setting}, check=True, capture_output=True)
        return float(json.loads(Path(folder, "run", "metrics.json").read_text())["perf/tokens_per_second"])


def compare(*, turns: int) -> dict[str, tuple[float, float]]:
    """For each setting the median speed alone and beside two processes."""
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in SETTINGS}
    for _ in range(turns):
        for name, setting in SETTINGS.items():
            for number, speeds in zip((0, 2), found[name], strict=True):
                with others(number):
                    speeds.append(tokens_per_second(setting))
    return {name: (median(alone), median(busy)) for name, (alone, busy) in found.items()}


if __name__ == "__main__":
    results = compare(turns=int(os.environ.get("TURNS", "3")))
    fastest = max(alone for alone, _ in results.values())
    for name, (alone, busy) in results.items():
        print(f"{name:<26}{alone:8.0f} tokens/s alone{busy:8.0f} busy   busy/fastest alone {busy / fastest:.2f}")
