"""Correctness of answers to yes-or-no questions, by the rules of POPE and MME."""

from __future__ import annotations

from typing import ClassVar, Literal

from vlm.evaluation.scorers.base import Scorer, references
from vlm.schema import Sample

Rule = Literal["pope", "mme"]


class YesNo(Scorer):
    """1 if the answer says what the reference says, `yes` or `no`.

    Args:
        rule: `pope`: the answer says no if the first sentence has the word "no", "No" or "not"; every other answer, an
            empty one too, says yes (Li et al. 2023, arXiv:2305.10355, their script). `mme`: "yes" or "no" stands in the
            first four letters, in any case, or the answer is the letter y or n; other answers are wrong (Fu et al.
            2023, arXiv:2306.13394, their script; the single letter is from lmms-eval).
    """

    name: ClassVar[str] = "accuracy"
    name_by_type: ClassVar[str] = "accuracy"

    def __init__(self, *, rule: Rule = "pope") -> None:
        self._said = _said_in_first_sentence if rule == "pope" else _said_at_once

    def __call__(self, prediction: str, sample: Sample) -> float:
        return float(self._said(prediction) in {each.strip().lower() for each in references(sample)})


def _said_in_first_sentence(answer: str) -> str:
    words = answer.split(".")[0].replace(",", "").split()
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def _said_at_once(answer: str) -> str:
    text = answer.strip().lower().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "")
    return next((word for word in ("yes", "no") if word in text[:4]), "")
