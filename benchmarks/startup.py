"""Seconds of `train.py --help`, of a tiny run and its first step, and of the first step of the default run.

The weights of the default run were converted before, as in every start but the first.

python -m benchmarks.startup
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
TINY = ("llm=tiny", "encoder=tiny", "trainer=cpu", "trainer.max_steps=2", "trainer.val_check_interval=2")
DEFAULT = "first step of the default run"


def until(text: str | None, *options: str) -> float:
    """Seconds until `train.py` prints `text`, or until it ends."""
    start = time.perf_counter()
    command = [sys.executable, "-u", "train.py", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if text is not None and text in line:
                spent = time.perf_counter() - start
                process.kill()
                return spent
        if process.wait() or text is not None:
            raise RuntimeError(f"train.py {' '.join(options)} ended without {text!r}")
    return time.perf_counter() - start


def compare(*, turns: int) -> dict[str, float]:
    found: dict[str, list[float]] = {"--help": [], "first step of tiny": [], "tiny run": [], DEFAULT: []}
    with tempfile.TemporaryDirectory() as folder:
        until("step 1/", f"run_dir={folder}/default")  # converts the weights
    for _ in range(turns):
        with tempfile.TemporaryDirectory() as folder:
            found["--help"].append(until(None, "--help"))
            found["first step of tiny"].append(until("step 1/2", *TINY, f"run_dir={folder}/first"))
            found["tiny run"].append(until(None, *TINY, f"run_dir={folder}/whole"))
            found[DEFAULT].append(until("step 1/", f"run_dir={folder}/default"))
    return {name: median(times) for name, times in found.items()}


if __name__ == "__main__":
    for name, seconds in compare(turns=int(os.environ.get("TURNS", "5"))).items():
        print(f"{name:<30}{seconds:6.2f} s")
