"""Answers as BLIP trains on captions: `data.plain_answers`."""

from __future__ import annotations

from dataclasses import replace

from tests.helpers.parts import SPEC
from tests.helpers.text import byte_tokenizer, encoder
from vlm.data.sample_reader import SampleReader, plain
from vlm.schema import Content, Sample, Source

IMAGE: Content = {"type": "image"}
QUESTION: list[Content] = [{"type": "text", "text": "What's (this)?"}]
ANSWER: list[Content] = [{"type": "text", "text": " A Dog's  *ball*, red-white; no. 1! "}]


class One(Source):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Sample:
        return Sample("a/1", [], [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}])


def test_answers_lose_their_capitals_and_some_punctuation() -> None:
    """Questions stay as they are; the characters are those that LAVIS removes."""
    reader = SampleReader(text=encoder(byte_tokenizer(), "plain"), spec=SPEC)
    written = replace(reader, plain_answers=True)
    for read in (written.sample, written.outline):
        question, answer = read(One(), 0).messages
        assert question["content"] == QUESTION
        assert answer["content"] == [{"type": "text", "text": "a dog's ball , red-white no 1"}]
    assert reader.sample(One(), 0) == One()[0]


def test_answers_have_fifty_words_at_most() -> None:
    assert plain({"type": "text", "text": "word " * 60})["text"].split() == ["word"] * 50
    assert plain(IMAGE) == IMAGE
