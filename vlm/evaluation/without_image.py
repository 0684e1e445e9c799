"""The best answers without the image: a score shows that the model uses images only as far as it is above theirs.

Whoever sees the question alone can do one of two things. Both are tried, and the better one counts.

- Give the answer that questions with the same words have most often; where no other question has these words, questions
  of the same type. The questions are split into two halves by a hash of their ids, and the answers of each half are
  counted in the other: an answer is never its own evidence.
- Give one answer to all questions of a type, the one that scores best on them.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Asked:
    """A question with its correct answers, as far as they can be guessed from: without the image."""

    id: str
    text: str
    type: str | None
    references: Sequence[str]


def given_question(questions: Sequence[Asked]) -> list[str]:
    """For each question, the first reference that questions of the other half with the same words have most often.

    Upper and lower case are the same, and runs of white space are one space. Where the other half has no such question,
    its questions of the same type are counted, and after that all of them; of an empty half, the answer is empty.
    """
    counts: list[dict[tuple[str, ...], Counter[str]]] = [defaultdict(Counter), defaultdict(Counter)]
    for question in questions:
        for key in _keys(question):
            counts[_half(question)][key].update(question.references[:1])
    return [_most_frequent(counts[1 - _half(question)], question) for question in questions]


def _most_frequent(counts: dict[tuple[str, ...], Counter[str]], question: Asked) -> str:
    found = (counts[key] for key in _keys(question) if key in counts)
    answers = next(found, Counter[str]())
    return answers.most_common(1)[0][0] if answers else ""


def _keys(question: Asked) -> list[tuple[str, ...]]:
    """What groups of questions it belongs to, the smallest one first."""
    type_ = question.type or ""
    return [(type_, " ".join(question.text.lower().split())), (type_,), ()]


def _half(question: Asked) -> int:
    return zlib.crc32(question.id.encode("utf-8", "surrogatepass")) & 1
