"""Right or wrong: the answer is one of the references, blanks at the ends and repeated ones aside."""

from __future__ import annotations

from typing import ClassVar

from vlm.evaluation.scorers.base import Scorer, references
from vlm.schema import Sample


class ExactMatch(Scorer):
    """1 where the answer equals a reference, upper and lower case told apart; else 0."""

    name: ClassVar[str] = "exact_match"
    name_by_type: ClassVar[str] = "accuracy"

    def __call__(self, prediction: str, sample: Sample) -> float:
        return float(" ".join(prediction.split()) in {" ".join(each.split()) for each in references(sample)})
