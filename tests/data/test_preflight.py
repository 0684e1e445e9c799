"""Preflight counts what there is to learn, shows it, and stops before step 0 on what cannot be trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from tests.helpers.text import byte_tokenizer, encoder, own_template, say
from vlm.data.filter import Filtered
from vlm.data.preflight import PreflightReport, preflight, render
from vlm.data.reading import Reading
from vlm.data.rows import STATES, Rows
from vlm.data.sample_reader import SampleReader
from vlm.schema import BadSample, Message, Sample, Source, Split, VisualSpec
from vlm.text.encode import TextEncoder
from vlm.training.results import print_metrics

GOOD = [say("user", None, "Hi"), say("assistant", "no")]  # with `plain`: <bos>, 3 visual, "Hi\n", "no<eos>"


class Conversations(Source):
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


def rows(source: Conversations, text: TextEncoder, *, name: Split = "train", max_bad: int = 1, **options: Any) -> Rows:
    spec = VisualSpec(num_tokens=3, image_size=(1, 1), transform=lambda image: torch.zeros(3, 1, 1))
    reader = SampleReader(text=text, spec=spec, **options)
    return Rows(source=source, split=name, reader=reader, max_bad=max_bad, bad_samples_file=None)


def test_counts(plain):
    longer = [say("user", None, "Hi"), say("assistant", "no, never")]
    report = preflight(rows(Conversations(GOOD, None, longer), plain), num_samples=8, show=1)
    assert report == PreflightReport(
        name="train",
        num_bad=1,
        tokens=[10, 17],
        visual=[3, 3],
        supervised=[3, 10],
        shown=["<bos><image×3>Hi\n⟦no<eos>⟧"],
        left_out={},
    )


def test_samples_are_spread_evenly(plain):
    source = Conversations(*[GOOD] * 100)
    assert preflight(rows(source, plain), num_samples=4, show=0).shown == []
    assert source.read == [0, 25, 50, 75]


def test_table(plain):
    longer = [say("user", None, "Hi"), say("assistant", "no, never")]
    reports = [
        preflight(rows(Conversations(GOOD, GOOD, longer, None), plain, name=name), num_samples=4, show=show)
        for name, show in (("train", 0), ("val", 2))
    ]
    text = render(reports)
    assert text.startswith("Preflight: tokens per sample, before the first step ")
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines()]
    assert ["train", "4", "1", "10", "17", "3", "3", "43.2%"] in cells
    assert text.endswith("val 0: <bos><image×3>Hi\n⟦no<eos>⟧\nval 1: <bos><image×3>Hi\n⟦no<eos>⟧\n")
    assert "train 0" not in text
    assert "left out" not in text
    same, other = {"symbols": 1200, "copies": 0, "drawings": 3}, {"photos": 1, "copies": 0}
    for counts, told in (
        ((same, same), "train and val left out: 1,200 symbols, 3 drawings\n"),
        ((same, other), "train left out: 1,200 symbols, 3 drawings\nval left out: 1 photo\n"),
    ):
        splits = [Conversations(GOOD), Conversations(GOOD)]
        for split, left_out in zip(splits, counts, strict=True):
            split.left_out = left_out
        reports = [
            preflight(rows(split, plain, name=name), num_samples=1, show=0)
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
def test_what_training_would_refuse_is_a_bad_sample(plain, messages, error):
    source = Conversations(GOOD, messages, GOOD)
    assert preflight(rows(source, plain), num_samples=3, show=0).num_bad == 1
    with pytest.raises(ValueError, match=rf"{error}.* \(1 bad samples? of 3, 0 allowed: repair them, or set data"):
        preflight(rows(source, plain, max_bad=0), num_samples=3, show=0)
    with pytest.raises(ValueError, match=r"preflight of 'val' can use none of 1 sample; repair the data, first: samp"):
        preflight(rows(Conversations(messages), plain, name="val"), num_samples=1, show=0)
    with pytest.raises(ValueError, match=r"none of the 2 samples of train can be used; .*, for example: sample 'talk/"):
        rows(Conversations(messages, messages), plain, max_bad=2)[[0]]


def test_more_answers_than_the_llm_takes_are_bad(plain):
    source = Conversations(GOOD, [*GOOD, say("user", "a"), say("assistant", "b")])
    assert preflight(rows(source, plain, max_answers=1, max_bad=0), num_samples=1, show=0).num_bad == 0
    with pytest.raises(ValueError, match=r"sample 'talk/1' has 2 answers, but .* 1 per row; set data.train_on=last_a"):
        preflight(rows(source, plain, max_answers=1, max_bad=0), num_samples=2, show=0)


def test_a_sample_that_the_template_refuses_is_bad_in_the_loader_too():
    # This template forgets the end-of-turn token in conversations of more than four messages.
    tokenizer = own_template(byte_tokenizer(), "", "' + ('</s>' if messages | length > 4 else '<eos>') + '")
    long = [*GOOD, *[say("user", "a"), say("assistant", "b")] * 2]
    made = rows(Conversations(GOOD, long), encoder(tokenizer, None))
    assert preflight(made, num_samples=2, show=0).num_bad == 1
    assert made[[1]].samples[0].id == "talk/0"
    with pytest.raises(ValueError, match=r"can use none of .*: sample 'talk/0': an assistant turn is followed"):
        preflight(rows(Conversations(long), encoder(tokenizer, None)), num_samples=1, show=0)


def test_a_split_without_samples(plain):
    with pytest.raises(ValueError, match=r"preflight of 'val' can use none of 2 samples; .*'talk/0' has a truncated"):
        preflight(rows(Conversations(None, None), plain, name="val"), num_samples=2, show=0)
    with pytest.raises(ValueError, match="preflight of 'val' has 0 samples"):
        preflight(rows(Conversations(), plain, name="val"), num_samples=2, show=0)


def test_only_rgb_is_taken(plain):
    class Deep(Conversations):
        def __getitem__(self, index: int) -> Sample:
            image = Image.new(("I;16", "L", "RGBA", "RGB")[index], (1, 1))
            return replace(super().__getitem__(index), images=[image])

    made = rows(Deep(*[GOOD] * 4), plain, max_bad=3)
    for index, mode in enumerate(("I;16", "L", "RGBA")):
        message = (
            rf"'talk/{index}' has an image \(number 1\) of mode {mode} where RGB with 8 bits per channel is needed"
        )
        with pytest.raises(BadSample, match=message):
            made.reader.sample(made.source, index)
    assert preflight(made, num_samples=4, show=0).num_bad == 3
    assert [made[[index]].samples[0].id for index in range(4)] == ["talk/3"] * 4


@pytest.mark.parametrize(
    ("messages", "num_images", "holds"),
    [
        (GOOD, 2, "2 images but its text has 1 image placeholder"),
        (GOOD, 0, "0 images but its text has 1 image placeholder"),
        ([say("user", None, None), GOOD[1]], 1, "1 image but its text has 2 image placeholders"),
    ],
)
def test_every_placeholder_has_an_image(plain, messages, num_images, holds):
    made = rows(Conversations(messages, num_images=num_images), plain)
    with pytest.raises(BadSample) as caught:
        made.reader.sample(made.source, 0)
    assert str(caught.value) == f"sample 'talk/0' holds {holds}; add or remove an <image>"
    assert caught.value.kind == "placeholder_mismatch"


@pytest.mark.parametrize(
    ("messages", "option", "says"),
    [
        ([say("user", None, "a" * 600_000), say("assistant", "b")], "max_characters", "600,001 characters, more"),
        ([say("user", None, "a"), *[say("assistant", "b"), say("user", "c")] * 999, say("assistant", "d")],
         "max_turns", "2,000 turns, more"),
    ],
)  # fmt: skip
def test_texts_have_limits_that_an_option_raises(plain, messages, option, says):
    source = Conversations(messages)
    with pytest.raises(
        BadSample, match=rf"'talk/0' has {says} than the limit of .*, or set data\.reading\.{option}="
    ) as caught:
        rows(source, plain).reader.sample(source, 0)
    needed = int(str(caught.value).rpartition("=")[2])
    reader = rows(source, plain, reading=Reading(**{option: needed})).reader
    assert reader.sample(source, 0).messages == messages


def test_ids_and_errors_can_be_printed_and_written(plain, tmp_path):
    class Odd(Conversations):
        def __getitem__(self, index: int) -> Sample:
            if index:
                raise BadSample("sample 'b\ud83d\x1b[31m' is broken")
            return replace(super().__getitem__(index), id="a\udce9\x1b[2J\n")

    made = rows(Odd(GOOD, GOOD), plain)
    made.bad_samples_file = tmp_path / "bad_samples.jsonl"
    assert made[[0]].samples[0].id == made[[1]].samples[0].id == r"a\udce9\x1b[2J\n"
    (line,) = made.bad_samples_file.read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["error"] == r"sample 'b\ud83d\x1b[31m' is broken"


def test_a_folder_of_missing_pictures_costs_no_more_than_its_share(plain, tmp_path):
    """The first half of the split lies in a folder that is not there."""
    source = Conversations(*[None] * 1100, *[GOOD] * 1100)
    made = rows(source, plain, max_bad=2200)
    made.bad_samples_file = tmp_path / "bad_samples.jsonl"
    for index in range(0, 1100, 30):
        made[[index]]
    assert len(source.read) < 200  # the next sound one of each would be up to 1,100 further on
    for index in range(1100):
        made[[index]]
    lines = made.bad_samples_file.read_text().splitlines()
    assert len(lines) == 1001
    assert json.loads(lines[-1]) == {"split": "train", "note": "more are counted, not named"}
    assert (made.states == STATES.index("other_defect")).sum() == 1100


def test_a_filter_that_leaves_most_out_says_so_before_training(plain):
    left_out = Filtered(Conversations(*[GOOD] * 286), split="train", left_out=range(211))
    text = render([preflight(rows(left_out, plain), num_samples=1, show=0)])
    assert text.endswith("train left out: 211 samples by data.filter (74 % of train)\n")


def test_figures_have_no_negative_zero(capsys):
    print_metrics({"val/visual_gain": -0.0001, "val/loss": -0.0006})
    printed = capsys.readouterr().out
    assert "-0.000" not in printed
    assert "-0.001" in printed
