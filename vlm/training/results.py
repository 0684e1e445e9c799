"""The end of a run: metrics.json, and its metrics and answers as printed tables."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from vlm.files import escape_controls
from vlm.schema import is_loss
from vlm.training.artifact import write_json
from vlm.training.run import CONSOLE, Status

GROUPS = {
    "val/": "Validation",
    "text/": "Text without images",
    "train/": "Training, last step",
    "time/": "Time",
    "perf/": "Speed and memory",
    "plan/": "Predicted by the plan",
    "params/": "Parameters",
    "": "Other",
}
FIRST = ("val/loss", "val/lm_loss", "val/loss_shuffled", "val/loss_blank", "val/visual_gain")  # of their group
UNITS = {
    "train/tokens": "supervised tokens",
    "time/fit_seconds": "seconds of training and of the validations in it",
    "perf/tokens_per_second": "tokens per second and process",
    "perf/samples_per_second": "samples per second and process",
    "perf/step_seconds": "seconds per step, validation excluded",
    "perf/peak_memory_gb": "10⁹ bytes",
    "plan/peak_memory_gb": "10⁹ bytes",
    "plan/step_seconds": "seconds per step",
    "val/visual_rms": "root mean square of the visual tokens",
    "val/embed_rms": "root mean square of the LLM's token embeddings",
}
MEANING: dict[Status, str] = {
    "finished": "all steps and metrics are done",
    "stopped": "a signal came first; resume=<run directory> continues",
    "time_up": "trainer.max_time was over first; resume=<run directory> continues",
    "failed": "the training is done, but a metric failed, see the error; resume=<run directory> computes it again",
}
LINES = 3  # of a cell in the table of answers


def finish(
    run_dir: Path, metrics: dict[str, float], samples: Sequence[dict[str, Any]], status: Status = "finished"
) -> None:
    """Write metrics.json with the status; print the metrics, a few answers and the status."""
    write_json(run_dir / "metrics.json", {"status": status, **metrics})
    print_metrics(metrics)
    print_samples(samples)
    CONSOLE.print(f"Status: {status} ({MEANING[status]})", soft_wrap=True)
    CONSOLE.print(f"Run directory: {run_dir}", soft_wrap=True)


def print_metrics(metrics: Mapping[str, float]) -> None:
    """Print the metrics in groups, with units; below, the losses that `val/loss` and the visual gain sum.

    A score of answers has its number of answers, its interval and the best answers without the image beside it, not in
    lines of their own.
    """
    table = Table(title="Result")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("unit")
    beside = {each for name in metrics if is_score(name, metrics) for each in names_beside(name)}
    left = sorted(metrics.keys() - beside, key=[*FIRST, *metrics].index)
    for prefix, title in GROUPS.items():
        names = [name for name in left if name.startswith(prefix)]
        left = [name for name in left if name not in names]
        if names:
            table.add_section()
            table.add_row(Text(title, "bold"))
        for name in names:
            table.add_row(name, format_metric(metrics[name]), _unit(name, metrics))
    CONSOLE.print(table)
    if losses := _losses(metrics):
        CONSOLE.print(f"val/loss and val/visual_gain hold {' + '.join(losses)}", soft_wrap=True)


def _losses(metrics: Iterable[str]) -> list[str]:
    """The names of the losses that `val/loss` sums."""
    return [name for name in metrics if name.startswith("val/") and is_loss(name.removeprefix("val/"))]


class Beside(NamedTuple):
    """The names of the metrics that stand beside a score.

    They are its number of answers, the score of the best constant answer, that of the best answers without the image,
    and the bounds of its 95 % interval.
    """

    num: str
    constant: str
    no_image: str
    low: str
    high: str


def names_beside(score: str) -> Beside:
    """The names of what stands beside a score. A run of an earlier version has the first two alone."""
    group, _, rest = score.partition("/")
    name, slash, type_ = rest.partition("/")
    others = (f"{group}/{name}_{other}{slash}{type_}" for other in Beside._fields[1:])
    return Beside(f"{group}/num_answers{slash}{type_}", *others)


def is_score(name: str, metrics: Container[str]) -> bool:
    """Whether a metric is a score of answers: the number of answers and the best constant answer are beside it."""
    beside = names_beside(name)
    return beside.num in metrics and beside.constant in metrics


def _unit(name: str, metrics: Mapping[str, float]) -> str:
    if is_score(name, metrics):
        num, constant, no_image, low, high = (metrics.get(each) for each in names_beside(name))
        interval = "" if low is None or high is None else f", 95 %: {low:.3f} to {high:.3f}"
        best = f"best constant answer: {constant:.3f}" if no_image is None else f"best without image: {no_image:.3f}"
        return f"{num:,.0f} answers{interval}; {best}"
    group, _, rest = name.partition("/")
    if "loss" in rest or rest in ("visual_gain", "forgetting"):
        return "nats per token" if group == "text" else unit_of_loss(metrics)
    if group in ("train", "val") and rest.startswith("num_"):
        return "samples"
    return UNITS.get(name, "")


def unit_of_loss(metrics: Iterable[str]) -> str:
    """Of val/loss and the visual gain of a run with these metrics; empty where losses of other units are in the sum."""
    return "nats per token" if set(_losses(metrics)) <= {"val/lm_loss"} else ""


def format_metric(value: int | float) -> str:
    """An integer with separators; a float with three decimals, without the sign of -0."""
    return f"{value:,}" if isinstance(value, int) else f"{value:z,.3f}"


def print_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; all columns but the first are numbers."""
    table = Table(title=title)
    words = [max(map(len, heading.split()), default=0) for heading in headings]
    fits = sum(words) + 3 * len(words) < CONSOLE.width  # else a heading is broken inside a word
    for number, heading in enumerate(headings):
        justify: Any = "right" if number else "left"
        width = words[number] if fits else None
        table.add_column(heading, justify=justify, no_wrap=not number, overflow="fold", min_width=width)
    for row in rows:
        table.add_row(*row)
    CONSOLE.print(table)


def print_samples(samples: Sequence[dict[str, Any]], num: int = 6, *, of: str = "validation samples") -> None:
    """Print the first answers with their question and reference, each cell cut after `LINES` lines."""
    if not samples:
        return
    shown = samples[:num]
    table = Table(title=f"{len(shown)} of {len(samples):,} answers to {of}")
    # Each of the 6 lines between and around the columns is 1 wide, each column has 2 spaces, the verdict 7 letters.
    id_width = min(32, max(len(escape_controls(sample["id"])) for sample in shown))
    width = max(10, (CONSOLE.width - 6 - 5 * 2 - 7 - id_width) // 3)
    table.add_column("sample", max_width=id_width)
    for heading in ("question", "prediction", "reference"):
        table.add_column(heading, max_width=width)
    table.add_column("verdict")
    for sample in shown:
        texts = (_cut(sample[key], width) for key in ("prompt", "prediction", "reference"))
        score = sample.get("score", math.nan)  # an answer without a reference has none
        wrong = Text("" if math.isnan(score) else f"{score:.2f}" if score else "wrong", "red")
        verdict = Text("correct", "green") if score == 1 else wrong
        table.add_row(_cut(sample["id"], id_width), *texts, verdict)
    CONSOLE.print(table)


def _cut(text: str, width: int) -> str:
    """The first lines of a text at a width; an ellipsis is in the place of the rest."""
    lines = Text(escape_controls(text.strip())).wrap(CONSOLE, width)
    if len(lines) > LINES:
        lines[LINES - 1].truncate(width - 1)
        lines[LINES - 1].append("…")
    return "\n".join(line.plain.rstrip() for line in lines[:LINES])
