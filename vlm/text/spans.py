"""Locates the assistant's turns in a rendered conversation, and the tokens that belong to them."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

LONGEST_MARK = 128  # maximum characters of an end-of-turn token, called a mark here
_SENTINEL = re.compile(r"vlm-turn-(\d+)-vlm")


class Span(NamedTuple):
    """Characters [start, end) of a supervised turn: from its generation prompt to its mark, the mark included."""

    start: int
    end: int
    mark: int  # id of the end-of-turn token; of a mark that is plain text, id of its last token


class Skeleton(NamedTuple):
    """What the template itself writes: `pieces[n]` comes before text `order[n]`, the last piece after all texts."""

    pieces: list[str]
    order: list[int]


def sentinels(number: int) -> list[str]:
    """Texts that no template writes. They show where a template puts the texts of a conversation."""
    return [f"vlm-turn-{index}-vlm" for index in range(number)]


def skeleton_of(rendered: str, number: int) -> Skeleton | None:
    """The skeleton of a template that rendered `number` sentinels; None unless it has each of them once."""
    parts = _SENTINEL.split(rendered)
    order = [int(index) for index in parts[1::2]]
    return Skeleton(parts[::2], order) if sorted(order) == list(range(number)) else None


def answer_spans(
    rendered: str,
    *,
    skeleton: Skeleton | None,
    roles: Sequence[str],
    texts: Sequence[str],
    marks: Mapping[str, int],
    in_text: bool = False,
) -> list[Span]:
    """The assistant's turns in `rendered`, each with its mark in `marks` (token -> id).

    A turn includes the spaces that the template writes before the answer, and a generation prompt ends before them
    (`cut_spaces`), because many tokenizers have one token for a space and the word after it. Marks are added tokens,
    and white space is not one, even if it is an added token, as "\\n" is for Gemma. With `in_text`, the mark is plain
    text that follows the answer directly, such as the newline after a caption.

    Raises ValueError where skeleton and texts do not give exactly `rendered`, and for a turn without a mark.
    """
    positions = _positions(rendered, skeleton, texts)
    if skeleton is None or not positions:
        raise ValueError("the chat template rewrites the turns, so the spans to supervise cannot be found")
    spans = []
    for number, (index, (start, end)) in enumerate(zip(skeleton.order, positions, strict=True)):
        if roles[index] != "assistant":
            continue
        before, piece = skeleton.pieces[number : number + 2]
        after = piece if in_text else piece.lstrip()
        # The longest match. Looking up prefixes is faster than trying thousands of added tokens.
        lengths = range(min(len(after), LONGEST_MARK), 0, -1)
        mark = next((after[:length] for length in lengths if after[:length] in marks), None)
        if mark is None:
            raise ValueError(
                f"an assistant turn is followed by {piece[:20]!r}, which is not a special token of this tokenizer, so "
                "the end of turn cannot be learned"
            )
        # Some templates put a space before the mark, which the model has to generate too.
        spans.append(
            Span(
                start - (len(before) - len(cut_spaces(before))),
                end + len(piece) - len(after) + len(mark),
                marks[mark],
            )
        )
    return spans


def cut_spaces(text: str) -> str:
    """The text of a generation prompt without its trailing spaces."""
    return text.rstrip(" ")


def _positions(rendered: str, skeleton: Skeleton | None, texts: Sequence[str]) -> list[tuple[int, int]]:
    """Start and end of each text, which may be stripped, in `rendered`; empty where the result is not `rendered`."""
    if skeleton is None or not rendered.startswith(skeleton.pieces[0]):
        return []
    positions = []
    at = len(skeleton.pieces[0])
    for index, piece in zip(skeleton.order, skeleton.pieces[1:], strict=True):
        text = texts[index]
        variants = (text, text.rstrip(), text.lstrip(), text.strip(), text.lstrip("\n"), text.strip("\n"))
        fitting = [variant for variant in variants if rendered.startswith(variant + piece, at)]
        if not fitting:
            return []
        positions.append((at, at + len(fitting[0])))
        at += len(fitting[0]) + len(piece)
    return positions if at == len(rendered) else []


def crossed(offsets: Sequence[tuple[int, int]], positions: Sequence[int]) -> list[int]:
    """Those of `positions` (sorted) that are inside a token, which then has parts of both the prompt and the answer."""
    inside = []
    index = 0
    for position in positions:
        while index < len(offsets) and offsets[index][1] <= position:
            index += 1
        if index < len(offsets) and offsets[index][0] < position:
            inside.append(position)
    return inside


def with_breaks(text: str, spans: Sequence[Span], positions: Sequence[int], mark: str) -> tuple[str, list[Span]]:
    """The text with `mark` inserted at each of `positions` (sorted), and the spans, shifted.

    A mark at the start of a span is put before the span.
    """
    pieces = [text[start:end] for start, end in pairwise([0, *positions, len(text)])]
    moved = [
        span._replace(
            start=span.start + len(mark) * bisect_right(positions, span.start),
            end=span.end + len(mark) * bisect_left(positions, span.end),
        )
        for span in spans
    ]
    return mark.join(pieces), moved


def answers_at(
    text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Sequence[Span]
) -> list[int | None]:
    """The index of the span in which each token starts, or None.

    Several byte tokens may have the same character. Raises ValueError for a span that does not end with its mark.
    """
    answers: list[int | None] = [None] * len(ids)
    index = 0
    for number, span in enumerate(spans):
        last = None
        while index < len(ids) and offsets[index][0] < span.end:
            if offsets[index][0] >= span.start:
                answers[index] = number
                last = ids[index]
            index += 1
        if last != span.mark:
            raise ValueError(
                f"the end of turn {text[span.start : span.end][-20:]!r} is not one token of this tokenizer"
            )
    return answers
