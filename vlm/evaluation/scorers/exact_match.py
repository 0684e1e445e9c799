"""Exact match of an answer with one of the references, except for white space."""

from __future__ import annotations

from typing import ClassVar

from vlm.evaluation.scorers.base import Scorer, references
from vlm.schema import Sample


class ExactMatch(Scorer):
    """1 if the answer equals a reference, else 0. Case matters; runs of white space count as one space."""

    name: ClassVar[str] = "exact_match"
    name_by_type: ClassVar[str] = "accuracy"

    def __call__(self, prediction: str, sample: Sample) -> float:
        return float(" ".join(prediction.split()) in {" ".join(each.split()) for each in references(sample)})
