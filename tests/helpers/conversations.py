"""Random conversations for hypothesis, with texts that look like a template's own marks."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.helpers.text import SPECIAL, say
from vlm.schema import Message
from vlm.text.templates import IMAGE_PLACEHOLDER

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)

# Gemma's tokenizer writes "▁" for a space, so a "▁" in a text does not come back as itself.
_LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="▁")
_WORDS = [
    "A red circle",
    "赤い丸",
    "です。",
    "👩‍👩‍👧",
    "é",
    "e\u0301",
    "<image>",
    "{{ messages }}",
    "[INST]",
    "⟦",
    "user\n",
]
_SPACES = ["\u200d", "\u3000", " ", "  ", "\n", "\n\n", "\t", "\r\n"]
_MARKS = [
    *SPECIAL,
    "</s>",
    "<|im_end|",
    "<start_of_turn>model\n",
    "<|image|>",
    IMAGE_PLACEHOLDER[:-1],
    "vlm-turn-0-vlm",
]
_SNIPPETS = st.sampled_from([*_WORDS, *_SPACES, *_MARKS])
_TEXTS = st.lists(_SNIPPETS | st.text(_LETTERS, max_size=6), max_size=4).map("".join)


@st.composite
def conversations(draw) -> list[Message]:
    messages = [say("system", draw(_TEXTS))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(say("user", *draw(st.lists(st.none() | _TEXTS, max_size=3))))
        messages.append(say("assistant", draw(_TEXTS)))
    messages[-1]["content"].append({"type": "text", "text": "ok"})  # one answer at least is not blank
    return messages


def num_images(messages: list[Message]) -> int:
    return sum(item["type"] == "image" for message in messages for item in message["content"])
