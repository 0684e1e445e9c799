"""The default template of each named LLM writes what the LLM's published one writes, byte for byte.

`published.json` holds what published Jinja texts wrote, rendered once by Transformers' own `apply_chat_template` (5.23)
with the special tokens of that LLM, thinking off and Llama 3.2's fallback date. The texts are not in this repository:
they belong to their authors. Those of Llama 3.2 and Mistral are not from the official `tokenizer_config.json`, which is
gated, but from public copies: rendered again without their tools, llama.cpp's
`models/templates/meta-llama-Llama-3.2-3B-Instruct.jinja` (commit 7b5e080) and a template of Mistral 7B v0.3 that a user
had published gave every row of the file. Nobody has compared these copies with the originals.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.helpers.text import encoder, say, templated
from vlm.cli.labels import PAGE, page
from vlm.launch.entry import CONF
from vlm.schema import Sample
from vlm.text import jinja
from vlm.text.templates import TEMPLATES

PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
CONVERSATIONS = PUBLISHED["conversations"]
# What each named LLM was published with; vicuna's is FastChat's code, and base models have none.
FAMILY = {
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama3",
    "meta-llama/Llama-3.2-1B-Instruct": "llama3_2",
    "meta-llama/Llama-3.2-3B-Instruct": "llama3_2",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2",
    "HuggingFaceTB/SmolLM2-360M-Instruct": "smollm2",
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": "smollm2",
    "Qwen/Qwen3-0.6B": "qwen3",
    "Qwen/Qwen3-4B": "qwen3",
    "Qwen/Qwen3-8B": "qwen3",
    "google/gemma-3-1b-it": "gemma",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistral",
    "microsoft/Phi-4-mini-instruct": "phi",
    "lmsys/vicuna-7b-v1.5": "vicuna_v1",
    "lmsys/vicuna-13b-v1.5": "vicuna_v1",
    "google/gemma-3-270m": "plain",
    "EleutherAI/pythia-1.4b": "plain",
    "facebook/opt-2.7b": "plain",
    "facebook/opt-6.7b": "plain",
    "google/flan-t5-xl": "t5",
}


def test_each_named_llm_has_its_published_template_by_default():
    options = [yaml.safe_load(path.read_text("utf-8")) for path in Path(CONF, "llm").glob("[!_]*.yaml")]
    named = {option["pretrained"]: option["chat_template"] for option in options}
    del named[None], named["???"]
    assert named == FAMILY


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
@pytest.mark.parametrize("template", PUBLISHED["templates"])
def test_published_rendering(template, number):
    messages, published = CONVERSATIONS[number], PUBLISHED["templates"][template]
    words, expected = published["special_tokens"], published["rendered"][number]
    forms = [messages, [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]]
    for chat in forms:
        row = jinja.render(TEMPLATES[template], chat, add_generation_prompt=False, **words)
        prompt = jinja.render(TEMPLATES[template], chat[:-1], add_generation_prompt=True, **words)
        assert prompt == expected["prompt"]
        if template == "mistral" and messages[0]["role"] == "system":  # on purpose, as its options say
            assert row == prompt + " " + messages[-1]["content"].strip() + words["eos_token"]
            assert messages[0]["content"] not in expected["row"]
        else:
            assert row == expected["row"]


def test_fastchat_rows_of_vicuna():
    """FastChat's `vicuna_v1.1`: roles and texts with " " and "</s>" in turn after them."""
    words = {"bos_token": "<s>", "eos_token": "</s>"}
    row = jinja.render(TEMPLATES["vicuna_v1"], CONVERSATIONS[1][1:], add_generation_prompt=False, **words)
    assert row == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: What is it? ASSISTANT: A star.</s>"
        "USER: How many? ASSISTANT: 2</s>"
    )


def test_a_tokenizers_own_template_writes_no_thought_and_the_fallback_date():
    tokenizer = templated(
        "{{ date_string }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' and loop.last }}{{ m.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{{ '<think>\n\n</think>\n\n' if enable_thinking is defined and enable_thinking is false }}{% endif %}"
    )
    subject = encoder(tokenizer, None)
    row = subject.encode(Sample("a/1", [], [say("user", "a"), say("assistant", "b")]))
    opening = "26 Jul 2024<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert row.text == f"{opening}b<|im_end|>\n"
    assert subject.supervised(row) == ["b<|im_end|>"]


def test_the_page_of_labels_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "docs/labels.md is behind the code; run `make options`"
