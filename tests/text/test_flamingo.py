"""Flamingo's rows: the ids and labels of a document are those that OpenFlamingo's published preprocessing yields."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken

from vlm.data.sources.interleaved import DocumentReader
from vlm.llms.bytes import byte_tokenizer
from vlm.schema import IGNORE, Sample
from vlm.text.encode import TextEncoder

END, IMAGE = "<|endofchunk|>", "<image>"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = byte_tokenizer()
    found.add_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    return found


def published(tokenizer: Any, sentences: list[str], places: list[int], *, length: int) -> tuple[list[int], list[int]]:
    """Ids and labels by open_flamingo/train/data.py and train_utils.py: images before sentences, then the masks."""
    pieces = [f"{END}{IMAGE}{text}" if number in places else text for number, text in enumerate(sentences)]
    text = " ".join(pieces).replace(END, "", 1).replace(f" {END}", END).replace(f"{IMAGE} ", IMAGE)
    ids = tokenizer(f"{text}{END}", add_special_tokens=False).input_ids[:length]
    image, end = tokenizer.convert_tokens_to_ids([IMAGE, END])
    labels: list[int] = []
    learned = False
    for token in ids:  # from an image, itself left out, to the end of its text
        labels.append(token if learned and token != image else IGNORE)
        learned = token == image or (learned and token != end)
    return ids, labels


@pytest.mark.parametrize("length", [999, 60])
@pytest.mark.parametrize(
    ("sentences", "places"),
    [
        (["A cat sits.", "It sleeps.", "A dog runs."], [0, 2]),
        (["An intro.", "A cat.", "More of it.", "And more.", "A dog."], [1, 4]),
        (["One.", "Two.", "Three."], [0, 1, 2]),
    ],
)
def test_a_document(tokenizer: Any, sentences: list[str], places: list[int], length: int) -> None:
    infos = [{"image_name": f"{n}.png", "matched_text_index": n, "matched_sim": 0.3} for n in places]
    found = DocumentReader(max_images=6, min_similarity=0.24).conversation(
        {"text_list": sentences, "image_info": infos}
    )
    encoder = TextEncoder(
        tokenizer=tokenizer,
        num_image_tokens=0,
        image_token=IMAGE,
        max_length=length,
        chat_template="flamingo",
        too_long="truncate",
    )
    row = encoder.encode(Sample("x", [], found.messages))
    ids, labels = published(tokenizer, sentences, places, length=length - 1)
    # The only difference is the bos token; a space between an intro and an image is none for the authors.
    intro = " " if places[0] else ""
    expected = tokenizer.decode(ids, skip_special_tokens=False).replace(f"{intro}{IMAGE}", IMAGE, 1)
    found_text = tokenizer.decode(row.input_ids[1:], skip_special_tokens=False)
    assert found_text[: len(expected) - 1] == expected[: len(found_text)][: len(expected) - 1]
    if not intro:
        assert row.input_ids[1:] == ids
        assert row.labels[1:] == labels
    assert [text for text, supervised in encoder.runs(row) if supervised]
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    seen = 0
    for token, before, is_placeholder in zip(row.input_ids, row.images_before, row.image_mask, strict=True):
        seen += token == image  # an image's own token belongs to it
        assert (before, is_placeholder) == (seen, False)


def test_an_unknown_token_of_images_is_refused(tokenizer: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^connector.image_token='<x>' is not a special token of the llm's tokenizer; "
    ):
        TextEncoder(tokenizer=tokenizer, num_image_tokens=0, image_token="<x>", max_length=9, chat_template="flamingo")


def test_the_token_of_an_image_stands_before_its_placeholders(tokenizer: Any) -> None:
    encoder = TextEncoder(
        tokenizer=tokenizer, num_image_tokens=2, image_token=IMAGE, max_length=99, chat_template="flamingo"
    )
    content: Any = [{"type": "image"}, {"type": "text", "text": "Q"}]
    answer: Any = {"role": "assistant", "content": [{"type": "text", "text": "A"}]}
    row = encoder.encode(Sample("x", [], [{"role": "user", "content": content}, answer]))
    assert row.image_mask == [False, False, True, True, False, False, False]
    assert row.input_ids[1] == tokenizer.convert_tokens_to_ids(IMAGE)
