"""Where an assistant's turns lie in a rendered conversation, and which tokens belong to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """Characters [start, end) of a turn to learn, end-of-turn mark included."""

    start: int
    end: int
    mark: int  # id of the end-of-turn token


def pieces_between(skeleton: str, sentinels: Sequence[str]) -> list[str]:
    """What a template writes before, between and after the texts, from a rendering with sentinels in their place.

    Empty unless every sentinel is there, in order.
    """
    pieces = []
    for sentinel in sentinels:
        piece, found, skeleton = skeleton.partition(sentinel)
        if not found:
            return []
        pieces.append(piece)
    return [*pieces, skeleton]


def answer_spans(
    rendered: str, *, pieces: Sequence[str], roles: Sequence[str], texts: Sequence[str], marks: Mapping[str, int]
) -> list[Span]:
    """The assistant's turns in `rendered`, each with the mark in `marks` (added token -> id) that ends it.

    A blank mark (Gemma has "\\n" as a token) ends a line, not a turn, and is never taken.

    Raises ValueError where pieces and texts do not rebuild `rendered` exactly, and for a turn that no mark ends.
    """
    places = _places(rendered, pieces, texts)
    if not places:
        raise ValueError("the chat template rewrites the turns, so that the spans to supervise cannot be found")
    spans = []
    for role, piece, (start, end) in zip(roles, pieces[1:], places, strict=True):
        if role != "assistant":
            continue
        after = piece.lstrip()
        # The longest that fits. Looking up what is there beats asking each of the thousands that some tokenizers have.
        mark = next((after[:length] for length in range(len(after), 0, -1) if after[:length] in marks), None)
        if mark is None:
            raise ValueError(
                f"an assistant turn is followed by {piece[:20]!r}, which is no special token of this tokenizer, so "
                "that the end of turn cannot be learnt"
            )
        # The model has to write the space that some templates put before the mark, too.
        spans.append(Span(start, end + len(piece) - len(after) + len(mark), marks[mark]))
    return spans


def _places(rendered: str, pieces: Sequence[str], texts: Sequence[str]) -> list[tuple[int, int]]:
    """Start and end of each text, perhaps stripped, in `rendered`; empty where pieces and texts do not rebuild it."""
    if not pieces or not rendered.startswith(pieces[0]):
        return []
    places = []
    at = len(pieces[0])
    for text, piece in zip(texts, pieces[1:], strict=True):
        variants = (text, text.rstrip(), text.lstrip(), text.strip())
        fitting = [variant for variant in variants if rendered.startswith(variant + piece, at)]
        if not fitting:
            return []
        places.append((at, at + len(fitting[0])))
        at += len(fitting[0]) + len(piece)
    return places if at == len(rendered) else []


def answers_at(
    text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Sequence[Span]
) -> list[int | None]:
    """The number (from 0) of the span that each token begins in, or None.

    Where a token joins the end of the prompt with the start of an answer, it counts as the answer's if all it takes
    from the prompt is space and it brings more than space (SentencePiece's "▁yes" after "ASSISTANT: "). A newline
    joined with the prompt's newline stays the prompt's. Several byte tokens may share one character, and an empty token
    has the place where it stands. Raises ValueError for a span that does not end with its mark.
    """
    answers: list[int | None] = [None] * len(ids)
    index = 0
    for number, span in enumerate(spans):
        last = None
        while index < len(ids) and offsets[index][0] < span.end:
            start, end = offsets[index]
            if start < span.start:
                inside = (
                    end > span.start and text[start : span.start].isspace() and bool(text[span.start : end].strip())
                )
            else:
                inside = True
            if inside:
                answers[index] = number
                last = ids[index]
            index += 1
        if last != span.mark:
            raise ValueError(
                f"the end of turn {text[span.start : span.end][-20:]!r} is not one token of this tokenizer"
            )
    return answers
