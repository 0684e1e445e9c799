"""Pictures in SVG: lines over steps, points with a name each, and parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 78, 14, 30, 46
# Okabe and Ito's colors, which people with color blindness can tell apart; the yellow is left out.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
LOG_RATIO = 20  # largest / smallest value above which an axis is logarithmic
Number = int | float  # of pixels, or a value
STYLE = "font: 11px system-ui, sans-serif"


@dataclass(frozen=True)
class Series:
    """Points of one color; `name` is empty where the legend has that color already."""

    points: Sequence[tuple[float, float]]
    color: str
    name: str = ""
    opacity: Number = 1.0


class Axis:
    """Values to pixels: linear, or logarithmic where positive values differ much and `can_be_log` is set."""

    def __init__(self, values: Sequence[float], start: Number, end: Number, *, can_be_log: bool = False) -> None:
        low, high = min(values), max(values)
        self.is_log = can_be_log and low > 0 and high / low > LOG_RATIO
        low, high = (math.log10(low), math.log10(high)) if self.is_log else (low, high)
        margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        self.low, self.high, self.start, self.end = low - margin, high + margin, start, end

    def __call__(self, value: Number) -> float:
        value = math.log10(value) if self.is_log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values within the axis."""
        if self.is_log:
            powers = range(math.ceil(self.low), math.floor(self.high) + 1)
            factors = (1,) if len(powers) > 2 else (1, 2, 5)
            exponents = range(math.floor(self.low), math.ceil(self.high) + 1)
            values = [factor * 10.0**power for power in exponents for factor in factors]
            return [value for value in values if self.low <= math.log10(value) <= self.high]
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        first = math.ceil(self.low / step)
        return [number * step for number in range(first, math.floor(self.high / step) + 1)]


def lines(title: str, x_title: str, y_title: str, series: Sequence[Series]) -> str:
    """Curves, with their names above; empty where no series has a point."""
    shown = [each for each in series if each.points]
    if not shown:
        return ""
    x, y = _axes(shown, log_x=False)
    body = [_frame(title, x_title, y_title, x, y)]
    for each in shown:
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in each.points)
        body.append(
            f'<polyline points="{path}" fill="none" stroke="{each.color}" stroke-width="1.4" '
            f'stroke-opacity="{each.opacity}"/>'
        )
        if len(each.points) == 1:
            body.append(_dot(x(each.points[0][0]), y(each.points[0][1]), each.color, 2.5))
    left = 40
    for each in (each for each in shown if each.name):
        body.append(_text(left, TOP - 3, each.name, color=each.color))
        left += 6 * len(each.name) + 8  # as wide as the text, about
    return _svg(WIDTH, HEIGHT, body)


def scatter(title: str, x_title: str, y_title: str, series: Sequence[Series]) -> str:
    """For each series its points, small, and their mean, large; empty where no series has a point."""
    shown = [each for each in series if each.points]
    if not shown:
        return ""
    x, y = _axes(shown, log_x=True)
    body = [_frame(title, f"{x_title}{' (log)' if x.is_log else ''}", y_title, x, y)]
    for each in shown:
        body += [_dot(x(a), y(b), each.color, 2.5, opacity=0.5) for a, b in each.points]
        mean = [sum(values) / len(each.points) for values in zip(*each.points, strict=True)]
        body.append(_dot(x(mean[0]), y(mean[1]), each.color, 5.5, label=each.name))
    return _svg(WIDTH, HEIGHT, body)


