"""The maximum length of a conversation in tokens, and the truncation of longer ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

from vlm.schema import IGNORE, BadSample
from vlm.text.row import Encoded
from vlm.text.turns import count

TooLong = Literal["drop", "truncate_text", "truncate"]


def check_length(sample_id: str, row: Encoded, max_length: int, *, may_cut: bool = False) -> None:
    """Raise BadSample for more than `max_length` tokens; with `may_cut`, the error also suggests truncation."""
    length = len(row.input_ids)
    if length <= max_length:
        return
    num_visual = sum(row.image_mask[max_length:])
    num_supervised = sum(label != IGNORE for label in row.labels[max_length:])
    or_cut = ", or data.too_long=truncate_text" if may_cut else ""
    raise BadSample(
        f"sample '{sample_id}' takes {length} tokens but data.max_length is {max_length}, which would cut "
        f"{count(num_visual, 'image token')} and {count(num_supervised, 'supervised token')}; "
        f"set data.max_length={length} or more{or_cut}",
        "too_long",
    )


def kept_length(
    row: Encoded, answers: Sequence[int | None], max_length: int, how: Literal["truncate_text", "truncate"]
) -> int | None:
    """The length to which a conversation of more than `max_length` tokens is truncated.

    `answers[t]` is the index of the answer to which token t belongs, or None. With `truncate`, the result is
    `max_length`, as in LLaVA. With `truncate_text`, it ends with the last complete, non-empty answer that fits; if no
    answer fits as a whole, it ends inside an answer, without an end-of-turn token.

    It is None where an image, or with `truncate_text` all answers, would be cut.
    """
    all_counted = row.images_before.index(row.images_before[-1]) + 1  # tokens until all images are counted
    last_visual = max((index + 1 for index, is_image in enumerate(row.image_mask) if is_image), default=0)
    at_least = max(all_counted, last_visual)
    if how == "truncate":
        return max_length if at_least <= max_length else None
    kept = None
    end = 0
    for answer, run in itertools.groupby(answers):
        size = len(list(run))
        end += size
        if answer is not None and size > 1 and at_least <= end <= max_length:
            kept = end
    if kept is None and at_least <= max_length and not row.image_mask[max_length - 1]:
        last, first_cut = answers[max_length - 1 : max_length + 1]
        kept = max_length if last is not None and last == first_cut else None
    return kept
