"""Exact match of an answer with one of the references, except for white space."""

from __future__ import annotations

from typing import ClassVar

from vlm.evaluation.scorers.base import Scorer, references
from vlm.schema import Sample


class ExactMatch(Scorer):
    """1 if the answer equals a reference, else 0. Runs of white space count as one space.

    Args:
        loose: upper and lower case are the same, and periods at the end count for nothing.
    """

    name: ClassVar[str] = "exact_match"
    name_by_type: ClassVar[str] = "accuracy"

    def __init__(self, *, loose: bool = False) -> None:
        self.loose = loose

    def __call__(self, prediction: str, sample: Sample) -> float:
        return float(self._compared(prediction) in map(self._compared, references(sample)))

    def _compared(self, text: str) -> str:
        text = " ".join(text.split())
        return text.rstrip(".").lower() if self.loose else text
