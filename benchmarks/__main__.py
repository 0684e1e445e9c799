"""Runs the speed benchmarks, and writes benchmarks/results.json and the table of docs/speed.md.

    python -m benchmarks [align] [lora] [mixed] [generate] [input] [growth] [startup] [default] [busy]

A benchmark that is not named keeps its earlier result. `TURNS=5` is how often each way is timed. On a GPU, align, lora,
mixed and generate are run, with a larger model, and their table is only printed.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import busy, data_path, generating, growth, models, startup, training_step
from benchmarks.turns import Timing

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results.json", ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- results: python -m benchmarks -->\n", "<!-- end of the results -->\n"
TURNS = int(os.environ.get("TURNS", "5"))


def peak_flops() -> float:
    """Operations a second of a large matrix product in the precision of the benchmarks, the best of ten."""
    dtype = torch.bfloat16 if models.BF16 else torch.float32
    a, b = (torch.randn(rows, 4096, dtype=dtype, device=models.DEVICE) for rows in (2048, 4096))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for a GPU
        times.append(time.perf_counter() - start)
    return 2 * a.shape[0] * a.shape[1] * b.shape[1] / min(times)


def flops_of(name: str) -> float:
    """Operations of the matrix products, attention and convolutions in a step of this project, on average."""
    from torch.utils.flop_counter import FlopCounterMode

    work = training_step.workload(name)
    model = training_step.ours(lora=work.lora).to(models.DEVICE)
    with FlopCounterMode(display=False) as counter, models.autocast():
        for batch in training_step.batches_of(work):
            on_device = batch.to(torch.device(models.DEVICE))
            training_step.LanguageModeling()(model, on_device).sums["lm_loss"].backward()
    return counter.get_total_flops() / work.num_steps


def of_timings(timings: dict[str, Timing], pieces: int = 1) -> dict[str, Any]:
    first = next(iter(timings.values()))
    return {
        name: {
            "seconds": timing.seconds / pieces,
            "cpu_seconds": median(timing.cpu) / pieces,
            "memory_gb": timing.memory_gb,
            "ratio": timing.seconds / first.seconds,
            "turns": len(timing.wall),
        }
        for name, timing in timings.items()
    }


def of_step(name: str) -> dict[str, Any]:
    work = training_step.workload(name)
    found = of_timings(training_step.compare(name, turns=TURNS), work.num_steps)
    flops = flops_of(name)
    found["vlm"] |= {"tflop": flops / 1e12, "of_peak": flops / found["vlm"]["seconds"] / peak_flops()}
    return found


def of_default() -> dict[str, Any]:
    """Seconds of a step of the default run and of the stages of the recipe."""
    found: dict[str, Any] = {}
    for name, options in {"default": (), "shapes_align_instruct": ("experiment=shapes_align_instruct",)}.items():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "train.py", *options, "seed=0", f"run_dir={folder}/run"]
            start = time.perf_counter()
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
            found[name] = {"seconds": time.perf_counter() - start, "stages": {}}
            for file in sorted(Path(folder).rglob("metrics.json")):
                stage = "" if file.parent.name == "run" else file.parent.name
                figures = json.loads(file.read_text())
                found[name]["stages"][stage] = {key: figures[key] for key in OF_STAGE}
    return found


BENCHMARKS: dict[str, Callable[[], dict[str, Any]]] = {
    "align": lambda: of_step("align"),
    "lora": lambda: of_step("lora"),
    "mixed": lambda: of_step("mixed"),
    "generate": lambda: of_timings(generating.compare(turns=TURNS)),
    "input": lambda: data_path.compare(turns=2 * TURNS),
    "growth": lambda: growth.compare(turns=TURNS),
    "startup": lambda: startup.compare(turns=TURNS),
    "default": of_default,
    "busy": lambda: {
        name: {"alone": alone, "busy": beside}
        for name, (alone, beside) in busy.compare(turns=max(2, TURNS // 2)).items()
    },
}
OF_STAGE = ("time/fit_seconds", "perf/step_seconds", "val/visual_gain", "val/exact_match")
TITLES = {
    "align": f"An align step: 8 rows of one image ({models.NUM_VISUAL} visual tokens) and 64 tokens, 48 supervised",
    "lora": "The same with LoRA, r = 16, on all linear layers",
    "mixed": "LoRA on rows of 16 to 512 tokens with none, one or two images; `Trainer` groups them by length",
    "generate": "64 images, one question, 32 new tokens, batches of 16",
}


def tables(content: dict[str, Any]) -> str:
    """The results in Markdown."""
    machine, results = content["machine"], content["results"]
    lines = [f"{machine['cpu']}, {machine['threads']} threads, {machine['precision']}, PyTorch {machine['torch']}, "
             f"Transformers {machine['transformers']}; medians. A large product in this precision runs at "
             f"{machine['peak_gflops']:,.0f} GFLOP/s.\n"]  # fmt: skip
    lines += ["| work | way | turns | seconds | times ours | peak memory, GB |", "|---|---|---:|---:|---:|---:|"]
    for name, title in TITLES.items():
        for way, row in results.get(name, {}).items():
            figures = f"{row['turns']} | {row['seconds']:.2f} | {row['ratio']:.2f} | {row['memory_gb']:.2f}"
            lines.append(f"| {title} | {way.replace('vlm', 'this project')} | {figures} |")
            title = ""
    for name in ("align", "lora", "mixed"):
        if "tflop" in (row := results.get(name, {}).get("vlm", {})):
            lines.append(f"\n`{name}` computes {row['tflop']:.2f} TFLOP a step, at {row['of_peak']:.0%} of that speed.")
    if "input" in results:
        mine, other = results["input"]["vlm"], results["input"]["LlavaProcessor"]
        lines.append(
            f"\nFrom JPEG files of 640×480 to a batch of conversations on one core: {1 / mine:.0f} samples a second, "
            f"{other / mine:.2f} times as many as with `LlavaProcessor` ({1 / other:.0f})."
        )
    if growth_rows := results.get("growth"):
        lines += ["\n| when it doubles | time grows by | memory grows by |", "|---|---:|---:|"]
        names = {"T": "text tokens", "K": "visual tokens", "B": "rows", "V": "vocabulary"}
        for name, row in growth_rows.items():
            values = f"{names[name]} ({row['values'][0]:,} to {row['values'][-1]:,})"
            lines.append(f"| {values} | {2 ** row['time_exponent']:.2f} | {2 ** row['memory_exponent']:.2f} |")
    if "startup" in results:
        lines += ["\n| start | seconds |", "|---|---:|"]
        lines += [f"| {name} | {seconds:.2f} |" for name, seconds in results["startup"].items()]
    if "busy" in results:
        lines += ["\n| waiting threads | tokens/s alone | beside two busy processes |", "|---|---:|---:|"]
        lines += [f"| {name} | {row['alone']:.0f} | {row['busy']:.0f} |" for name, row in results["busy"].items()]
    if "default" in results:
        lines += [
            "\n| run | seconds | of them training | a step | visual gain | exact |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for name, row in results["default"].items():
            total = f"{row['seconds']:.0f}"
            for stage, values in row["stages"].items():
                fit, step, gain, exact = (values[key] for key in OF_STAGE)
                title = f"`{name}`, {stage}" if stage else f"`{name}`"
                lines.append(f"| {title} | {total} | {fit:.0f} | {step:.2f} | {gain:.2f} | {exact:.0%} |")
                total = ""
    return "\n".join(lines) + "\n"


def device_name() -> str:
    if models.ON_GPU:
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def main(names: list[str]) -> None:
    if unknown := set(names) - BENCHMARKS.keys():
        raise SystemExit(f"there is no benchmark {min(unknown)}; choose from {', '.join(BENCHMARKS)}")
    stored = RESULTS.exists() and not models.ON_GPU
    content = json.loads(RESULTS.read_text()) if stored else {"machine": {}, "results": {}}
    content["machine"] |= {
        "cpu": device_name(),
        "threads": torch.get_num_threads(),
        "precision": models.PRECISION,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "peak_gflops": peak_flops() / 1e9,
    }
    for name in names or list(TITLES if models.ON_GPU else BENCHMARKS):
        print(f"{name} …", flush=True)
        content["results"][name] = BENCHMARKS[name]()
        if models.ON_GPU:
            continue
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
        page = PAGE.read_text()
        before, after = page.partition(BEGIN)[0], page.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n{tables(content)}\n{END}{after}")
    print(tables(content))


if __name__ == "__main__":
    main(sys.argv[1:])
