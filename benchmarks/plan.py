"""Predictions of `plan=true` beside what runs measure: `python -m benchmarks.plan [name …]`.

Each configuration is planned and then run for `STEPS` steps at once after it, so that both find the machine in the same
state. The table says by how much memory and time of the plan differ from those of the run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
STEPS = 12
CONFIGURATIONS: dict[str, list[str]] = {
    "default": [],
    "byte LLM": ["encoder=tiny", "llm=tiny"],
    "LoRA": ["stage=instruct"],
    "Q-Former": ["connector=qformer", "connector.depth=6"],
    "last blocks of the encoder": ["stage=vision_tune"],
    "batch of 24": ["data.batch_size=24"],
    "checkpointing": ["stage=instruct", "llm.gradient_checkpointing=true"],
    "all of the LLM": ["stage=full", "data.batch_size=4", "llm=smollm2_360m", "llm.weights=random"],
}
KEYS = {"peak_memory_gb": "perf/peak_memory_gb", "step_seconds": "perf/step_seconds"}


def compare(options: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """What the plan predicts and what the run measures."""
    with tempfile.TemporaryDirectory() as folder:
        file, run_dir = f"{folder}/plan.json", f"{folder}/run"
        command = [sys.executable, "train.py", *options]
        _start([*command, "plan=true", f"plan.json={file}"])
        steps = [f"trainer.max_steps={STEPS}", f"trainer.val_check_interval={STEPS * 8}", "data.num_val_samples=8"]
        _start([*command, *steps, "evaluators=none", f"plan.against={file}", f"run_dir={run_dir}"])
        plan = json.loads(Path(file).read_text())
        metrics = json.loads(Path(run_dir, "metrics.json").read_text())
    return {key: plan[key] for key in KEYS}, {key: metrics[name] for key, name in KEYS.items()}


def _start(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")


def main(names: list[str]) -> None:
    print("| configuration | options | memory: plan | run | difference | step: plan | run | difference |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for name in names or list(CONFIGURATIONS):
        plan, run = compare(CONFIGURATIONS[name])
        cells = [name, f"`{' '.join(CONFIGURATIONS[name])}`" if CONFIGURATIONS[name] else ""]
        for key, unit in zip(KEYS, ("GB", "s"), strict=True):
            cells += [f"{plan[key]:.2f} {unit}", f"{run[key]:.2f} {unit}", f"{plan[key] / run[key] - 1:+.0%}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
