"""What differs between runs, and how much better one choice is than another.

Runs with the same values of all parameters but `seed` are one choice. Choices are compared over the seeds that both
have, with Student's t interval of the mean of the differences.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm.report.runs import Run

SEED = "seed"
LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences with its interval, which needs at least two pairs."""

    mean: float
    low: float | None
    high: float | None
    num_pairs: int


def differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Each parameter that is not the same in all runs, with its value in each of them.

    Jobs of a sweep differ by their command-line options. Other runs differ by their config: of a group whose option
    differs, its keys are left out, and so are seeds that follow `seed`.
    """
    if all(run.options for run in runs):
        keys = dict.fromkeys(key for run in runs for key in run.options)
        found = {key: [run.options.get(key, "") for run in runs] for key in keys}
    else:
        groups = dict.fromkeys(key for run in runs for key in run.choices if not key.startswith("hydra/"))
        found = {key: [_shown(run.choices.get(key)) for run in runs] for key in groups}
        other = {key for key, values in found.items() if len({*values}) > 1}
        keys = dict.fromkeys(key for run in runs for key in run.settings if key.partition(".")[0] not in other)
        found |= {key: [_shown(run.settings.get(key)) for run in runs] for key in keys}
    follows = [key for key in found if key.endswith(f".{SEED}") and found[key] == found.get(SEED)]
    return {key: values for key, values in found.items() if len({*values}) > 1 and key not in follows}


def choices(runs: Sequence[Run], parameters: Mapping[str, Sequence[str]]) -> dict[str, list[Run]]:
    """The runs of each choice, under a name that has its parameters."""
    named = [key for key in parameters if key != SEED]
    found: dict[str, list[Run]] = defaultdict(list)
    for number, run in enumerate(runs):
        values = [f"{key}={short(parameters[key][number])}" for key in named]
        found[", ".join(values) or "all runs"].append(run)
    return dict(found)


def short(value: str) -> str:
    """A value of a parameter; a long number with six digits."""
    try:
        return f"{float(value):.6g}" if len(value) > 8 else value
    except ValueError:
        return value


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and the sample standard deviation, which needs two values."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired_difference(runs: Sequence[Run], first: Sequence[Run], figure: str) -> Difference | None:
    """A figure of `runs` minus that of `first` over the seeds of both; None where they share no seed."""
    mine, theirs = _by_seed(runs, figure), _by_seed(first, figure)
    differences = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
    if not differences:
        return None
    mean, spread = mean_and_spread(differences)
    num = len(differences)
    if spread is None:
        return Difference(mean, None, None, num)
    half = t_quantile(num - 1) * spread / math.sqrt(num)
    return Difference(mean, mean - half, mean + half, num)


def t_quantile(degrees: int) -> float:
    """The value t for which Student's distribution has `LEVEL` of its mass in [-t, t].

    For whole degrees of freedom, the mass is a finite sum of an angle (Abramowitz & Stegun, 26.7.3 and 26.7.4); the
    angle is found by bisection.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _mass(middle, degrees) < LEVEL else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


def _mass(angle: float, degrees: int) -> float:
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0
    for power in range(1 + odd, degrees, 2):
        total += term
        term *= cosine**2 * power / (power + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _by_seed(runs: Sequence[Run], figure: str) -> dict[str, float]:
    return {_seed(run): run.qualities[figure] for run in runs if run.is_finished and figure in run.qualities}


def _seed(run: Run) -> str:
    return str(run.settings.get(SEED))


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
