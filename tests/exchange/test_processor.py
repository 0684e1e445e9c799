"""The exported tokenizer and chat template give a prompt the tokens that the run gave it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from transformers import CLIPImageProcessor, LlavaProcessor

from tests.helpers.text import say
from vlm.exchange.processor import export_template, export_tokenizer
from vlm.schema import Sample
from vlm.text.encode import TextEncoder
from vlm.text.templates import TEMPLATES

NUM_TOKENS = 3
CHATS: dict[str, list[Any]] = {
    "an image": [say("user", None, "What is it?")],
    "text alone": [say("user", "Hello")],
    "system": [say("system", "Be brief."), say("user", "Is ", None, "\nlike ", None, "? ")],
    "turns": [say("user", None, "\nWhat?"), say("assistant", "A red bus."), say("user", " And 日本?")],
}


def exported(tokenizer: Any, template: str | None, chat: list[Any], system_prompt: str | None) -> tuple[list, list]:
    """The ids of the run, with the image token at visual tokens, and those of Transformers."""
    text = TextEncoder(
        tokenizer=tokenizer,
        num_image_tokens=NUM_TOKENS,
        max_length=1000,
        chat_template=template,
        system_prompt=system_prompt,
    )
    sample = Sample(id="x", images=[], messages=chat)
    row = text.encode_prompt(sample)
    copy = export_tokenizer(tokenizer, num_positions=None)
    image_id = copy.convert_tokens_to_ids("<image>")
    expected = [image_id if image else token for token, image in zip(row.input_ids, row.image_mask, strict=True)]
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(),
        tokenizer=copy,
        patch_size=1000,
        num_additional_image_tokens=NUM_TOKENS,
        vision_feature_select_strategy="full",
        chat_template=export_template(text, own=template is None),
    )
    rendered = processor.apply_chat_template(chat, add_generation_prompt=True)
    rendered = rendered.replace("<image>", "<image>" * NUM_TOKENS)
    return expected, copy(rendered)["input_ids"]


# A token may join the end of a prompt and an earlier answer, which training keeps apart (docs/use.md).
APART = ("merging", "turns")
KINDS = ("bytes_only", "merging", "sentencepiece")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(("kind", "chat"), [(k, chat) for k in KINDS for chat in CHATS if (k, chat) != APART])
def test_the_tokens_of_a_prompt(kind: str, template: str, chat: str, request: pytest.FixtureRequest) -> None:
    expected, found = exported(request.getfixturevalue(kind), template, CHATS[chat], None)
    assert found == expected


def test_a_system_prompt_of_the_run(bytes_only: Any) -> None:
    for prompt in ('Say "it".\n', "日本 {{ x }}"):
        expected, found = exported(bytes_only, "chatml", CHATS["an image"], prompt)
        assert found == expected
        own, theirs = exported(bytes_only, "chatml", CHATS["system"], prompt)
        assert own == theirs
        assert len(own) > len(expected) - len(prompt)


@pytest.mark.parametrize(
    "content", ["{{ m['content'] }}", "{% for item in m['content'] %}{{ item['text'] }}{% endfor %}"]
)
def test_the_template_of_a_tokenizer(merging: Any, content: str) -> None:
    """One for strings and one for lists of content, with a variable as Qwen3's has."""
    thought = "{% if not enable_thinking %}{{ '-' }}{% endif %}"
    turn = (
        f"<|im_start|>{{{{ m['role'] }}}}{{% if m['role'] == 'assistant' %}}{thought}{{% endif %}}{content}<|im_end|>"
    )
    opening = f"{{% if add_generation_prompt %}}<|im_start|>assistant{thought}{{% endif %}}"
    tokenizer = deepcopy(merging)
    tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}{opening}"
    for name in ("an image", "text alone", "system"):
        expected, found = exported(tokenizer, None, CHATS[name], None)
        assert found == expected
