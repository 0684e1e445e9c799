"""Rows of a text alone, for objectives that take pairs of an image and a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlm.schema import BadSample, Sample
from vlm.text.lengths import check_length
from vlm.text.row import Encoded
from vlm.text.templates import IMAGE_PLACEHOLDER
from vlm.text.turns import check_turns, count, texts_of


def pair_row(
    sample: Sample, *, tokenizer: Any, ids_of: Callable[[str], list[int]], max_length: int, may_cut: bool
) -> Encoded:
    """The last answer of a sample between the tokenizer's first and last token; all tokens are supervised.

    `ids_of` gives the ids of a text without these. A row of more than `max_length` tokens is truncated before its last
    token if `may_cut`. Raises BadSample otherwise, for an empty text, and unless there is one image.
    """
    check_turns(sample.id, sample.messages, last="assistant")
    if sample.num_images != 1:
        raise BadSample(
            f"sample '{sample.id}' has {count(sample.num_images, 'image')} and must have 1, because the objective "
            "takes pairs of an image and a text; choose data of captions",
            "placeholder_mismatch",
        )
    texts = texts_of(sample.id, sample.messages, sample.num_images)
    if not (text := texts[-1].replace(IMAGE_PLACEHOLDER, "").strip()):
        raise BadSample(f"sample '{sample.id}' has an empty text; remove it", "empty_text")
    first = tokenizer.bos_token_id if tokenizer.cls_token_id is None else tokenizer.cls_token_id
    last = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
    kept = whole = [token for token in (first, *ids_of(text), last) if token is not None]
    if len(whole) > max_length and may_cut:
        kept = [*whole[: max_length - 1], whole[-1]]
    row = Encoded(
        input_ids=kept,
        image_mask=[False] * len(kept),
        images_before=[1] * len(kept),
        labels=kept,
        text=text,
        num_cut=len(whole) - len(kept),
    )
    check_length(sample.id, row, max_length, may_cut=True)
    return row
