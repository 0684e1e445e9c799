"""Accuracy of an answer by the answers of ten people (Antol et al. 2015, arXiv:1505.00468)."""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from typing import ClassVar

from vlm.evaluation.scorers.base import Scorer, references
from vlm.schema import Sample

ARTICLES = {"a", "an", "the"}
NUMBERS = ("none zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(number) for number, words in enumerate(NUMBERS) for word in words.split()}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_WITH_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")

# The contractions that the official script knows without an apostrophe, as "dont", or with only one of two, as
# "couldnt've". It also writes "somebody'd" as "somebodyd", so the word is among those that lose theirs.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd've he's
    how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've he'd
"""
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


class VqaAccuracy(Scorer):
    """The mean, over the people, of min(answers of the others that are the same / 3, 1), after `normalize`.

    A single reference is compared after `normalize`. The official script normalizes the references only where people
    disagree, here they always are.
    """

    name: ClassVar[str] = "vqa_accuracy"
    name_by_type: ClassVar[str] = "vqa_accuracy"

    def __call__(self, prediction: str, sample: Sample) -> float:
        answer, said = normalize(prediction), Counter(map(normalize, references(sample)))
        same, num = said[answer], said.total()
        if num == 1:
            return float(same)
        # One of those who gave this answer sees one fewer of it among the others.
        return (same * min(1.0, (same - 1) / 3) + (num - same) * min(1.0, same / 3)) / num


@lru_cache(maxsize=100_000)  # people often give the same answers
def normalize(text: str) -> str:
    """Lower case, without punctuation and articles, numbers to ten as digits, contractions with their apostrophes.

    A mark is removed if it stands beside a space somewhere, or if a number has a comma; else a space replaces it.
    Periods are removed unless a digit follows.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    with_comma = _NUMBER_WITH_COMMA.search(text) is not None
    marks = {ord(mark): "" if with_comma or f"{mark} " in text or f" {mark}" in text else " " for mark in PUNCTUATION}
    words = _PERIOD.sub("", text.translate(marks)).lower().split()
    digits = (DIGITS.get(word, word) for word in words)
    return " ".join(CONTRACTIONS.get(word, word) for word in digits if word not in ARTICLES)
