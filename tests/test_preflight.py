"""Preflight counts what there is to learn, shows it, and stops before step 0 on what cannot be trained on."""

from __future__ import annotations

import pytest
from PIL import Image

from tests.chat import byte_tokenizer, encoder, own_template, say
from vlm.data.preflight import PreflightReport, preflight, render
from vlm.schema import BadSample, Message, Sample

GOOD = [say("user", None, "Hi"), say("assistant", "no")]  # with `plain`: <bos>, 3 visual, "Hi\n", "no<eos>"


class Conversations:
    """A split of given conversations, each with one image; None cannot be read."""

    def __init__(self, *conversations: list[Message] | None, num_images: int = 1) -> None:
        self.conversations = conversations
        self.num_images = num_images
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> Sample:
        self.read.append(index)
        messages = self.conversations[index]
        if messages is None:
            raise BadSample(f"sample 'talk/{index}' has a truncated image; repair or remove it")
        return Sample(id=f"talk/{index}", images=[Image.new("RGB", (1, 1))] * self.num_images, messages=messages)


@pytest.fixture(scope="module")
def plain():
    return encoder(byte_tokenizer(), "plain", max_length=32)


def test_counts(plain):
    longer = [say("user", None, "Hi"), say("assistant", "no, never")]
    report = preflight(name="train", source=Conversations(GOOD, None, longer), encoder=plain, num_samples=8, show=1)
    assert report == PreflightReport(
        name="train",
        num_samples=2,
        num_unreadable=1,
        num_tokens=10 + 17,
        num_supervised_tokens=3 + 10,
        num_visual_tokens=6,
        longest_row=17,
        shown=["<bos><image×3>Hi\n⟦no<eos>⟧"],
        left_out={},
    )


def test_samples_are_spread_evenly(plain):
    source = Conversations(*[GOOD] * 100)
    assert preflight(name="train", source=source, encoder=plain, num_samples=4, show=0).shown == []
    assert source.read == [0, 25, 50, 75]


def test_table(plain):
    reports = [
        preflight(name=name, source=Conversations(*[GOOD] * 150), encoder=plain, num_samples=150, show=show)
        for name, show in (("train", 0), ("val", 2))
    ]
    text = render(reports)
    rows = [line.split() for line in text.splitlines()]
    assert [
        "│",
        "train",
        "│",
        "150",
        "│",
        "0",
        "│",
        "450",
        "│",
        "1,500",
        "│",
        "30.0%",
        "│",
        "450",
        "│",
        "10",
        "│",
    ] in rows
    assert text.endswith("val 0: <bos><image×3>Hi\n⟦no<eos>⟧\nval 1: <bos><image×3>Hi\n⟦no<eos>⟧\n")
    assert "train 0" not in text
    assert "left out" not in text
    same, other = {"symbols": 1200, "copies": 0, "drawings": 3}, {"pictures": 1}
    for counts, told in (
        ((same, same), "train and val left out: 1,200 symbols, 3 drawings\n"),
        ((same, other), "train left out: 1,200 symbols, 3 drawings\nval left out: 1 pictures\n"),
    ):
        splits = [Conversations(GOOD), Conversations(GOOD)]
        for split, left_out in zip(splits, counts, strict=True):
            split.left_out = left_out
        reports = [
            preflight(name=name, source=split, encoder=plain, num_samples=1, show=0)
            for name, split in zip(("train", "val"), splits, strict=True)
        ]
        assert render(reports).endswith(told)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([say("user", None), say("assistant", " ")], "sample 'talk/1' has no supervised token: .*; remove it"),
        (
            [say("user", "a"), say("assistant", "b")],
            "sample 'talk/1' holds 1 image but its text has 0 image placeholders",
        ),
        (
            [say("user", "a" * 30, None), say("assistant", "b")],
            r"'talk/1' takes 37 tokens but data.max_length is 32, .* 2 image tokens and 2 supervised .*max_length=37",
        ),
    ],
)
def test_what_cannot_be_trained_on_stops_it(plain, messages, error):
    with pytest.raises(ValueError, match=f"preflight of 'val': .*{error}"):
        preflight(name="val", source=Conversations(GOOD, messages), encoder=plain, num_samples=2, show=0)


def test_more_answers_than_the_llm_takes_stop_it(plain):
    source = Conversations(GOOD, [*GOOD, say("user", "a"), say("assistant", "b")])
    options = {"name": "train", "source": source, "encoder": plain, "show": 0, "max_answers": 1}
    assert preflight(num_samples=1, **options).num_samples == 1
    with pytest.raises(ValueError, match=r"sample 'talk/1' has 2 answers, but .* 1 a row; set data.train_on=last_a"):
        preflight(num_samples=2, **options)


def test_missing_end_of_turn_stops_it():
    # This template forgets the end-of-turn token in conversations of more than four messages.
    tokenizer = own_template(byte_tokenizer(), "", "' + ('</s>' if messages | length > 4 else '<eos>') + '")
    subject = encoder(tokenizer, None)
    source = Conversations([*GOOD, *[say("user", "a"), say("assistant", "b")] * 2])
    with pytest.raises(
        ValueError, match="preflight of 'train': sample 'talk/0': an assistant turn is followed by '</s>"
    ):
        preflight(name="train", source=source, encoder=subject, num_samples=1, show=0)


def test_a_split_without_samples(plain):
    with pytest.raises(
        ValueError, match=r"preflight of 'val' could read none of 2 samples; .*'talk/0' has a truncated"
    ):
        preflight(name="val", source=Conversations(None, None), encoder=plain, num_samples=2, show=0)
    with pytest.raises(ValueError, match="preflight of 'val' has 0 samples"):
        preflight(name="val", source=Conversations(), encoder=plain, num_samples=2, show=0)
