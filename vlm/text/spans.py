"""Locates the assistant's turns in a rendered conversation, and the tokens that belong to them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

LONGEST_MARK = 128  # maximum characters of an end-of-turn token
_SENTINEL = re.compile(r"vlm-turn-(\d+)-vlm")


class Span(NamedTuple):
    """Characters [start, end) of a supervised turn: all after its generation prompt, end-of-turn mark included."""

    start: int
    end: int
    mark: int  # id of the end-of-turn token


class Skeleton(NamedTuple):
    """The template's own text: `pieces[n]` is before the text `order[n]`, the last piece after all texts."""

    pieces: list[str]
    order: list[int]


def sentinels(number: int) -> list[str]:
    """Texts that no template writes, to find where it puts the texts of a conversation."""
    return [f"vlm-turn-{index}-vlm" for index in range(number)]


def skeleton_of(rendered: str, number: int) -> Skeleton | None:
    """The skeleton of a template that rendered `number` sentinels; None unless it has each of them once."""
    parts = _SENTINEL.split(rendered)
    order = [int(index) for index in parts[1::2]]
    return Skeleton(parts[::2], order) if sorted(order) == list(range(number)) else None


def answer_spans(
    rendered: str, *, skeleton: Skeleton | None, roles: Sequence[str], texts: Sequence[str], marks: Mapping[str, int]
) -> list[Span]:
    """The assistant's turns in `rendered`, each with the mark in `marks` (added token -> id) that ends it.

    A turn begins with the spaces that the template writes before the answer: a generation prompt is cut before them
    (`cut_spaces`), because many tokenizers make one token of a space and the word after it.
    A blank mark (Gemma has "\\n" as a token) ends a line, not a turn, and is never taken.

    Raises ValueError where skeleton and texts do not rebuild `rendered` exactly, and for a turn without an end mark.
    """
    positions = _positions(rendered, skeleton, texts)
    if skeleton is None or not positions:
        raise ValueError("the chat template rewrites the turns, so that the spans to supervise cannot be found")
    spans = []
    for number, (index, (start, end)) in enumerate(zip(skeleton.order, positions, strict=True)):
        if roles[index] != "assistant":
            continue
        before, piece = skeleton.pieces[number : number + 2]
        after = piece.lstrip()
        # The longest match. Looking up prefixes is faster than trying thousands of added tokens.
        lengths = range(min(len(after), LONGEST_MARK), 0, -1)
        mark = next((after[:length] for length in lengths if after[:length] in marks), None)
        if mark is None:
            raise ValueError(
                f"an assistant turn is followed by {piece[:20]!r}, which is not a special token of this tokenizer, so "
                "that the end of turn cannot be learned"
            )
        # The model also has to write the space that some templates put before the mark.
        spans.append(
            Span(
                start - (len(before) - len(cut_spaces(before))),
                end + len(piece) - len(after) + len(mark),
                marks[mark],
            )
        )
    return spans


def cut_spaces(text: str) -> str:
    """The text before an answer as a generation prompt ends: without trailing spaces."""
    return text.rstrip(" ")


def _positions(rendered: str, skeleton: Skeleton | None, texts: Sequence[str]) -> list[tuple[int, int]]:
    """Start and end of each text, possibly stripped, in `rendered`; empty where these do not rebuild it."""
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


def across(offsets: Sequence[tuple[int, int]], starts: Sequence[int]) -> list[int]:
    """Those of `starts`, in order, that lie inside a token, which joins the end of a prompt with an answer."""
    inside = []
    index = 0
    for start in starts:
        while index < len(offsets) and offsets[index][1] <= start:
            index += 1
        if index < len(offsets) and offsets[index][0] < start:
            inside.append(start)
    return inside


def with_breaks(text: str, spans: Sequence[Span], starts: Sequence[int], mark: str) -> tuple[str, list[Span]]:
    """The text with `mark` before each of `starts`, which are starts of spans, and all spans, shifted accordingly."""
    broken = set(starts)
    pieces, moved = [], []
    at = shift = 0
    for span in spans:
        if span.start in broken:
            pieces += [text[at : span.start], mark]
            at = span.start
            shift += len(mark)
        moved.append(span._replace(start=span.start + shift, end=span.end + shift))
    return "".join([*pieces, text[at:]]), moved


def answers_at(
    text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Sequence[Span]
) -> list[int | None]:
    """The number (from 0) of the span that each token begins in, or None.

    Several byte tokens may share one character; an empty token counts at its own position. Raises ValueError for a span
    that does not end with its mark.
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
