"""What every scorer promises: how good an answer is."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import ClassVar

from vlm.schema import Sample


class Scorer(ABC):
    """(prediction, sample) -> a number, 0 for a wrong answer and 1 for a right one.

    Attributes:
        name: of the mean score over all answers, after `val/`.
        name_by_type: of the mean score over those of one type of question, before `/<type>`.
    """

    name: ClassVar[str]
    name_by_type: ClassVar[str]

    @abstractmethod
    def __call__(self, prediction: str, sample: Sample) -> float: ...


def references(sample: Sample) -> list[str]:
    """What may be answered: `meta["references"]` (a JSON list) if the source gives it, else the last message."""
    if "references" in sample.meta:
        return json.loads(sample.meta["references"])
    return ["".join(piece.get("text", "") for piece in sample.messages[-1]["content"])]
