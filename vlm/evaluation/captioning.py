"""Metrics of captions: CIDEr-D, BLEU-4 and ROUGE-L, from the words that `tokens` finds.

CIDEr-D: Vedantam et al. 2015, arXiv:1411.5726. BLEU: Papineni et al. 2002. ROUGE-L: Lin 2004. All as in the evaluation
of COCO's captions (Chen et al. 2015, arXiv:1504.00325), whose Python code the tests compare with.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

MAX_N = 4  # words in an n-gram
SIGMA = 6.0  # of CIDEr-D's penalty for a difference in length, in words
BETA = 1.2  # of ROUGE-L: how much more recall counts than precision

Tokens = tuple[str, ...]

_PLAIN = str.maketrans("‘’“”", "''\"\"")
_WRITTEN = {  # words that the Java tokenizer writes in another way
    **{"(": ["-lrb-"], ")": ["-rrb-"], "[": ["-lsb-"], "]": ["-rsb-"], "{": ["-lcb-"], "}": ["-rcb-"]},
    **{"cannot": ["can", "not"], "gonna": ["gon", "na"], "gotta": ["got", "ta"], "wanna": ["wan", "na"]},
}
_DROPPED = set("\"'`.?!,:;-–—…")
_TOKEN = re.compile(
    r"""
    (?:[a-z]\.){2,}                                     # u.s.
    | \b(?:mr|mrs|ms|dr|st|jr|sr|vs|etc|no(?=\.\s*\d))\.
    | \d*(?:[.,:]\d+)+                                  # 1,000 and 10:30 and .5
    | \w+(?:[-/.'@]+\w+)*                               # t-shirt, and/or, o'clock
    | (?:n't|'(?:s|m|d|ll|re|ve))\b                     # of a text that is already split
    | \S
    """,
    re.VERBOSE,
)
_CLITIC = re.compile(r"(.+)(n't|'(?:s|m|d|ll|re|ve))")


@lru_cache(maxsize=100_000)
def tokens(text: str) -> Tokens:
    """The words of a caption in lower case, without punctuation.

    They are those of the Java PTB tokenizer of the evaluation of COCO's captions, with its list of dropped punctuation:
    "it's" is two words, "t-shirt" is one, a bracket is the word "-lrb-". Few texts differ: those with runs of
    punctuation such as "?!" (a word there, dropped here), currencies, tags, addresses, and rare abbreviations. Only
    English is meant: a language without spaces is not split.
    """
    found: list[str] = []
    for word in _TOKEN.findall(text.translate(_PLAIN).lower()):
        if word not in _DROPPED:
            found += _WRITTEN.get(word) or _split(word)
    return tuple(found)


def _split(word: str) -> list[str]:
    """`didn't` as `did` and `n't`."""
    ends: list[str] = []
    while match := _CLITIC.fullmatch(word):
        word = match[1]
        ends.insert(0, match[2])
    return [word, *ends]


def ngrams(words: Sequence[str]) -> Counter[Tokens]:
    """How often each sequence of 1 to 4 consecutive words occurs."""
    return Counter(tuple(words[start : start + n]) for n in range(1, MAX_N + 1) for start in range(len(words) - n + 1))


def frequencies(captions: Iterable[Sequence[str]]) -> Counter[Tokens]:
    """For each n-gram, the number of images one of whose captions has it."""
    return Counter(gram for texts in captions for gram in {gram for text in texts for gram in ngrams(tokens(text))})


def cider_d(caption: str, references: Sequence[str], *, image_frequencies: Counter[Tokens], num_images: int) -> float:
    """CIDEr-D of one caption, from 0 to 10: the mean similarity to the references, over n = 1 to 4.

    The similarity is the cosine of TF-IDF vectors of n-grams, in which the caption's weights are at most those of the
    reference, times a penalty for a difference in length. `image_frequencies` are those of all references.
    """
    log_images = math.log(num_images)

    def vectors(text: str) -> tuple[list[dict[Tokens, float]], int]:
        found: list[dict[Tokens, float]] = [{} for _ in range(MAX_N)]
        words = tokens(text)
        for gram, count in ngrams(words).items():
            weight = log_images - math.log(max(1, image_frequencies[gram]))
            found[len(gram) - 1][gram] = count * weight
        return found, max(1, len(words))  # the official script counts pairs of words

    mine, my_length = vectors(caption)
    total = 0.0
    for reference in references:
        theirs, their_length = vectors(reference)
        penalty = math.exp(-((my_length - their_length) ** 2) / (2 * SIGMA**2))
        total += penalty * sum(map(_clipped_cosine, mine, theirs))
    return 10 * total / (MAX_N * len(references))


def _clipped_cosine(mine: dict[Tokens, float], theirs: dict[Tokens, float]) -> float:
    norm = math.sqrt(sum(value**2 for value in mine.values()) * sum(value**2 for value in theirs.values()))
    product = sum(min(value, theirs[gram]) * theirs[gram] for gram, value in mine.items() if gram in theirs)
    return product / norm if norm else 0.0


def bleu_sums(caption: str, references: Sequence[str]) -> dict[str, float]:
    """What BLEU-4 of many captions is computed from: sums over the captions.

    `length` and `reference_length` are numbers of words (of the reference whose length is nearest, the shorter of two),
    `total_<n>` and `matched_<n>` numbers of n-grams; an n-gram matches as often as one reference has it.
    """
    words, targets = tokens(caption), [tokens(reference) for reference in references]
    most: Counter[Tokens] = Counter()
    for target in targets:
        most |= ngrams(target)
    matched = ngrams(words) & most
    sums = {
        "length": float(len(words)),
        "reference_length": float(min((abs(len(t) - len(words)), len(t)) for t in targets)[1]),
    }
    for n in range(1, MAX_N + 1):
        sums[f"total_{n}"] = float(max(0, len(words) - n + 1))
        sums[f"matched_{n}"] = float(sum(count for gram, count in matched.items() if len(gram) == n))
    return sums


def rouge_l(caption: str, references: Sequence[str]) -> float:
    """ROUGE-L from 0 to 1: the F-measure of the longest common subsequence of words.

    As in the COCO caption evaluation, precision and recall are each the highest over the references.
    """
    words, targets = tokens(caption), [target for reference in references if (target := tokens(reference))]
    if not words or not targets:
        return 0.0
    common = [_common_length(words, target) for target in targets]
    if not any(common):
        return 0.0
    precision = max(common) / len(words)
    recall = max(length / len(target) for length, target in zip(common, targets, strict=True))
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    best = [0] * (len(second) + 1)
    for word in first:
        before = 0  # of the row above, one to the left
        for place, other in enumerate(second, start=1):
            above = best[place]
            best[place] = before + 1 if word == other else max(above, best[place - 1])
            before = above
    return best[-1]
