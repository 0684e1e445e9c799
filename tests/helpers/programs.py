"""train.py, eval.py and vlm-artifact in this process, and what their runs leave behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import eval as evaluation
import train as training
from vlm.cli.artifact import main
from vlm.launch.entry import start
from vlm.training import run

ROOT = Path(__file__).parents[2]
TINY = ["llm=tiny", "encoder=tiny", "trainer=cpu", "debug=fast"]


QUICK = [
    *TINY,
    "encoder.image_size=32",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "data.num_val_samples=2",
    "evaluators.answers.num_samples=2",
    "evaluators.answers.max_new_tokens=2",
    "preflight.samples=2",
]


# Of a random LLM that writes different letters for different images and texts.
LIVELY = ["llm.config.tie_word_embeddings=false", "+llm.config.initializer_range=0.3"]


FILES = {
    "config.yaml",
    "metrics.jsonl",
    "metrics.json",
    "samples.jsonl",
    "artifact/weights.safetensors",
    "artifact/manifest.json",
    "checkpoints/last.ckpt",
    ".lock",
}


def of_answers(*types: str) -> set[str]:
    """The metrics of generated answers to questions of these types."""
    beside = ("", "_constant", "_no_image", "_low", "_high")
    of_type = {f"val/accuracy{name}/{type_}" for name in beside for type_ in types}
    of_type |= {f"val/num_answers/{type_}" for type_ in types}
    return {"val/num_answers", *(f"val/exact_match{name}" for name in beside), *of_type}


METRICS = {  # in metrics.json of a run on captions
    "train/loss",
    "val/loss",
    "val/loss_shuffled",
    "val/loss_blank",
    "val/visual_gain",
    "perf/tokens_per_second",
    "perf/samples_per_second",
    "perf/step_seconds",
    "perf/peak_memory_gb",
    "params/trainable",
    "params/total",
    "time/fit_seconds",
    "val/lm_loss",
    *of_answers("caption"),
    "val/visual_rms",
    "val/embed_rms",
    "status",
}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def call(job: Callable, config_name: str, *arguments: str) -> int:
    """The program, in this process; its exit code."""
    before = sys.argv, dict(os.environ)
    sys.argv = ["program", *arguments]
    try:
        start(job, config_name=config_name)
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before[0]
        os.environ.clear()
        os.environ.update(before[1])
    return 0


def train(*arguments: str) -> int:
    return call(training.train, "train", *arguments)


def evaluate(*arguments: str) -> int:
    return call(evaluation.evaluate, "eval", *arguments)


def artifact_program(*arguments: Any) -> int:
    return program(main, "vlm-artifact", *arguments)


def program(main: Callable[[], None], *arguments: Any) -> int:
    """A program of the package, in this process; its exit code."""
    before, sys.argv = sys.argv, [*map(str, arguments)]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def losses(run: Path) -> list[tuple[int, dict[str, float]]]:
    """What every line of metrics.jsonl says, but for speeds."""
    return [
        (line.pop("step"), {name: value for name, value in line.items() if not name.startswith("perf/")})
        for line in read(run / "metrics.jsonl")
    ]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "artifact" / "weights.safetensors")


def assert_same_run(run: Path, whole: Path) -> None:
    assert losses(run) == losses(whole)
    torch.testing.assert_close(weights(run), weights(whole), rtol=0, atol=0)


@contextmanager
def another_process(run_dir: Path) -> Iterator[tuple[int, int]]:
    """A process that holds the directory, and its data worker, by their ids."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def hold() -> None:
        lock = run.lock(run_dir, resumed=False)
        worker = context.Process(target=time.sleep, args=(60,))
        worker.start()
        theirs.send(worker.pid)
        time.sleep(60)
        assert lock

    process = context.Process(target=hold)
    process.start()
    worker = ours.recv() if ours.poll(120) else None
    try:
        assert process.pid is not None
        assert worker is not None, "the process did not start its worker within two minutes"
        yield process.pid, worker
    finally:
        process.kill()
        process.join()
        if worker is not None:  # os.kill(0, …) would end this process and its whole group
            os.kill(worker, signal.SIGKILL)


def until_stopped(options: list[str], run: Path, stop: signal.Signals, *, after: int) -> int:
    """A new run in a process of its own, sent `stop` once it has logged step `after`; its exit code."""
    command = [sys.executable, "train.py", *options, f"run_dir={run}"]
    same_sums = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with open(f"{run}.out", "w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=same_sums, stdout=out, stderr=out, process_group=0)
        try:
            until = time.monotonic() + 240
            while (
                not (run / "metrics.jsonl").exists() or f'"step": {after},' not in (run / "metrics.jsonl").read_text()
            ):
                assert process.poll() is None, Path(out.name).read_text()
                assert time.monotonic() < until
                time.sleep(0.01)
            process.send_signal(stop)
            return process.wait(timeout=60)
        finally:
            os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
