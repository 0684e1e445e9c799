"""A prompt's ids and the ids to learn are the row's ids: for every template and kind of tokenizer, nothing stripped."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from transformers import PreTrainedTokenizerFast

from tests.helpers.conversations import conversations, few
from tests.helpers.text import (
    MORE_SPECIAL,
    SPECIAL,
    byte_tokenizer,
    encoder,
    merging_tokenizer,
    own_template,
    say,
    sentencepiece_folder,
    sentencepiece_tokenizer,
)
from vlm.llms.loading import load_tokenizer
from vlm.schema import IGNORE, Message, Sample
from vlm.text.encode import TextEncoder
from vlm.text.templates import ENDS, TEMPLATES

PREAMBLE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# The last turn, or the place of the system text, is written otherwise where more turns follow.
LAST_TURN_DIFFERS = {"qwen3", "mistral"}
KINDS = ["bytes", "merging", "metaspace", "legacy", "sentencepiece", "gemma"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentencepiece_folder(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def tokenizers(published: Path, gemma_tokenizer: PreTrainedTokenizerFast) -> dict[str, PreTrainedTokenizerFast]:
    trained = load_tokenizer(str(published), package=None, trust=False)
    trained.add_special_tokens({"additional_special_tokens": SPECIAL[3:] + MORE_SPECIAL})
    return {
        "bytes": byte_tokenizer(),
        "merging": merging_tokenizer(),
        "metaspace": sentencepiece_tokenizer(),
        "legacy": sentencepiece_tokenizer(legacy=True),
        "sentencepiece": trained,
        "gemma": gemma_tokenizer,
    }


def check(subject: TextEncoder, messages: list[Message], *, last_only: bool) -> None:
    row = subject.encode(Sample("random/0", [], messages))
    ends = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    learned = [label != IGNORE for label in row.labels]
    stop = len(learned)
    for end in reversed(ends):
        prompt = subject.encode_prompt(Sample("random/0", [], messages[:end]))
        start = len(prompt.input_ids)
        assert row.input_ids[:start] == prompt.input_ids
        assert row.image_mask[:start] == prompt.image_mask
        if subject._end_text:  # which an answer may hold too
            closed = max(index for index in range(start, stop) if learned[index])
            assert row.input_ids[closed] == subject._end_of_turn
        else:
            closed = start + row.input_ids[start:stop].index(subject._end_of_turn)
        answer = slice(start, closed + 1)
        assert [label for label in row.labels[answer] if label != IGNORE] == [
            token for token, visual in zip(row.input_ids[answer], row.image_mask[answer], strict=True) if not visual
        ]
        assert not any(learned[closed + 1 : stop])
        stop = start
        if last_only:
            return
    assert not any(learned[:stop])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    "kind", [kind if kind == "sentencepiece" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_prompt_and_learned_ids_are_the_row(kind, template, tokenizers):
    if kind == "gemma" and template not in (
        "plain",
        "gemma",
        "llama2",
        "mistral",
        "vicuna_v1",
        "instructblip",
        "t5",
        *ENDS,
    ):
        with pytest.raises(ValueError, match="which is not a special token of this tokenizer"):
            encoder(tokenizers[kind], template)
        return
    subject = encoder(tokenizers[kind], template)

    @settings(few, max_examples=8)
    @given(conversations())
    @example([say("user", "How many?"), say("assistant", "2"), say("user", "And?"), say("assistant", "日本")])
    @example([say("user", "Which?"), say("assistant", "🙂"), say("user", "Y? "), say("assistant", " 3 ")])
    @example([say("user", "x"), say("assistant", ""), say("user", "x\n"), say("assistant", "\n\n  yes")])
    @example([say("user", "x "), say("assistant", "  "), say("user", " "), say("assistant", "    return x\n")])
    @example([say("user", None), say("assistant", ")"), say("user", None, "x"), say("assistant", None, "-5")])
    def each(messages):
        # An image in an answer is not asked for again: the prompt would lack it.
        kept = [
            message if message["role"] != "assistant" else say("assistant", text_only(message)) for message in messages
        ]
        check(subject, kept, last_only=template in LAST_TURN_DIFFERS)

    each()


def text_only(message: Message) -> str:
    return "".join(item.get("text", "") for item in message["content"])


@pytest.mark.parametrize("answer", ["2", "3.14", "日本", "🙂", "Yes", " Yes", "  ", "\n2", ""])
def test_the_first_token_of_an_answer_is_learned_with_sentencepiece(answer, tokenizers):
    tokenizer = tokenizers["sentencepiece"]
    messages = [say("user", "Q"), say("assistant", answer), say("user", "Q"), say("assistant", "a")]
    row = encoder(tokenizer, "vicuna_v1").encode(Sample("a/1", [], messages))
    spaced = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(f"\n {answer}"))[2:]  # "▁" "2", or "▁Yes"
    learned = [token for token in row.labels if token != IGNORE]
    assert learned[: len(spaced) + 1] == [*spaced, tokenizer.eos_token_id]
    if answer == "2":
        assert tokenizer.convert_ids_to_tokens(learned[:3]) == ["▁", "2", "</s>"]


def pieces(model, text: str, *, first: bool = True) -> list[int]:
    """SentencePiece's own ids; without the space that opens a text where it does not open the row."""
    ids = model.encode(text if first else f"\n{text}")
    return ids if first else ids[2:]  # "▁" and the newline's byte


def test_vicuna_rows_have_the_ids_of_the_published_ones(published, tokenizers):
    """As LLaVA makes them: bos, each part between images as a text of its own, eos as a token."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(published / "tokenizer.model"))
    subject = encoder(tokenizers["sentencepiece"], "vicuna_v1", num_image_tokens=2)
    messages = [
        *(say("user", None, " and ", None, "\nWhere is it?"), say("assistant", "2 squares")),
        *(say("user", "赤い?"), say("assistant", "青い")),
    ]
    row = subject.encode(Sample("a/1", [], messages))
    bos, eos = model.bos_id(), model.eos_id()
    before, between = model.encode(f"{PREAMBLE} USER: "), model.encode(" and ")
    after = model.encode("\nWhere is it? ASSISTANT: 2 squares")
    rest = pieces(model, "USER: 赤い? ASSISTANT: 青い", first=False)
    assert [token for token, visual in zip(row.input_ids, row.image_mask, strict=True) if not visual] == (
        [bos, *before, *between, *after, eos, *rest, eos]
    )
    assert model.id_to_piece(row.input_ids[:2]) == ["<s>", model.id_to_piece(model.encode("A chat")[0])]
    assert model.id_to_piece(row.input_ids[1]).startswith("▁")


# --- a tokenizer's own template --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", ["Answer: ", "Answer:", "\\n", " \\n\\n", "a"])
def test_own_template_whose_generation_prompt_ends_in_a_space(kind, before, tokenizers):
    """ "Answer: " and "Yes" are ":" "▁Yes" in a row: the prompt is cut before the space, and the space is learned."""
    tokenizer = tokenizers[kind]
    eos = tokenizer.eos_token
    template = tokenizer.chat_template
    try:
        subject = encoder(own_template(tokenizer, before, eos), None)
    finally:
        tokenizer.chat_template = template
    for answer in ("Yes", "2", " 2", "\nx", "日本", ")"):
        messages = [say("user", "q"), say("assistant", answer), say("user", "r"), say("assistant", answer)]
        check(subject, messages, last_only=False)
        if kind != "legacy":
            lead = " " if before.endswith(" ") else ""
            assert subject.supervised(subject.encode(Sample("a/1", [], messages))) == [lead + answer + eos] * 2
