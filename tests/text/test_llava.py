"""Ids and labels equal those of LLaVA's published preprocessing (arXiv 2310.03744, its repository), derived again here.

LLaVA tokenizes the text between images part by part, splits a conversation at "</s>" into rounds, and counts tokens to
find where the answer of a round begins. This file does the same in plain code, on SentencePiece's own ids.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.text import encoder, sentencepiece_folder
from vlm.data.conversations import RecordReader, caption_messages
from vlm.data.record_keys import Malformed
from vlm.llms.loading import load_tokenizer
from vlm.schema import IGNORE, BadSample, Sample

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IMAGE, K = -200, 3  # LLaVA's id of an image; visual tokens of an image


def record(*turns: str, image: Any = None) -> dict[str, Any]:
    """A record of LLaVA's file, from its turns: a human first."""
    conversations = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(turns)]
    return {"id": "a/1", "conversations": conversations, **({"image": image} if image else {})}


RECORDS = {
    "one turn, the image last": record("What is this?\n<image>", "A red circle.", image="a.jpg"),
    "the image first": record("<image>\nWhere is the star?", "top left", image="a.jpg"),
    "the image inside": record("How many <image> are there?", "There are 3.", image="a.jpg"),
    "an image alone": record("<image>", "a", image="a.jpg"),
    "many turns": record("<image>\nWhere?", "left", "And the star?", "3", "赤い?", "青い\n\nyes", image="a.jpg"),
    "two images": record("One\n<image>", "a", "<image> and this?", "b", image=["a.jpg", "b.jpg"]),
    "text only": record("Hi", "Hello.", "How many?", "2"),
    "odd white space": record("  What?\n\n ", " Yes ", "\tAnd?", "\n3", " x", "  y  "),
    "odd white space and an image": record(" \n <image>  \n What?  ", "  a\n", image="a.jpg"),
}


class Published:
    """What LLaVA makes of a record."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def model(self) -> Any:
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_file=str(self.folder / "tokenizer.model"))

    def pieces(self, text: str, *, opens: bool) -> list[int]:
        """SentencePiece's ids; it puts a space before a text, but not where the text goes on after a special token."""
        return self.model.encode(text) if opens else self.model.encode(f"\n{text}")[2:]  # "▁" and the newline's byte

    def tokenize(self, text: str, *, opens: bool = True) -> list[int]:
        """Without bos. Each part between images is a text of its own, and "</s>" is a token."""
        ids = []
        for number, part in enumerate(text.split("<image>")):
            ids += [IMAGE] * (number > 0)
            for index, segment in enumerate(part.split("</s>")):
                ids += [self.model.eos_id()] * (index > 0)
                ids += self.pieces(segment, opens=index == 0 and (opens or number > 0))
        return ids

    def plain(self, record: dict[str, Any]) -> tuple[list[int], list[int]]:
        """The first stage: the image, the caption, a newline; the question is not used."""
        ids = [self.model.bos_id(), *self.tokenize("<image>" + record["conversations"][1]["value"] + "\n")]
        return ids, [IGNORE] * 2 + ids[2:]

    def v1(self, record: dict[str, Any]) -> tuple[list[int], list[int]]:
        """The second stage."""
        turns = [turn["value"] for turn in record["conversations"]]
        if "image" in record:
            for number, turn in enumerate(turns):
                if "<image>" in turn:
                    turns[number] = ("<image>\n" + turn.replace("<image>", "").strip()).strip()
        text = SYSTEM + " "
        for number, turn in enumerate(turns):
            role = ("USER", "ASSISTANT")[number % 2]
            text += f"{role}: {turn}{(' ', '</s>')[number % 2]}" if turn else f"{role}:"
        ids = [self.model.bos_id(), *self.tokenize(text)]
        labels = list(ids)
        at = 1
        labels[:at] = [IGNORE]
        for number, turn in enumerate(text.split("</s>")):
            parts = turn.split(" ASSISTANT: ")
            if turn == "" or len(parts) != 2:
                break
            length = 1 + len(self.tokenize(turn, opens=number == 0))
            asked = 1 + len(self.tokenize(parts[0] + " ASSISTANT: ", opens=number == 0)) - 2
            labels[at : at + asked] = [IGNORE] * asked
            at += length
        labels[at:] = [IGNORE] * (len(ids) - at)
        return (ids, labels) if at == len(ids) else (ids, [IGNORE] * len(ids))


