"""Answers as BLIP trains on captions: `data.plain_answers`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from tests.helpers.parts import SPEC
from tests.helpers.text import byte_tokenizer, encoder
from vlm.data.sample_reader import SampleReader, plain, split_answer
from vlm.schema import Content, Message, Sample, Source

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


def test_an_answer_begins_in_its_question() -> None:
    """Each number of words is as frequent, from none to all but one; the validation split keeps its answers whole."""
    answer: Message = {"role": "assistant", "content": [{"type": "text", "text": "a red circle\n and a star"}]}
    asked: list[Message] = [{"role": "user", "content": [IMAGE]}, {"role": "user", "content": [IMAGE, *QUESTION]}]
    for question, start in zip(asked, ("", "What's (this)?"), strict=True):
        found = Counter()
        for number in range(600):
            first, last = split_answer(Sample(f"a/{number}", [], [question, answer])).messages
            assert first["content"][0] == IMAGE
            given = "".join(item["text"] for item in first["content"][1:]).removeprefix(start)
            learned = "".join(item["text"] for item in last["content"])
            assert f"{given} {learned}".split() == ["a", "red", "circle", "and", "a", "star"]
            assert not start or not given or given.startswith(" ")
            found[len(given.split())] += 1
        assert found.keys() == {*range(6)}
        assert min(found.values()) > 70
    assert (
        split_answer(Sample("a/1", [], [asked[0], {"role": "assistant", "content": QUESTION[:0]}])).messages[0]
        == asked[0]
    )
    reader = SampleReader(text=encoder(byte_tokenizer(), "plain"), spec=SPEC, plain_answers=True, split_answers=True)
    question, answer = reader.sample(One(), 0).messages
    words = [item["text"] for message in (question, answer) for item in message["content"]]
    assert " ".join(words).split() == ["What's", "(this)?", "a", "dog's", "ball", ",", "red-white", "no", "1"]


def test_answers_have_fifty_words_at_most() -> None:
    assert plain({"type": "text", "text": "word " * 60})["text"].split() == ["word"] * 50
    assert plain(IMAGE) == IMAGE
