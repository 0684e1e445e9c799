"""Bootstrap intervals of metrics, clustered by group, paired comparisons (Efron & Tibshirani, 1993), and Wilson's.

Questions about the same image are not independent, so that whole groups are drawn with replacement. All metrics are
functions of named sums, so that a resample is a weighted sum of the groups' sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

NUM_RESAMPLES = 2000
LEVEL = 0.95
NORMAL = 1.959964  # the quantile of the normal distribution that leaves LEVEL between it and its negative
CHUNK = 50  # resamples whose weights are held at once

Metrics = Callable[[Mapping[str, Any]], dict[str, Any]]


class Interval(NamedTuple):
    """A metric with the bounds of its percentile interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """A metric minus that of another model on the same questions; `p` is two-sided."""

    value: float
    low: float
    high: float
    p: float


def wilson(mean: float, num: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the mean of `num` independent scores of 0 or 1 (Wilson, 1927).

    For scores between 0 and 1 it is too wide rather than too narrow, because their variance is at most mean(1 - mean).
    """
    shrunk = 1 + NORMAL**2 / num
    center = (mean + NORMAL**2 / (2 * num)) / shrunk
    half = NORMAL / shrunk * math.sqrt(mean * (1 - mean) / num + NORMAL**2 / (4 * num**2))
    return max(0.0, center - half), min(1.0, center + half)


def intervals(groups: Sequence[Mapping[str, float]], metrics: Metrics, *, seed: int = 0) -> dict[str, Interval]:
    """Each metric of the sums over `groups`, with its 95 % interval; NaN where a metric is not defined."""
    value, drawn = metrics(total(groups)), metrics(_resampled([groups], seed=seed)[0])
    return {name: Interval(float(value[name]), *_bounds(drawn[name])) for name in value}


def differences(
    groups: Sequence[Mapping[str, float]], others: Sequence[Mapping[str, float]], metrics: Metrics, *, seed: int = 0
) -> dict[str, Difference]:
    """Each metric of `groups` minus that of `others`; both are sums of the same groups in the same order.

    `p` is twice the smaller share of resamples on one side of 0, with one resample added to each side.
    """
    mine, theirs = metrics(total(groups)), metrics(total(others))
    my_draws, their_draws = (metrics(sums) for sums in _resampled([groups, others], seed=seed))
    result = {}
    for name in mine:
        drawn = my_draws[name] - their_draws[name]
        tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
        p = min(1.0, 2 * (tail + 1) / (NUM_RESAMPLES + 1))
        result[name] = Difference(float(mine[name] - theirs[name]), *_bounds(drawn), float(p))
    return result


def total(groups: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The sum of each name over all groups; a group without it adds 0."""
    names = {name for group in groups for name in group}
    return {name: sum(group.get(name, 0.0) for group in groups) for name in names}


def _resampled(several: Sequence[Sequence[Mapping[str, float]]], *, seed: int) -> list[dict[str, np.ndarray]]:
    """The sums of each bootstrap resample, each [NUM_RESAMPLES]; the same resamples for all of `several`."""
    num = len(several[0])
    names = [sorted({name for group in groups for name in group}) for groups in several]
    tables = [
        np.array([[group.get(name, 0.0) for name in columns] for group in groups])
        for groups, columns in zip(several, names, strict=True)
    ]  # each [groups, sums]
    rng = np.random.default_rng(seed)
    drawn: list[list[np.ndarray]] = [[] for _ in several]
    for start in range(0, NUM_RESAMPLES, CHUNK):
        weights = rng.multinomial(num, np.full(num, 1 / num), size=min(CHUNK, NUM_RESAMPLES - start))
        for table, parts in zip(tables, drawn, strict=True):
            parts.append(weights @ table)
    joined = [np.concatenate(parts) for parts in drawn]
    return [dict(zip(columns, table.T, strict=True)) for columns, table in zip(names, joined, strict=True)]


def _bounds(drawn: np.ndarray) -> tuple[float, float]:
    defined = drawn[np.isfinite(drawn)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