def parallel(title: str, axes: Sequence[str], rows: Sequence[Sequence[str]], last: Sequence[float], better: str) -> str:
    """A line for each run through its value on every axis; the last axis, `last`, has the figure.

    Axes whose values are all numbers are to scale; others have a place for each value. Lines are darker the better the
    run is: `better` is "low" or "high".
    """
    columns = [[row[number] for row in rows] for number in range(len(axes) - 1)]
    gap = max(130, min(240, 900 // len(axes)))
    width, height = gap * (len(axes) - 1) + 2 * 90, 320
    top, bottom = 56, height - 24
    places, labels, body = [], [], [_text(14, 18, title, weight="600")]
    for number, name in enumerate(axes):
        values = [str(value) for value in last] if number == len(columns) else columns[number]
        place, marks = _column(values, bottom, top)
        places.append(place)
        x = 90 + gap * number
        body.append(f'<line x1="{x}" x2="{x}" y1="{top - 8}" y2="{bottom + 8}" stroke="#888"/>')
        body.append(_text(x, top - 18, _cut(name, gap // 7), anchor="middle", weight="600"))
        labels += [_text(x + 5, y + 4, _cut(mark, 16), color="#555") for mark, y in marks]
    order = sorted(last, reverse=better == "high")
    drawn = []
    for number, value in enumerate(last):
        rank = order.index(value) / max(1, len(order) - 1)
        points = " ".join(f"{90 + gap * column},{place[number]:.1f}" for column, place in enumerate(places))
        color = COLORS[1] if rank == 0 else COLORS[0]
        line = (
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-opacity="{1 - 0.8 * rank:.2f}" '
            f'stroke-width="{2.4 if rank == 0 else 1.4}"/>'
        )
        drawn.append((-rank, line))
    body += [line for _, line in sorted(drawn)]  # the best on top
    return _svg(width, height, [*body, *labels])


def legend(names: Sequence[tuple[str, str]]) -> str:
    """Names with their colors, as HTML."""
    return "".join(
        f'<span class=key><svg width="14" height="10"><rect width="14" height="10" rx="2" fill="{color}"/></svg> '
        f"{escape(name)}</span>"
        for name, color in names
    )


def _axes(series: Sequence[Series], *, log_x: bool) -> tuple[Axis, Axis]:
    xs = [a for each in series for a, _ in each.points]
    ys = [b for each in series for _, b in each.points]
    return Axis(xs, LEFT, WIDTH - RIGHT, can_be_log=log_x), Axis(ys, HEIGHT - BOTTOM, TOP)


def _column(values: Sequence[str], start: Number, end: Number) -> tuple[list[float], list[tuple[str, float]]]:
    """The height of each value, and the marks of the axis."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        numbers = []
    if numbers and all(map(math.isfinite, numbers)):
        axis = Axis(numbers, start, end, can_be_log=True)
        ticks = axis.ticks() if len({*numbers}) > 4 else sorted({*numbers})
        return [axis(number) for number in numbers], [(_number(tick), axis(tick)) for tick in ticks]
    names = list(dict.fromkeys(values))
    step = (start - end) / len(names)
    heights = {name: start - step * (number + 0.5) for number, name in enumerate(names)}
    return [heights[value] for value in values], list(heights.items())


def _frame(title: str, x_title: str, y_title: str, x: Axis, y: Axis) -> str:
    body = [_text(WIDTH / 2, 16, title, anchor="middle", weight="600")]
    for tick in _spaced(x):
        body.append(
            f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#eee"/>'
            + _text(x(tick), HEIGHT - BOTTOM + 15, _number(tick), anchor="middle", color="#555")
        )
    for tick in y.ticks():
        body.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#eee"/>'
            + _text(LEFT - 6, y(tick) + 4, _number(tick), anchor="end", color="#555")
        )
    body.append(
        f'<path d="M{LEFT},{TOP} V{HEIGHT - BOTTOM} H{WIDTH - RIGHT}" fill="none" stroke="#888"/>'
        + _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_title, anchor="middle")
        + f'<g transform="translate(12 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)">'
        + _text(0, 0, y_title, anchor="middle")
        + "</g>"
    )
    return "".join(body)


def _spaced(axis: Axis) -> list[float]:
    """The ticks of a horizontal axis whose labels do not touch."""
    kept: list[float] = []
    for tick in axis.ticks():
        if not kept or axis(tick) - axis(kept[-1]) > 7 * len(_number(tick)) + 4:
            kept.append(tick)
    return kept


def _dot(x: Number, y: Number, color: str, radius: Number, *, opacity: Number = 1.0, label: str = "") -> str:
    title = f"<title>{escape(label)}</title>" if label else ""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{color}" fill-opacity="{opacity}">{title}</circle>'


def _text(x: Number, y: Number, text: str, *, anchor: str = "start", weight: str = "400", color: str = "#222") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="{color}" '
        f'stroke="white" stroke-width="3" paint-order="stroke">{escape(text)}</text>'
    )


def _svg(width: Number, height: Number, body: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" style="{STYLE}">{"".join(body)}</svg>'
    )


def _number(value: Number) -> str:
    """A short number: 12k, 3.4M, 0.05, 1e-05."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.4g}" if abs(value) >= 1e-12 else "0"


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
