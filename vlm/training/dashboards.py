"""What dashboards show of a run beside curves: its name and tags, answers with their images, and the artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from PIL.Image import Image

LONGEST_TAG, LONGEST_NAME = 64, 128  # characters that W&B allows


@dataclass(frozen=True)
class AnsweredSample:
    """A held-out sample with the model's answer; the texts have no control characters."""

    id: str
    images: list[Image]
    prompt: str
    prediction: str
    reference: str
    score: float


@runtime_checkable
class TakesSamples(Protocol):
    """A logger that shows answers with their images."""

    def log_samples(self, samples: Sequence[AnsweredSample], step: int) -> None:
        """Log the answers at an optimizer step."""


@runtime_checkable
class TakesTrained(Protocol):
    """A logger that stores what was trained."""

    def log_trained(self, folder: Path, metadata: Mapping[str, Any]) -> None:
        """Store a run's artifact; `metadata` is the run's identity."""


def measured(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics without Lightning's `epoch`, which is always 0, and without NaN."""
    return {name: float(value) for name, value in metrics.items() if "/" in name and value == value}


def names(
    choices: Mapping[str, str | None], parts: Sequence[str], *, job: str | None, sweep: str | None
) -> dict[str, Any]:
    """The `name`, `group` and `tags` of a run: those of its sweep and job, or of its choices."""
    groups = ("experiment", "stage", "model", *parts, "objective", "data")
    tags = [f"{group}={choices[group]}"[:LONGEST_TAG] for group in groups if choices.get(group)]
    of_model = "-".join(choice for part in parts if (choice := choices.get(part))) or choices.get("model")
    name = job or f"{choices.get('stage')} {of_model}"
    return {"name": name[:LONGEST_NAME], "group": sweep and sweep[:LONGEST_NAME], "tags": tags}
