"""What is supervised, the system prompt, and conversations longer than a row, proved by decoding."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import ToTensor

from tests.helpers.conversations import conversations, few, num_images
from tests.helpers.text import Listed, encoder, say, templated
from vlm.data.datamodule import VLMDataModule
from vlm.schema import IGNORE, BadSample, Sample, VisualSpec
from vlm.text.templates import TEMPLATES

TWO_TURNS = [
    *(say("user", None, "What?"), say("assistant", "a star")),
    *(say("user", "Where?"), say("assistant", "left")),
]
FIRST_NOT_LEARNED = [TWO_TURNS[0], {**TWO_TURNS[1], "supervised": False}, *TWO_TURNS[2:]]
SPEC = VisualSpec(num_tokens=3, image_size=(8, 8), transform=ToTensor())


def test_the_options_of_the_data_reach_the_encoder(bytes_only):
    options = {"train_on": "last_assistant", "system_prompt": "Be brief.", "too_long": "truncate_text"}
    data = VLMDataModule(source=lambda split: Listed([Sample("a", [], []), Sample("b", [], [])]), **options)
    data.connect(spec=SPEC, tokenizer=bytes_only, chat_template="plain")
    assert {name: getattr(data.text, name) for name in options} == options


# --- train_on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train_on", "shown"),
    [
        ("assistant", "<bos><image×3>What?\n⟦a star<eos>⟧Where?\n⟦left<eos>⟧"),
        ("last_assistant", "<bos><image×3>What?\na star<eos>Where?\n⟦left<eos>⟧"),
        ("all", "⟦<bos>⟧<image×3>⟦What?\na star<eos>Where?\nleft<eos>⟧"),
    ],
)
def test_train_on(bytes_only, train_on, shown):
    subject = encoder(bytes_only, "plain", train_on=train_on)
    assert subject.display(subject.encode(Sample("a/1", [], TWO_TURNS))) == shown
    assert set(subject.encode_prompt(Sample("a/1", [], TWO_TURNS)).labels) == {IGNORE}


@pytest.mark.parametrize("template", TEMPLATES)
def test_train_on_all_leaves_out_the_images_only(merging, template):
    row = encoder(merging, template, train_on="all").encode(Sample("a/1", [], TWO_TURNS))
    for token, label, is_image in zip(row.input_ids, row.labels, row.image_mask, strict=True):
        assert label == (IGNORE if is_image else token)


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_same_token_ends_an_answer_whatever_is_trained(merging, template):
    learned = [encoder(merging, template, train_on=train_on).stop_ids for train_on in ("assistant", "all")]
    assert learned[0] == learned[1]


@pytest.mark.parametrize(
    ("train_on", "shown"),
    [
        ("assistant", "<bos><image×3>What?\na star<eos>Where?\n⟦left<eos>⟧"),
        ("last_assistant", "<bos><image×3>What?\na star<eos>Where?\n⟦left<eos>⟧"),
        ("all", "⟦<bos>⟧<image×3>⟦What?\n⟧a star<eos>⟦Where?\nleft<eos>⟧"),
    ],
)
def test_an_answer_that_is_not_to_be_learned(bytes_only, train_on, shown):
    subject = encoder(bytes_only, "plain", train_on=train_on)
    assert subject.display(subject.encode(Sample("a/1", [], FIRST_NOT_LEARNED))) == shown


@pytest.mark.parametrize("train_on", ["assistant", "last_assistant", "all"])
def test_a_conversation_with_no_answer_to_learn_is_a_bad_sample(bytes_only, train_on):
    subject = encoder(bytes_only, "plain", train_on=train_on)
    kept = [TWO_TURNS[0], *({**turn, "supervised": False} for turn in TWO_TURNS[1:])]
    with pytest.raises(
        BadSample, match=r"^sample 'a/1' has no supervised token: its assistant messages have loss: false"
    ):
        subject.encode(Sample("a/1", [], kept))


def test_a_cut_that_leaves_no_answer_to_learn_is_a_bad_sample(bytes_only):
    subject = encoder(bytes_only, "plain", max_length=20, too_long="truncate_text")
    with pytest.raises(BadSample, match=r"no supervised token in its first 17 of 29 tokens; raise data\.max_length$"):
        subject.encode(Sample("a/1", [], FIRST_NOT_LEARNED))


def test_a_row_separator_is_never_supervised(bytes_only):
    subject = encoder(bytes_only, "plain", train_on="all", tile_rows=lambda size: [2, 1], row_separator="|")
    row = subject.encode(Sample("a/1", [Image.new("RGB", (8, 8))], TWO_TURNS[:2]))
    assert row.image_mask[1:11] == [True] * 6 + [False] + [True] * 3
    assert row.labels[1:11] == [IGNORE] * 10


def test_an_empty_last_answer_teaches_nothing_where_only_it_is_trained(bytes_only):
    messages = [*TWO_TURNS[:3], say("assistant", " ")]
    assert encoder(bytes_only, "plain").encode(Sample("a/1", [], messages))
    with pytest.raises(BadSample, match="has no supervised token"):
        encoder(bytes_only, "plain", train_on="last_assistant").encode(Sample("a/1", [], messages))


# --- system_prompt ---------------------------------------------------------------------------------------------------


def test_the_system_prompt_opens_what_has_no_system_message(bytes_only):
    subject = encoder(bytes_only, "phi", system_prompt="Be brief.")
    opening = "<|system|>Be brief.<|end|><|user|>"
    assert subject.encode(Sample("a/1", [], TWO_TURNS)).text.startswith(opening)
    assert subject.encode_prompt(Sample("a/1", [], TWO_TURNS[:1])).text.startswith(opening)
    own = subject.encode(Sample("a/1", [], [say("system", "Sing."), *TWO_TURNS]))
    assert own.text.startswith("<|system|>Sing.<|end|><|user|>")
    assert subject.supervised(own) == ["a star<|end|>", "left<|end|>"]


def test_a_template_that_takes_no_system_prompt_is_refused_at_the_start():
    tokenizer = templated(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.content }}<eos>{% endfor %}"
    )
    assert encoder(tokenizer, None)
    with pytest.raises(ValueError, match=r"refuses the conversation \(no system\); set llm.chat_template="):
        encoder(tokenizer, None, system_prompt="Be brief.")


# --- too_long --------------------------------------------------------------------------------------------------------

# <bos> and three of the image: 4; "What?\n" 10; "a star<eos>" 17; "Where?\n" 24; "left<eos>" 29.
WHOLE = "<bos><image×3>What?\n⟦a star<eos>⟧Where?\n⟦left<eos>⟧"
FIRST = "<bos><image×3>What?\n⟦a star<eos>⟧"


@pytest.mark.parametrize(
    ("max_length", "shown"),
    [(29, WHOLE), (28, FIRST), (17, FIRST), (16, FIRST.replace("<eos>", "")), (11, "<bos><image×3>What?\n⟦a⟧")],
)
@pytest.mark.parametrize("train_on", ["assistant", "last_assistant"])
def test_last_turns_go_first_then_the_end_of_the_answer(bytes_only, max_length, shown, train_on):
    subject = encoder(bytes_only, "plain", max_length=max_length, too_long="truncate_text", train_on=train_on)
    if train_on == "last_assistant" and max_length == 29:
        shown = shown.replace("⟦a star<eos>⟧", "a star<eos>")
    row = subject.encode(Sample("a/1", [], TWO_TURNS))
    assert subject.display(row) == shown
    assert row.num_cut == 29 - len(row.input_ids)


@pytest.mark.parametrize("num_image_tokens", [0, 3])
def test_an_image_keeps_the_turn_that_holds_it(bytes_only, num_image_tokens):
    messages = [*TWO_TURNS[:2], say("user", "And", None, "?"), say("assistant", "a red circle")]
    subject = encoder(bytes_only, "plain", num_image_tokens=num_image_tokens, max_length=4096)
    length = len(subject.encode(Sample("a/1", [], messages)).input_ids)
    subject.too_long, subject.max_length = "truncate_text", length - 6
    shown = subject.display(subject.encode(Sample("a/1", [], messages)))
    assert shown.endswith(f"⟦a star<eos>⟧And<image×{num_image_tokens}>?\n⟦a red c⟧")


@pytest.mark.parametrize(
    ("messages", "max_length", "error"),
    [
        (TWO_TURNS, 10, "takes 29 tokens but data.max_length is 10, which would cut 0 image tokens and 12 supervised"),
        (TWO_TURNS, 3, "takes 29 tokens but data.max_length is 3, which would cut 1 image token and 12 supervised"),
        # The only answer that would stay whole says nothing.
        ([say("user", None), say("assistant", ""), *TWO_TURNS[2:]], 8, "takes 18 tokens but data.max_length is 8"),
        # The image of the last turn cannot stay, so no turn can go.
        ([*TWO_TURNS[2:], *TWO_TURNS[:2]], 14, "takes 29 tokens but data.max_length is 14, which would cut 2 image"),
    ],
)
def test_what_no_cut_can_save_is_a_bad_sample(bytes_only, messages, max_length, error):
    subject = encoder(bytes_only, "plain", max_length=max_length, too_long="truncate_text")
    with pytest.raises(BadSample, match=error):
        subject.encode(Sample("a/1", [], messages))


def test_a_prompt_itself_is_never_cut(bytes_only):
    subject = encoder(bytes_only, "plain", max_length=8, too_long="truncate_text")
    with pytest.raises(BadSample, match=r"takes 10 tokens but data.max_length is 8"):
        subject.encode_prompt(Sample("a/1", [], TWO_TURNS[:1]))


@pytest.mark.parametrize(("max_length", "num_messages"), [(29, 4), (28, 2), (17, 2), (16, 2), (11, 2)])
def test_what_is_asked_is_the_last_answer_of_which_the_row_keeps_some(bytes_only, max_length, num_messages):
    subject = encoder(bytes_only, "plain", max_length=max_length, too_long="truncate_text")
    kept = subject.answered(Sample("a/1", [], TWO_TURNS))
    assert kept.messages == TWO_TURNS[:num_messages]
    row, prompt = subject.encode(Sample("a/1", [], TWO_TURNS)), subject.encode_prompt(kept)
    assert row.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert row.labels[len(prompt.input_ids)] != IGNORE


def test_what_is_asked_is_refused_as_the_row_is(bytes_only):
    subject = encoder(bytes_only, "plain", max_length=10, too_long="truncate_text")
    with pytest.raises(BadSample) as row:
        subject.encode(Sample("a/1", [], TWO_TURNS))
    with pytest.raises(BadSample) as asked:
        subject.answered(Sample("a/1", [], TWO_TURNS))
    assert str(asked.value).startswith("sample 'a/1' takes 29 tokens but data.max_length is 10")
    assert asked.value.kind == row.value.kind == "too_long"


class Held(Listed):
    """A split of conversations whose last prompts do not fit, and one that no cut can save."""

    def __init__(self, split: str) -> None:
        long = [say("user", "Q"), say("assistant", "short"), say("user", "w" * 90), say("assistant", "lost")]
        fits = [say("user", "Q"), say("assistant", "yes")]
        hopeless = [say("user", "w" * 90), say("assistant", "lost")]
        super().__init__(Sample(str(n), [], messages) for n, messages in enumerate([long, fits, hopeless, fits]))


@pytest.mark.parametrize(
    ("too_long", "references"), [("truncate_text", ["short", "yes", "yes"]), ("drop", ["yes", "yes"])]
)
def test_validation_asks_for_what_rows_hold_and_counts_the_rest(bytes_only, tmp_path, too_long, references):
    file = tmp_path / "bad.jsonl"
    data = VLMDataModule(source=Held, max_length=40, too_long=too_long, max_bad_ratio=0.9, bad_samples_file=file)
    data.connect(spec=SPEC, tokenizer=bytes_only, chat_template="plain")
    batches = list(data.prompts(range(4), 2))
    samples = [sample for batch in batches for sample in batch.samples]
    assert [sample.messages[-1]["content"][0]["text"] for sample in samples] == references
    assert all(batch.input_ids.shape[1] <= 40 for batch in batches)
    named = [json.loads(line) for line in file.read_text().splitlines()]
    assert [each["index"] for each in named] == [
        index for index in range(4) if str(index) not in {s.id for s in samples}
    ]
    assert {each["kind"] for each in named} == {"too_long"}


def test_a_template_that_writes_too_much_is_a_bad_sample():
    tokenizer = templated(
        "{% for m in messages %}{{ m.content }}{{ 'x' * 2000000 if messages | length > 4 }}<eos>{% endfor %}"
    )
    subject = encoder(tokenizer, None)
    with pytest.raises(
        BadSample, match=r"the chat template writes 12,000,0\d\d characters, more than the limit of 1,0"
    ):
        subject.encode(Sample("a/1", [], [say("user", "a"), say("assistant", "b")] * 3))


@pytest.mark.parametrize("template", ["plain", "qwen3"])
def test_a_thousand_turns_are_one_row(bytes_only, template):
    """Nothing that is kept of a conversation grows with its turns."""
    subject = encoder(bytes_only, template, max_length=10**7)
    row = subject.encode(Sample("a/1", [], [say("user", "a"), say("assistant", "b")] * 1000))
    assert row.labels.count(subject.stop_ids[-1]) == 1000
    assert sum(len(key) for key in subject._skeletons) < 100


@pytest.mark.parametrize("num_image_tokens", [0, 3])
@pytest.mark.parametrize("template", ["chatml", "llama2", "t5"])
def test_cut_rows_of_random_conversations(merging, template, num_image_tokens):
    whole = encoder(merging, template, num_image_tokens=num_image_tokens)
    short = encoder(merging, template, num_image_tokens=num_image_tokens, too_long="truncate_text")

    @few
    @given(conversations(), st.floats(0.1, 1))
    def check(messages, share):
        number = num_images(messages)
        row = whole.encode(Sample("random/0", [], messages))
        short.max_length = int(len(row.input_ids) * share)
        try:
            cut = short.encode(Sample("random/0", [], messages))
        except BadSample:
            return
        length = len(cut.input_ids)
        assert length <= short.max_length
        assert cut.input_ids == row.input_ids[:length]
        assert cut.labels == row.labels[:length]
        assert cut.images_before[-1] == number
        assert sum(cut.image_mask) == sum(row.image_mask)
        assert set(cut.labels) != {IGNORE}
        assert cut.labels[-1] != IGNORE or length == len(row.input_ids)

    check()
