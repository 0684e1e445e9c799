"""Base class of the scorers of answers."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import ClassVar

from vlm.schema import Sample


class Scorer(ABC):
    """(prediction, sample) -> score from 0 (wrong) to 1 (correct).

    Attributes:
        name: the mean score over all answers is logged as `val/<name>`.
        name_by_type: the mean score per type of question is logged as `val/<name_by_type>/<type>`.
    """

    name: ClassVar[str]
    name_by_type: ClassVar[str]

    @abstractmethod
    def __call__(self, prediction: str, sample: Sample) -> float: ...


def references(sample: Sample) -> list[str]:
    """The correct answers: `meta["references"]` (a JSON list) if the source has it, else the last message."""
    if "references" in sample.meta:
        return json.loads(sample.meta["references"])
    return ["".join(piece.get("text", "") for piece in sample.messages[-1]["content"])]
