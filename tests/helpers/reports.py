"""Run directories written by hand, as a sweep leaves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from vlm.report import jobs
from vlm.training.trust import NEEDED


def write_run(folder: Path, *, seed: int = 0, lines: tuple[dict, ...] = (), **metrics: Any) -> None:
    """A finished run with these metrics; `loss` stands for val/loss."""
    (folder / "artifact").mkdir(parents=True)
    settings = {**{key: {} for key in NEEDED}, "seed": seed, "connector": {"lr": 0.1}, "choices": {"connector": "mlp"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    named = {"val/loss" if name == "loss" else name: value for name, value in metrics.items()}
    (folder / "metrics.json").write_text(json.dumps({"status": "finished", **named}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "artifact" / "manifest.json").write_text(json.dumps({"num_image_tokens": 64}))


def write_results(run: Path, benchmark: str, metrics: dict[str, dict[str, float | None]], **other: Any) -> None:
    """What eval.py leaves of a benchmark."""
    folder = run / "eval" / benchmark
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"metrics": metrics, **other}))


def write_sweep(root: Path, losses: dict[str, list[float]], *, key: str = "connector") -> None:
    """A finished job for each value of an option and each seed, in that order."""
    jobs.start_sweep(root, num_jobs=sum(map(len, losses.values())))
    num = 0
    for option, values in losses.items():
        for seed, loss in enumerate(values):
            name = f"{key}={option},seed={seed}"
            jobs.start_job(root, name, num=num, options=[f"{key}={option}", f"seed={seed}", "llm=tiny"])
            parameters = {"params/trainable": 1000.0 * len(option), "perf/step_seconds": 0.1}
            score = {"val/exact_match": 1 - loss, "val/exact_match_constant": 0.25, "val/num_answers": 128}
            lines = tuple({"step": step, "train/loss": loss + 1 / step, "val/loss": loss} for step in (10, 20))
            write_run(root / name, seed=seed, lines=lines, loss=loss, **parameters, **score)
            num += 1
