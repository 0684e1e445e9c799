"""The pictures of a report: curves, quality against cost, and the parallel coordinates of a search."""

from __future__ import annotations

from collections.abc import Sequence

from vlm.report import svg
from vlm.report.compare import SEED
from vlm.report.runs import COSTS, Run, is_loss
from vlm.report.tables import Comparison
from vlm.training.results import unit_of_loss

CURVES = ("train/loss", "val/loss", "val/visual_gain")
MAX_POINTS = 400  # of a curve
GRAY = "#999999"


def curves(comparison: Comparison) -> str:
    """The losses and the visual gain over the steps, a line for each run; as HTML."""
    colors = _colors(comparison)
    names = {name for run in comparison.runs for line in run.lines for name in line}
    found = []
    for figure in CURVES:
        series = [svg.Series(_curve(run, figure), colors[run.name], opacity=0.8) for run in comparison.runs]
        series.sort(key=lambda each: each.color != GRAY)  # gray lines below the others
        unit = "loss of the step" if figure == "train/loss" else unit_of_loss(names)
        found.append(svg.lines(figure, "optimizer step", unit, series))
    return _row(found, comparison, colors)


def trade_offs(comparison: Comparison) -> str:
    """Quality against what it costs, a point for each finished run; as HTML. Empty for a single choice."""
    if len(comparison.choices) < 2:
        return ""
    colors = _colors(comparison)
    scores = [name for name in comparison.qualities if any(name in run.scores for run in comparison.runs)]
    found = []
    for quality in [*(name for name in ("val/loss",) if name in comparison.qualities), *scores[:1]]:
        for cost, title in COSTS.items():
            series = []
            for name, runs in comparison.choices.items():
                points = [
                    (run.figures[cost], run.qualities[quality])
                    for run in runs
                    if cost in run.figures and quality in run.qualities
                ]
                series.append(svg.Series(points, colors[runs[0].name], name))
            better = "lower is better" if is_loss(quality) else "higher is better"
            found.append(svg.scatter(f"{quality} against {title}", title, f"{quality} ({better})", series))
    return _row(found, comparison, colors)


def search(comparison: Comparison) -> str:
    """Parallel coordinates of the finished runs where they differ in several parameters; empty where they do not."""
    parameters = [key for key in comparison.parameters if key != SEED]
    metric = comparison.metric
    chosen = [number for number, run in enumerate(comparison.runs) if run.is_finished and metric in run.qualities]
    if len(parameters) < 2 or len(chosen) < 3:
        return ""
    rows = [[comparison.parameters[key][number] for key in parameters] for number in chosen]
    last = [comparison.runs[number].qualities[metric] for number in chosen]
    title = "A line for each run; the best has the other color, and darker lines are better"
    return svg.parallel(title, [*parameters, metric], rows, last, "low" if is_loss(metric) else "high")


def _row(found: Sequence[str], comparison: Comparison, colors: dict[str, str]) -> str:
    pictures = [picture for picture in found if picture]
    if not pictures:
        return ""
    return f"<p>{_legend(comparison, colors)}</p><div class=pictures>{''.join(pictures)}</div>"


def _colors(comparison: Comparison) -> dict[str, str]:
    """A color for each choice; where there are too many, the best one has a color and the others are gray."""
    names = list(comparison.choices)
    if len(names) <= len(svg.COLORS):
        by_choice = dict(zip(names, svg.COLORS, strict=False))
    else:
        by_choice = dict.fromkeys(names, GRAY) | {comparison.best: svg.COLORS[1]}
    colors = {run.name: by_choice[name] for name, runs in comparison.choices.items() for run in runs}
    return {run.name: colors.get(run.name, GRAY) for run in comparison.runs}


def _legend(comparison: Comparison, colors: dict[str, str]) -> str:
    if len(comparison.choices) > len(svg.COLORS):
        return svg.legend([(f"best: {comparison.best}", svg.COLORS[1]), ("other choices", GRAY)])
    names = [(name, colors[runs[0].name]) for name, runs in comparison.choices.items()]
    unfinished = [("not finished", GRAY)] if any(not run.is_finished for run in comparison.runs) else []
    return svg.legend([*names, *unfinished])


def _curve(run: Run, figure: str) -> list[tuple[float, float]]:
    points = [(line["step"], line[figure]) for line in run.lines if figure in line]
    stride = -(-len(points) // MAX_POINTS) or 1
    return points[::stride]
