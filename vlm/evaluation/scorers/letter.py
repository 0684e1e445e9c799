"""Whether an answer names the right one of several options, by its letter or its text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from string import ascii_uppercase as LETTERS
from typing import ClassVar

from vlm.evaluation.scorers.base import Scorer, references
from vlm.schema import Sample

# A capital letter on its own. "A" and "I" before a word in small letters are words, except in "A is right".
_STANDS_ALONE = r"(?<![A-Za-z0-9'])(?![AI] (?!is\b)[a-z])([{letters}])(?![A-Za-z0-9'])"


class Letter(Scorer):
    """1 if `read_letter` finds the letter of the reference in the answer; `meta["options"]` is a JSON list of texts."""

    name: ClassVar[str] = "accuracy"
    name_by_type: ClassVar[str] = "accuracy"

    def __call__(self, prediction: str, sample: Sample) -> float:
        return float(read_letter(prediction, json.loads(sample.meta["options"])) in references(sample))


def read_letter(answer: str, options: Sequence[str]) -> str:
    """The letter of the option that an answer names; empty if it names none.

    In this order: the whole answer is a letter, as in "b" or "(B)."; the whole answer is the text of an option; the
    first capital letter that stands alone, as in "The answer is B, because ..."; the only option whose text occurs in
    the answer. Case counts only for the letter that stands alone.
    """
    letters, answer = LETTERS[: len(options)], answer.strip()
    if (whole := re.fullmatch(r"[\W_]*([A-Za-z])[\W_]*", answer)) and whole[1].upper() in letters:
        return whole[1].upper()
    texts = [_plain(option) for option in options]
    if (plain := _plain(answer)) in texts:
        return letters[texts.index(plain)]
    if alone := re.search(_STANDS_ALONE.format(letters=letters), answer):
        return alone[1]
    found = [
        letter
        for letter, text in zip(letters, texts, strict=True)
        if text and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", plain)
    ]
    return found[0] if len(found) == 1 else ""


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")