def expanded(ids: list[int], labels: list[int], pad: int) -> tuple[list[int], list[int]]:
    """With K visual tokens for each image."""
    pairs = zip(ids, labels, strict=True)
    each = [([pad] * K, [IGNORE] * K) if token == IMAGE else ([token], [label]) for token, label in pairs]
    return [token for tokens, _ in each for token in tokens], [label for _, found in each for label in found]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return Published(sentencepiece_folder(tmp_path_factory.mktemp("llava")))


@pytest.fixture(scope="module")
def tokenizer(published: Published) -> Any:
    return load_tokenizer(str(published.folder), package=None, trust=False)


def sample(record: dict[str, Any]) -> Sample:
    return Sample(record["id"], [], RecordReader(image_first=True).conversation(record).messages)


def rows(ours: Any, theirs: tuple[list[int], list[int]], pad: int) -> None:
    assert (ours.input_ids, ours.labels) == expanded(*theirs, pad)


@pytest.mark.parametrize("name", RECORDS)
def test_conversations(name: str, published: Published, tokenizer: Any) -> None:
    subject = encoder(tokenizer, "vicuna_v1", num_image_tokens=K)
    ids, labels = published.v1(RECORDS[name])
    assert set(labels) != {IGNORE}
    assert ids.count(IMAGE) == (name not in ("text only", "odd white space")) + (name == "two images")
    rows(subject.encode(sample(RECORDS[name])), (ids, labels), subject.pad_id)


@pytest.mark.parametrize("caption", ["a red circle", "two blue squares, 3 stars", "赤い丸", "a\nb"])
def test_captions(caption: str, published: Published, tokenizer: Any) -> None:
    subject = encoder(tokenizer, "caption", num_image_tokens=K)
    theirs = published.plain(record("Describe.\n<image>", caption, image="a.jpg"))
    rows(subject.encode(Sample("a/1", [], caption_messages("", caption))), theirs, subject.pad_id)
    prompt = subject.encode_prompt(Sample("a/1", [], caption_messages("", caption)))
    assert prompt.input_ids == [tokenizer.bos_token_id, *[subject.pad_id] * K]


@pytest.mark.parametrize("turns", [("What?",), ("What?", "a", "And?"), ("What?", "")])
def test_llava_learns_nothing_of_a_conversation_without_a_last_answer(turns: Any, published: Published) -> None:
    """Ours is a bad sample, which is counted; LLaVA prints a warning, and the row stays in its batch."""
    assert set(published.v1(record(*turns))[1]) == {IGNORE}
    with pytest.raises(Malformed, match=r"ends with a user turn|has an empty turn"):
        sample(record(*turns))


def test_two_images_in_one_turn_stay(published: Published, tokenizer: Any) -> None:
    """LLaVA-1.5 keeps one of them, whose features would then be those of both; LLaVA-NeXT leaves such a turn alone."""
    pair = record("<image> or <image>?", "a", image=["a.jpg", "b.jpg"])
    assert published.v1(pair)[0].count(IMAGE) == 1
    row = encoder(tokenizer, "vicuna_v1", num_image_tokens=K).encode(sample(pair))
    assert sum(row.image_mask) == 2 * K


@pytest.mark.parametrize("name", RECORDS)
def test_a_row_is_cut_where_llava_cuts_it(name: str, published: Published, tokenizer: Any) -> None:
    subject = encoder(tokenizer, "vicuna_v1", num_image_tokens=K, too_long="truncate")
    theirs = published.v1(RECORDS[name])
    ids, labels = expanded(*theirs, subject.pad_id)
    marked, _ = expanded(*theirs, IMAGE)
    for length in range(1, len(ids) + 1, 4):
        subject.max_length = length
        if IMAGE in marked[length:] or set(labels[:length]) == {IGNORE}:
            with pytest.raises(BadSample, match=r"image token|no supervised token in its first"):
                subject.encode(sample(RECORDS[name]))
            continue
        row = subject.encode(sample(RECORDS[name]))
        assert (row.input_ids, row.labels, row.num_cut) == (ids[:length], labels[:length], len(ids) - length)
