"""The runs below some folders, read from the files that they wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlm import files
from vlm.report.jobs import FILE, Job, read_jobs
from vlm.training import run, trust
from vlm.training.results import is_score, names_beside

MAX_BYTES = 2**28  # of a file
COSTS = {
    "params/trainable": "trainable parameters",
    "visual_tokens": "visual tokens in the input",
    "perf/step_seconds": "seconds per step",
}
LOWER_IS_BETTER = ("loss", "forgetting", "nats")  # words in the names of figures
# Beginnings of keys that change no figure, or follow from other keys.
IGNORED = ("run_dir", "resume", "plan", "preflight", "logger", "callbacks", "cwd", "run_id", "choices", "sweep")


@dataclass(frozen=True)
class Score:
    """A figure of answers, beside what one constant answer, and the best answers without the image, would get.

    None stands for what an earlier version did not measure.
    """

    value: float
    num: int
    constant: float | None
    low: float | None = None
    high: float | None = None
    no_image: float | None = None


@dataclass(frozen=True)
class Run:
    """What a run directory holds.

    Attributes:
        name: its folder from the folder of the report.
        status: as in metrics.json, "failed" for a job that ended with an error, or "unfinished".
        options: the command-line options of a job of a sweep, by key.
        choices: the option of each config group.
        settings: every other value of config.yaml, by its dotted key.
        figures: losses and visual gain, and what the run costs, by name.
        scores: the score over all validation answers, and the headline score of each benchmark, by name.
        details: all scores of the validation answers and of each benchmark, those by type of question too.
        lines: metrics.jsonl.
        samples: samples.jsonl.
        metric: the figure that a search looks at, `sweep.metric`.
        error: why the job failed.
    """

    folder: Path
    name: str
    status: str
    options: Mapping[str, str] = field(default_factory=dict)
    choices: Mapping[str, str | None] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, Score] = field(default_factory=dict)
    details: Mapping[str, Mapping[str, Score]] = field(default_factory=dict)
    lines: Sequence[Mapping[str, float]] = ()
    samples: Sequence[Mapping[str, Any]] = ()
    metric: str = "val/loss"
    error: str | None = None

    @property
    def is_finished(self) -> bool:
        return self.status == "finished"

    @property
    def qualities(self) -> dict[str, float]:
        """All figures that say how good the run is."""
        losses = {name: value for name, value in self.figures.items() if name not in COSTS}
        return losses | {name: score.value for name, score in self.scores.items()}


def is_loss(name: str) -> bool:
    """Whether a lower value of a figure is better."""
    return any(word in name for word in LOWER_IS_BETTER)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """All runs in or below the folders; the jobs of a sweep in its order.

    Raises ValueError for a folder that is missing or holds no run, and for a file that cannot be read.
    """
    found: dict[Path, Run] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"there is no folder '{folder}'; give the folder of a run or of a sweep")
        runs = list(_below(folder, folder.name if len(folders) > 1 else ""))
        if not runs:
            raise ValueError(f"'{folder}' holds no run: there is no config.yaml in it or below it; give another folder")
        found |= {each.folder.resolve(): each for each in runs}
    return list(found.values())


def _below(root: Path, prefix: str) -> Iterator[Run]:
    jobs = {file.parent / job.folder: job for file in sorted(root.rglob(FILE)) for job in read_jobs(file)}
    runs = sorted(file.parent for file in root.rglob("config.yaml"))
    found: dict[Path, Job | None] = {}
    for folder, job in jobs.items():
        stages = [run for run in runs if folder in run.parents]  # of a recipe
        found |= {run: replace(job, options={**job.options, "stage": str(run.relative_to(folder))}) for run in stages}
        if folder in runs or (job.is_last and not stages):
            found[folder] = job
    for folder in dict.fromkeys([*found, *runs]):
        name = str(Path(prefix, folder.relative_to(root)))
        yield read_run(folder, root.name if name == "." else name, found.get(folder))


def read_run(folder: Path, name: str, job: Job | None = None) -> Run:
    """A run directory, or the job that made no directory of a run."""
    options = job.options if job else {}
    error = job.error if job else None
    if not (folder / "config.yaml").is_file():
        return Run(folder=folder, name=name, status="failed" if error else "unfinished", options=options, error=error)
    settings, _ = trust.stored_config(folder)
    choices = settings.get("choices")
    status = run.status(folder) or ("failed" if error else "unfinished")
    metrics = run.read_metrics(folder) if (folder / "metrics.json").is_file() else {}
    numbers = _numbers(metrics)
    validation, benchmarks = _own_scores(numbers), _benchmarks(folder)
    figures = {key: value for key, value in numbers.items() if key in ("val/loss", "val/visual_gain", *COSTS)}
    if (visual_tokens := _numbers(_read(folder / "artifact" / "manifest.json")).get("num_image_tokens")) is not None:
        figures["visual_tokens"] = visual_tokens
    return Run(
        folder=folder,
        name=name,
        status=status,
        options=options,
        choices=choices if isinstance(choices, dict) else {},
        settings={key: value for key, value in _leaves(settings) if key.partition(".")[0] not in IGNORED},
        figures=figures,
        scores={name: score for name, score in validation.items() if name.count("/") == 1}
        | {f"{name}: {headline}": scores[headline] for name, (headline, scores) in benchmarks.items()},
        details={"validation": validation if len(validation) > 2 else {}}  # of a single type, it would be there twice
        | {name: scores for name, (_, scores) in benchmarks.items()},
        lines=[line for line in map(_numbers, _read_lines(folder / "metrics.jsonl")) if "step" in line],
        samples=_read_lines(folder / "samples.jsonl"),
        metric=str((settings.get("sweep") or {}).get("metric", "val/loss")),
        error=error,
    )


def _own_scores(metrics: Mapping[str, float]) -> dict[str, Score]:
    """The scores of metrics.json, over all questions and by type: those with a constant beside them."""
    found = {}
    for name in metrics:
        if is_score(name, metrics):
            num, constant, no_image, low, high = (metrics.get(each) for each in names_beside(name))
            found[name] = Score(metrics[name], int(num or 0), constant, low, high, no_image)
    return found


def _benchmarks(folder: Path) -> dict[str, tuple[str, dict[str, Score]]]:
    """The headline and the metrics of each eval/<benchmark>/results.json."""
    found = {}
    for file in sorted(folder.glob("eval/*/results.json")):
        content = _read(file)
        metrics = content.get("metrics") if isinstance(content, dict) else None
        scores = {}
        for name, metric in metrics.items() if isinstance(metrics, dict) else ():
            numbers = _numbers(metric)
            if "value" in numbers:
                best = _numbers((content.get("best_constant") or {}).get(name)).get("value")
                num = int(numbers.get("n", _numbers(content).get("n", 0)))
                no_image = _numbers(content.get("best_without_image")).get(name)
                scores[name] = Score(numbers["value"], num, best, numbers.get("low"), numbers.get("high"), no_image)
        if scores:
            headline = content.get("headline")
            found[file.parent.name] = (headline if headline in scores else next(iter(scores)), scores)
    return found


def _read(file: Path) -> Any:
    if not file.is_file():
        return None
    try:
        return json.loads(files.read(file, max_bytes=MAX_BYTES))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read ({error}); remove it or take it from a copy") from error


def _read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file with one a line, without a line that was cut when the run was killed."""
    if not file.is_file():
        return []
    objects = []
    for line in files.read(file, max_bytes=MAX_BYTES).decode(errors="replace").splitlines():
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            objects.append(content)
    return objects


def _numbers(content: Any) -> dict[str, float]:
    """The finite numbers of an object; empty for anything else."""
    if not isinstance(content, Mapping):
        return {}
    numbers = {k: v for k, v in content.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {str(key): float(value) for key, value in numbers.items() if math.isfinite(value)}


def _leaves(settings: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
