"""Labels follow the characters of the rendered conversation, for every template and kind of tokenizer."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.helpers.conversations import conversations, few, num_images
from tests.helpers.text import (
    ONE_TURN,
    border_tokenizer,
    byte_tokenizer,
    encoder,
    own_template,
    say,
    special_ids,
    templated,
    text_of,
)
from vlm.schema import IGNORE, Message, Sample
from vlm.text.encode import TextEncoder
from vlm.text.templates import IMAGE_PLACEHOLDER, TEMPLATES

END_MARK = {
    "plain": "<eos>",
    "blip2": "\n",
    "caption": "\n",
    "instructblip": "<eos>",
    "chatml": "<|im_end|>",
    "smollm2": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "llama2": " <eos>",
    "llama3": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
    "vicuna_v1": "<eos>",
    "minigpt4": "###",
    "mistral": "<eos>",
    "phi": "<|end|>",
    "t5": "<eos>",
    "flamingo": "<|endofchunk|>",
}
TRIMS = {"gemma", "llama2", "llama3", "llama3_2", "mistral"}  # what stands around an answer
SPACE_FIRST = {
    "instructblip",
    "llama2",
    "vicuna_v1",
    "minigpt4",
    "mistral",
}  # between prompt and answer; it is learned


# --- exact rows, by hand ---------------------------------------------------------------------------------------------


# Bytes of the printable letters count from "!" at 7; "\n" is the 11th byte without a printable form: 7 + 188 + 10.
USER, ASSISTANT, MODEL = [91, 89, 75, 88], [71, 89, 89, 79, 89, 90, 71, 84, 90], [83, 85, 74, 75, 82]


@pytest.mark.parametrize(
    ("template", "text", "ids", "num_supervised", "num_unsupervised_after"),
    [
        ("plain", "<bos>@Hi\n{no<eos>}", [1, 0, 0, 0, 46, 79, 205, 84, 85, 2], 3, 0),
        (
            "chatml",
            "<bos><|im_start|>user\n@Hi<|im_end|>\n<|im_start|>assistant\n{no<|im_end|>}\n",
            [1, 3, *USER, 205, 0, 0, 0, 46, 79, 4, 205, 3, *ASSISTANT, 205, 84, 85, 4, 205],
            3,
            1,
        ),
        (
            "gemma",
            "<bos><start_of_turn>user\n@Hi<end_of_turn>\n<start_of_turn>model\n{no<end_of_turn>}\n",
            [1, 5, *USER, 205, 0, 0, 0, 46, 79, 6, 205, 5, *MODEL, 205, 84, 85, 6, 205],
            3,
            1,
        ),
    ],
)
def test_exact_row(bytes_only, template, text, ids, num_supervised, num_unsupervised_after):
    row = encoder(bytes_only, template).encode(Sample("shapes/0", [], ONE_TURN))
    assert row.text == text.replace("{", "").replace("}", "").replace("@", IMAGE_PLACEHOLDER)
    assert row.input_ids == ids
    end = len(ids) - num_unsupervised_after
    assert (
        row.labels
        == [IGNORE] * (end - num_supervised) + ids[end - num_supervised : end] + [IGNORE] * num_unsupervised_after
    )
    first = ids.index(0)
    assert row.image_mask == [False] * first + [True] * 3 + [False] * (len(ids) - first - 3)
    assert row.images_before == [0] * first + [1] * (len(ids) - first)


PREAMBLE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.mark.parametrize(
    ("template", "system", "text"),
    [
        ("llama3", "Be brief.", "<bos>{system}Be brief.<|eot_id|>{user}@Hi<|eot_id|>{assistant}⟦no<|eot_id|>⟧"),
        ("llama2", "Be brief.", "<bos>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n@Hi [/INST]⟦ no <eos>⟧"),
        ("vicuna_v1", "Be brief.", "<bos>Be brief. USER: @Hi ASSISTANT:⟦ no<eos>⟧"),
        ("vicuna_v1", None, f"<bos>{PREAMBLE} USER: @Hi ASSISTANT:⟦ no<eos>⟧"),
        ("mistral", "Be brief.", "<bos>[INST] Be brief.\n\n@Hi[/INST]⟦ no<eos>⟧"),
        ("phi", "Be brief.", "<|system|>Be brief.<|end|><|user|>@Hi<|end|><|assistant|>⟦no<|end|>⟧<eos>"),
        ("t5", "Be brief.", "Be brief.\n@Hi<eos>⟦no<eos>⟧"),
    ],
)
def test_what_a_family_writes_and_what_is_learned(bytes_only, template, system, text):
    subject = encoder(bytes_only, template, num_image_tokens=1)
    row = subject.encode(Sample("a/1", [], [*([say("system", system)] if system else []), *ONE_TURN]))
    for role in ("system", "user", "assistant"):
        text = text.replace(f"{{{role}}}", f"<|start_header_id|>{role}<|end_header_id|>\n\n")
    assert subject.display(row) == text.replace("@", "<image×1>")


def test_gemma_folds_the_system_text_and_trims_the_rest(bytes_only):
    messages = [say("system", " Be brief. "), say("user", "Hi\n"), say("assistant", "\n no ")]
    row = encoder(bytes_only, "gemma").encode(Sample("a/1", [], messages))
    assert row.text == (
        "<bos><start_of_turn>user\n Be brief. \n\nHi<end_of_turn>\n<start_of_turn>model\nno<end_of_turn>\n"
    )


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_take_strings_and_lists(bytes_only, template):
    messages = [say("system", "Look."), say("user", "a", None, "b", None), say("assistant", "c")]
    texts = [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": f"a{IMAGE_PLACEHOLDER}b{IMAGE_PLACEHOLDER}"},
    ]
    texts.append({"role": "assistant", "content": "c"})
    rendered = [
        bytes_only.apply_chat_template(chat, chat_template=TEMPLATES[template], tokenize=False)
        for chat in (messages, texts)
    ]
    assert rendered[0] == rendered[1] == encoder(bytes_only, template).encode(Sample("a/1", [], messages)).text


# --- random conversations --------------------------------------------------------------------------------------------


def texts_of(message: Message) -> list[str | None]:
    """The texts of a message as `say` takes them."""
    return [item.get("text") for item in message["content"]]


def check_labels(subject: TextEncoder, template: str, messages: list[Message]) -> None:
    number = num_images(messages)
    row = subject.encode(Sample("random/0", [], messages))

    # What is learned is every answer with its mark, and nothing else.
    learned = subject.supervised(row)
    answers = [text_of(message) for message in messages if message["role"] == "assistant"]
    assert len(learned) == len(answers)
    if template == "qwen3":
        answers[-1] = answers[-1].lstrip("\n")
    space = " " if template in SPACE_FIRST else ""
    for got, answer in zip(learned, answers, strict=True):
        assert got == space + (answer.strip() if template in TRIMS else answer) + END_MARK[template]

    # Each image has its tokens, in order; no label is on them, and labels are the tokens themselves.
    assert sum(row.image_mask) == number * subject.num_image_tokens
    assert row.images_before == sorted(row.images_before)
    assert row.images_before[-1] == number
    for token, label, is_image in zip(row.input_ids, row.labels, row.image_mask, strict=True):
        assert label in (IGNORE, token)
        assert not is_image or (token == subject.pad_id and label == IGNORE)
    visual = [place for place, is_image in zip(row.images_before, row.image_mask, strict=True) if is_image]
    assert visual == [j + 1 for j in range(number) for _ in range(subject.num_image_tokens)]

    # Special tokens are the template's, whatever the texts spell.
    same_turns = subject.encode(Sample("random/0", [], [say(message["role"], "ok") for message in messages]))
    assert special_ids(subject, row) == special_ids(subject, same_turns)

    # The text that generation starts from is the text that training saw before the last answer.
    prompt = subject.encode_prompt(Sample("random/0", [], messages))
    assert row.text.startswith(prompt.text)
    after = {"chatml": "\n", "smollm2": "\n", "qwen3": "\n", "gemma": "\n", "phi": "<eos>"}.get(template, "")
    assert row.text[len(prompt.text) :] == learned[-1] + after
    assert set(prompt.labels) == {IGNORE}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    "kind", ["bytes_only", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("merging", "sentencepiece"))]
)
def test_labels_of_random_conversations(kind, template, request):
    tokenizer = request.getfixturevalue(kind)
    subjects = [encoder(tokenizer, template, num_image_tokens=number) for number in (0, 3)]

    @few
    @given(st.sampled_from(subjects), conversations())
    @example(subjects[1], [say("user", "Hi"), say("assistant", "\n\nok")])
    @example(subjects[0], [say("user", "Hi"), say("assistant", ""), say("user", ""), say("assistant", " ok ")])
    def check(subject, messages):
        # These write nothing between an empty question and its neighbors.
        if template in ("caption", "flamingo", "instructblip"):
            messages = [say("user", *texts_of(m), "?") if m["role"] == "user" else m for m in messages]
        check_labels(subject, template, messages)

    check()


@pytest.mark.slow
def test_labels_with_the_gemma_tokenizer(gemma_tokenizer):
    size = len(gemma_tokenizer)
    for template in ("gemma", "plain"):
        subject = encoder(gemma_tokenizer, template)

        @few
        @given(conversations(), st.just(subject), st.just(template))
        def check(messages, subject, template):
            check_labels(subject, template, messages)

        check()
    assert len(gemma_tokenizer) == size
    with pytest.raises(ValueError, match=r"followed by '<\|im_end\|>"):
        encoder(gemma_tokenizer, "chatml")


def test_gemma_row_with_the_gemma_tokenizer(gemma_tokenizer):
    subject = encoder(gemma_tokenizer, "gemma")
    row = subject.encode(Sample("a/1", [], [say("user", None, "What?"), say("assistant", "日本 🫥")]))
    assert row.input_ids[:7] == [2, 105, 2364, 107, 0, 0, 0]  # <bos> <start_of_turn> user \n, then the image
    assert row.labels[-2:] == [106, IGNORE]  # <end_of_turn> is learned, the newline after it is not
    assert subject.supervised(row) == ["日本 🫥<end_of_turn>"]
    # The tokenizer itself is as it was, and splits the same text alike.
    assert gemma_tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER) == gemma_tokenizer.unk_token_id
    assert (
        row.input_ids[:4] + row.input_ids[7:]
        == gemma_tokenizer(row.text.replace(IMAGE_PLACEHOLDER, ""), add_special_tokens=False).input_ids
    )


# --- tokens on the border --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "answer", "supervised"),
    [
        (": ", "yes", [" yes<eos>"]),  # the prompt's space belongs to the answer's first word
        ("\\n", "\nyes", ["\nyes<eos>"]),  # two newlines are two tokens there, as they are when generated
        (":", ")yes", [")yes<eos>"]),  # and so is what else would be one token with the prompt's end
        (":", "🫥", ["🫥<eos>"]),  # four byte tokens share one character
    ],
)
def test_token_that_joins_prompt_and_answer(before, answer, supervised):
    subject = encoder(own_template(border_tokenizer(), before, "<eos>"), None)
    row = subject.encode(Sample("a/1", [], [say("user", "s"), say("assistant", answer)]))
    assert subject.supervised(row) == supervised


def test_space_before_the_end_mark_is_learned():
    subject = encoder(own_template(border_tokenizer(), ":", " <eos>"), None)
    row = subject.encode(Sample("a/1", [], [say("user", "s"), say("assistant", "yes")]))
    assert subject.supervised(row) == ["yes <eos>"]


def test_spaces_keep_their_places_where_the_tokenizer_trims_offsets(bytes_only):
    subject = encoder(own_template(byte_tokenizer(), "Answer: ", "<eos>"), None)
    row = subject.encode(Sample("a/1", [], [say("user", "s"), say("assistant", " yes ")]))
    assert subject.supervised(row) == ["  yes <eos>"]


# --- images, runs, prompts -------------------------------------------------------------------------------------------


def test_images_before_and_display(bytes_only):
    messages = [say("user", "a", None, None), say("assistant", "b"), say("user", None, "c"), say("assistant", "d")]
    subject = encoder(bytes_only, "plain", num_image_tokens=2)
    row = subject.encode(Sample("a/1", [], messages))
    assert row.images_before == [0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    assert subject.display(row) == "<bos>a<image×2><image×2>\n⟦b<eos>⟧<image×2>c\n⟦d<eos>⟧"
    layers = encoder(bytes_only, "plain", num_image_tokens=0)
    row = layers.encode(Sample("a/1", [], messages))
    assert row.images_before == [0, 0, 2, 2, 2, 3, 3, 3, 3]
    assert row.image_mask == [False] * 9
    assert layers.display(row) == "<bos>a<image×0><image×0>\n⟦b<eos>⟧<image×0>c\n⟦d<eos>⟧"


@pytest.mark.parametrize("template", TEMPLATES)
def test_images_stand_where_their_placeholders_stood(merging, template):
    messages = [say("system", "s", None), say("user", "wo", None, "rd ", None, None), say("assistant", "y", None, "es")]
    for number in (0, 2):
        subject = encoder(merging, template, num_image_tokens=number)
        shown = subject.display(subject.encode(Sample("a/1", [], messages)))
        image = f"<image×{number}>"
        for part in (f"s{image}", f"wo{image}rd {image}{image}", f"{image}⟦es"):
            assert part in shown
        assert shown.count(image) == 5


def test_prompt(bytes_only):
    subject = encoder(bytes_only, "chatml")
    prompt = subject.encode_prompt(Sample("a/1", [], ONE_TURN))
    expected = f"<bos><|im_start|>user\n{IMAGE_PLACEHOLDER}Hi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.text == expected
    assert prompt == subject.encode_prompt(Sample("a/1", [], ONE_TURN[:1]))
    row = subject.encode(Sample("a/1", [], ONE_TURN))
    assert row.input_ids[: len(prompt.input_ids)] == prompt.input_ids


def test_bos_is_not_doubled_and_pad_falls_back_to_eos(bytes_only):
    assert encoder(bytes_only, "plain").encode(Sample("a/1", [], ONE_TURN)).input_ids.count(1) == 1
    smol = byte_tokenizer()
    smol.bos_token = "<|im_start|>"
    smol.pad_token = None
    row = encoder(smol, "chatml").encode(Sample("a/1", [], ONE_TURN))
    assert row.text.startswith("<|im_start|>user\n")
    assert [token for token, is_image in zip(row.input_ids, row.image_mask, strict=True) if is_image] == [2, 2, 2]


def test_the_tokenizer_is_left_alone(bytes_only):
    before = bytes_only.backend_tokenizer.to_str()
    encoder(bytes_only, "gemma").encode(Sample("a/1", [], ONE_TURN))
    assert bytes_only.backend_tokenizer.to_str() == before


def test_a_template_for_lists_only(bytes_only):
    tokenizer = templated(
        "{% for m in messages %}{% for item in m.content %}{{ item['text'] }}{% endfor %}<eos>{% endfor %}"
    )
    assert encoder(tokenizer, None).encode(Sample("a/1", [], ONE_TURN)).text == f"{IMAGE_PLACEHOLDER}Hi<eos>no<eos>"
