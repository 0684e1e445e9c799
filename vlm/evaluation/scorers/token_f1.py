"""F1 of the words of an answer and of the best reference, as in SQuAD (Rajpurkar et al., arXiv 1606.05250)."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

from vlm.evaluation.scorers.base import Scorer, references
from vlm.schema import Sample


class TokenF1(Scorer):
    """2·common / (words of the answer + words of the reference), the maximum over the references.

    Words are separated by white space and lower-cased; a word that occurs twice counts twice. An empty answer scores 1
    if a reference is empty. Unlike SQuAD's script, articles and punctuation are kept.
    """

    name: ClassVar[str] = "token_f1"
    name_by_type: ClassVar[str] = "token_f1"

    def __call__(self, prediction: str, sample: Sample) -> float:
        words = Counter(prediction.lower().split())
        return max(_f1(words, Counter(each.lower().split())) for each in references(sample))


def _f1(words: Counter[str], reference: Counter[str]) -> float:
    num_words = words.total() + reference.total()
    return 2 * (words & reference).total() / num_words if num_words else 1.0
