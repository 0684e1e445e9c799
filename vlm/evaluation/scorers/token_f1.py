"""How many words an answer shares with the best reference: the F1 of SQuAD (Rajpurkar et al., arXiv 1606.05250)."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

from vlm.evaluation.scorers.base import Scorer, references
from vlm.schema import Sample


class TokenF1(Scorer):
    """2·shared / (words of the answer + words of the reference), the largest over the references.

    Words are what white space separates, in lower case; a word that occurs twice counts twice. An empty answer is right
    where a reference is empty. SQuAD's script also drops articles and punctuation, which other languages do not have.
    """

    name: ClassVar[str] = "token_f1"
    name_by_type: ClassVar[str] = "token_f1"

    def __call__(self, prediction: str, sample: Sample) -> float:
        said = Counter(prediction.lower().split())
        return max(_f1(said, Counter(each.lower().split())) for each in references(sample))


def _f1(said: Counter[str], reference: Counter[str]) -> float:
    num_words = said.total() + reference.total()
    return 2 * (said & reference).total() / num_words if num_words else 1.0
