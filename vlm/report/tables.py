"""The tables of a report, the same on the terminal, in Markdown and in HTML."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vlm.report.compare import SEED, choices, differing, mean_and_spread, paired_difference, short
from vlm.report.runs import COSTS, Run, Score, is_loss

BESIDE = "Beside a score: its number of answers (n) and the score of the best answers without the image."
NUM_COLUMNS = 6  # choices in a table of scores, and in that of answers


@dataclass(frozen=True)
class Table:
    """Cells as text; `note` is a sentence below the title."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """Runs with the parameters in which they differ.

    Attributes:
        parameters: the values of each differing parameter, one for each run.
        choices: the finished runs of each choice; a choice is a value of all parameters but the seed.
        qualities: names of the figures that say how good a run is.
    """

    runs: Sequence[Run]
    parameters: Mapping[str, Sequence[str]] = field(init=False)
    choices: Mapping[str, Sequence[Run]] = field(init=False)
    qualities: Sequence[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", differing(self.runs) if len(self.runs) > 1 else {})
        found = choices(self.runs, self.parameters)
        finished = {name: [run for run in runs if run.is_finished] for name, runs in found.items()}
        object.__setattr__(self, "choices", {name: runs for name, runs in finished.items() if runs})
        object.__setattr__(self, "qualities", list(dict.fromkeys(name for run in self.runs for name in run.qualities)))

    @property
    def metric(self) -> str:
        """The figure by which the best choice is found."""
        metric = self.runs[0].metric
        return metric if metric in self.qualities else "val/loss"

    @property
    def best(self) -> str:
        """The choice with the best mean of the metric."""
        sign = 1 if is_loss(self.metric) else -1

        def cost(name: str) -> float:
            values = [sign * run.qualities.get(self.metric, sign * math.inf) for run in self.choices[name]]
            return sum(values) / len(values)

        return min(self.choices, key=cost)

    @property
    def has_spread(self) -> bool:
        """Whether a choice has several finished runs."""
        return any(len(runs) > 1 for runs in self.choices.values())


def tables(comparison: Comparison) -> list[Table]:
    """The table of runs; for several choices the mean and spread of each and the differences from the first; scores."""
    found = [table_of_runs(comparison)]
    if len(comparison.choices) > 1 and comparison.has_spread:
        found += [table_of_choices(comparison), table_of_differences(comparison)]
    return found + tables_of_scores(comparison)


def table_of_runs(comparison: Comparison) -> Table:
    """A row for each run."""
    parameters, runs = comparison.parameters, comparison.runs
    losses = [name for name in comparison.qualities if not any(name in run.scores for run in runs)]
    scores = [name for name in comparison.qualities if name not in losses]
    costs = [name for name in COSTS if any(name in run.figures for run in runs)]
    common = {name: beside.pop() for name in scores if len(beside := _beside(runs, name)) == 1}
    scored = [f"{name} ({common[name]})" if name in common else name for name in scores]
    rows = []
    for number, run in enumerate(runs):
        rows.append(
            [
                *([run.name] if not parameters else []),
                *(short(values[number]) for values in parameters.values()),
                run.status,
                *(_figure(run.figures.get(name)) for name in losses),
                *(_score(run.scores.get(name), beside=name not in common) for name in scores),
                *(_figure(run.figures.get(name), name) for name in costs),
            ]
        )
    headings = [*([] if parameters else ["run"]), *parameters, "status", *losses, *scored]
    statuses = ", ".join(f"{num} {status}" for status, num in Counter(run.status for run in runs).items())
    note = f" {BESIDE}" if scores else ""
    return Table("Runs", [*headings, *(COSTS[name] for name in costs)], rows, f"{statuses}.{note}")


def table_of_choices(comparison: Comparison) -> Table:
    """Mean and spread over the seeds for each choice."""
    shown = [*comparison.qualities, *(name for name in COSTS if any(name in run.figures for run in comparison.runs))]
    rows = []
    for name, runs in comparison.choices.items():
        cells = []
        for figure in shown:
            values = [value for run in runs if (value := {**run.figures, **run.qualities}.get(figure)) is not None]
            cells.append(_mean(values, figure))
        rows.append([name, str(len(runs)), *cells])
    headings = ["choice", "runs", *(COSTS.get(name, name) for name in shown)]
    return Table("Choices", headings, rows, "Mean ± standard deviation over the finished runs of a choice.")


def table_of_differences(comparison: Comparison) -> Table:
    """Paired differences of each choice from the first one."""
    (first, reference), *others = comparison.choices.items()
    rows = []
    for name, runs in others:
        found = {figure: paired_difference(runs, reference, figure) for figure in comparison.qualities}
        pairs = max((each.num_pairs for each in found.values() if each), default=0)
        cells = []
        for each in found.values():
            if each is None:
                cells.append("-")
            elif each.low is None or each.high is None:
                cells.append(f"{each.mean:+z.3f}")
            else:
                cells.append(f"{each.mean:+z.3f} [{each.low:+z.3f}, {each.high:+z.3f}]")
        rows.append([name, str(pairs), *cells])
    note = (
        f"Mean over pairs of runs with the same {SEED}, with the 95 % interval of Student's t. An interval that holds "
        "0 shows no difference; a single pair has no interval."
    )
    return Table(f"Differences from {first}", ["choice", "pairs", *comparison.qualities], rows, note)


def tables_of_scores(comparison: Comparison) -> list[Table]:
    """For each benchmark, and for the validation answers, all scores where there are several: a row for each."""
    columns = comparison.choices or {run.name: [run] for run in comparison.runs}
    shown = dict(list(columns.items())[:NUM_COLUMNS])
    if len(columns) == 1:
        shown = {"score": next(iter(columns.values()))}
    note = "Mean ± standard deviation over the finished runs of a choice; a single run has its 95 % interval."
    if len(columns) > len(shown):
        note += f" The first {len(shown)} of {len(columns)} choices are shown."
    found = []
    for benchmark in dict.fromkeys(name for run in comparison.runs for name in run.details):
        of_runs = {name: [run.details.get(benchmark, {}) for run in runs] for name, runs in shown.items()}
        names = list(dict.fromkeys(name for scores in of_runs.values() for each in scores for name in each))
        rows = []
        for name in names:
            scores = {column: [each[name] for each in given if name in each] for column, given in of_runs.items()}
            everywhere = [score for given in scores.values() for score in given]
            nums = _range([score.num for score in everywhere], "{:,}")
            constants, no_image = (
                _range([value for score in everywhere if (value := getattr(score, each)) is not None], "{:.3f}")
                for each in ("constant", "no_image")
            )
            rows.append([name, nums, constants, no_image, *map(_mean_score, scores.values())])
        if len(rows) > 1:
            found.append(
                Table(
                    f"Scores of {benchmark}", ["metric", "n", "best constant", "best without image", *shown], rows, note
                )
            )
    return found


def _range(values: Sequence[int | float], form: str) -> str:
    """The value of all, or the lowest and the highest."""
    return " to ".join(dict.fromkeys(form.format(value) for value in (min(values), max(values)))) if values else "-"


def _mean_score(scores: Sequence[Score]) -> str:
    if len(scores) > 1:
        mean, spread = mean_and_spread([score.value for score in scores])
        return f"{mean:.3f} ± {spread:.3f}"
    return _score(scores[0] if scores else None, beside=False)


def _figure(value: float | None, name: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if name in ("params/trainable", "visual_tokens") else f"{value:z,.3f}"


def _beside(runs: Sequence[Run], name: str) -> set[str]:
    """What stands beside a score in each run that has it."""
    return {_num_and_best(run.scores[name]) for run in runs if name in run.scores}


def _score(score: Score | None, *, beside: bool) -> str:
    if score is None:
        return "-"
    interval = "" if score.low is None or score.high is None else f" [{score.low:.3f}, {score.high:.3f}]"
    return f"{score.value:.3f}{interval}{f' ({_num_and_best(score)})' if beside else ''}"


def _num_and_best(score: Score) -> str:
    """The number of answers, and the score of the best ones without the image; of an earlier version, of a constant."""
    if score.no_image is not None:
        return f"n {score.num:,}, without image {score.no_image:.3f}"
    return f"n {score.num:,}" + ("" if score.constant is None else f", constant {score.constant:.3f}")


def _mean(values: Sequence[float], name: str) -> str:
    if not values:
        return "-"
    if len({*values}) == 1:  # also where there is a single run
        return _figure(values[0], name)
    mean, spread = mean_and_spread(values)
    return f"{mean:z,.3f} ± {spread:.3f}"
