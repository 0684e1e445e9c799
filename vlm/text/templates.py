"""Chat templates by name: how a conversation becomes one string, in the Jinja dialect of Transformers.

A message's content is a string or a list of `{"type": "text" | "image"}`; an image is rendered as `IMAGE_PLACEHOLDER`.
No template looks at what a content says (not even whether it is empty), so that `TextEncoder` can find every turn.

The templates of named LLMs write what the LLM's published template writes, byte for byte, for conversations without
tools; a comment says where ours differs on purpose. Where a published template has options, ours has fixed values, so
that a row is the same on every day and in every run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private: no tokenizer has it and no text may contain it. `TextEncoder` replaces it by visual tokens.
IMAGE_PLACEHOLDER = "<|vlm:image|>"

_CONTENT = (
    "{%- macro render(content) -%}"
    "{%- if content is string -%}{{- content -}}"
    "{%- else -%}{%- for item in content -%}"
    "{{- '" + IMAGE_PLACEHOLDER + "' if item['type'] == 'image' else item['text'] -}}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
)

# No roles, as in LLaVA's alignment stage: the question's line, then the answer. For captions and base models.
_PLAIN = (
    "{{- bos_token or '' -}}"
    "{%- for message in messages -%}"
    "{{- render(message['content']) -}}"
    "{{- eos_token if message['role'] == 'assistant' else '\\n' -}}"
    "{%- endfor -%}"
)

# Some tokenizers (SmolLM) name `<|im_start|>` itself as their bos token; it must not stand twice.
_CHATML = (
    "{{- bos_token if bos_token and bos_token != '<|im_start|>' else '' -}}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + render(message['content']) + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{{- '<|im_start|>assistant\\n' if add_generation_prompt else '' -}}"
)

# SmolLM2's own: no bos token, and a system text where the conversation has none.
_SMOLLM2 = (
    "{{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' "
    "if messages[0]['role'] != 'system' else '' -}}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + render(message['content']) + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{{- '<|im_start|>assistant\\n' if add_generation_prompt else '' -}}"
)

# Qwen3's own with `enable_thinking=False`: an empty thought is written before the last answer and before what is
# generated; answers that others follow have none. On purpose, a "</think>" in a text stays as it was written.
_QWEN3 = (
    "{%- for message in messages -%}"
    "{%- set answers = message['role'] == 'assistant' and loop.last -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + ('<think>\\n\\n</think>\\n\\n' if answers else '') -}}"
    "{{- render(message['content']).lstrip('\\n') if answers else render(message['content']) -}}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' if add_generation_prompt else '' -}}"
)

# Gemma has no system role: its text opens the first user turn. It trims what stands around each other text.
_GEMMA = (
    "{{- bos_token or '' -}}"
    "{%- set fold = messages[0]['role'] == 'system' -%}"
    "{%- for message in (messages[1:] if fold else messages) -%}"
    "{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}"
    "{{- render(messages[0]['content']) + '\\n\\n' if fold and loop.first else '' -}}"
    "{{- render(message['content']) | trim + '<end_of_turn>\\n' -}}"
    "{%- endfor -%}"
    "{{- '<start_of_turn>model\\n' if add_generation_prompt else '' -}}"
)

# Llama 3 trims what stands around each text.
_LLAMA3 = (
    "{{- bos_token or '' -}}"
    "{%- for message in messages -%}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}"
    "{{- render(message['content']) | trim + '<|eot_id|>' -}}"
    "{%- endfor -%}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' if add_generation_prompt else '' -}}"
)

# Llama 3.1 and 3.2 open with a system header that holds two dates, with the user's system text after them. On purpose,
# the second is the date that the published template falls back on; with today's, a run could not be repeated.
_LLAMA3_2 = (
    "{{- bos_token or '' -}}"
    "{%- set own = messages[0]['role'] == 'system' -%}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n' -}}"
    "{{- 'Today Date: 26 Jul 2024\\n\\n' + (render(messages[0]['content']) | trim if own else '') + '<|eot_id|>' -}}"
    "{%- for message in (messages[1:] if own else messages) -%}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}"
    "{{- render(message['content']) | trim + '<|eot_id|>' -}}"
    "{%- endfor -%}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' if add_generation_prompt else '' -}}"
)

# Roles as words on one line. A system text takes the place of the preamble that Vicuna learned with. The prompt ends at
# the colon, for SentencePiece makes one token of the space and the first word of the answer.
_VICUNA_V1 = (
    "{{- bos_token or '' -}}"
    "{%- set own = messages[0]['role'] == 'system' -%}"
    "{{- render(messages[0]['content']) if own else 'A chat between a curious user and an artificial intelligence "
    "assistant. The assistant gives helpful, detailed, and polite answers to the user\\'s questions.' -}}"
    "{{- ' ' -}}"
    "{%- for message in (messages[1:] if own else messages) -%}"
    "{{- 'ASSISTANT: ' if message['role'] == 'assistant' else 'USER: ' -}}"
    "{{- render(message['content']) + (eos_token if message['role'] == 'assistant' else ' ') -}}"
    "{%- endfor -%}"
    "{{- 'ASSISTANT:' if add_generation_prompt else '' -}}"
)

# Every pair of turns opens with a bos token. The marks are plain words, and so is one that a user types.
_LLAMA2 = (
    "{%- set fold = messages[0]['role'] == 'system' -%}"
    "{%- for message in (messages[1:] if fold else messages) -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- ' ' + render(message['content']) | trim + ' ' + eos_token -}}"
    "{%- else -%}"
    "{{- (bos_token or '') + '[INST] ' -}}"
    "{{- '<<SYS>>\\n' + render(messages[0]['content']) + '\\n<</SYS>>\\n\\n' if fold and loop.first else '' -}}"
    "{{- render(message['content']) | trim + ' [/INST]' -}}"
    "{%- endif -%}{%- endfor -%}"
)

# Mistral (v0.3) has no system role: its text opens the last user turn. It trims the answers. On purpose, the system
# text stays where an answer follows, as it stood in the prompt of that answer; the published template then drops it.
_MISTRAL = (
    "{{- bos_token or '' -}}"
    "{%- set fold = messages[0]['role'] == 'system' -%}"
    "{%- set turns = messages[1:] if fold else messages -%}"
    "{%- set last = turns | length - (1 if turns[-1]['role'] == 'user' else 2) -%}"
    "{%- for message in turns -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- ' ' + render(message['content']) | trim + eos_token -}}"
    "{%- else -%}"
    "{{- '[INST] ' + (render(messages[0]['content']) + '\\n\\n' if fold and loop.index0 == last else '') -}}"
    "{{- render(message['content']) + '[/INST]' -}}"
    "{%- endif -%}{%- endfor -%}"
)

# Phi-4-mini closes a conversation with the end of text; an answer is over at <|end|>.
_PHI = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + render(message['content']) + '<|end|>' -}}"
    "{%- endfor -%}"
    "{{- '<|assistant|>' if add_generation_prompt else eos_token -}}"
)

# An encoder-decoder LLM was trained with an end mark on the input of its encoder too.
_T5 = (
    "{%- for message in messages -%}"
    "{{- render(message['content']) + ('\\n' if message['role'] == 'system' else eos_token) -}}"
    "{%- endfor -%}"
)

_BODIES = {
    "plain": _PLAIN,
    "chatml": _CHATML,
    "smollm2": _SMOLLM2,
    "qwen3": _QWEN3,
    "gemma": _GEMMA,
    "llama2": _LLAMA2,
    "llama3": _LLAMA3,
    "llama3_2": _LLAMA3_2,
    "vicuna_v1": _VICUNA_V1,
    "mistral": _MISTRAL,
    "phi": _PHI,
    "t5": _T5,
}
TEMPLATES = {name: _CONTENT + body for name, body in _BODIES.items()}

# Templates whose published rows come from the tokenizer's own way with a plain text (as LLaVA and FastChat call it): it
# writes bos itself, and each part between images begins as a text does ("<s> ▁A", not "<s> A", with SentencePiece).
PLAIN_TEXTS = frozenset({"plain", "vicuna_v1"})

# What a tokenizer's own template is given beside the messages: Qwen3's and others then write no thought, and Llama
# 3.1's and 3.2's the date that they fall back on, not today's.
OWN_OPTIONS = {"enable_thinking": False, "date_string": "26 Jul 2024"}


def resolve(name: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja text of the template `name`, or of the tokenizer's own where that is None.

    Raises ValueError for an unknown name, and for a tokenizer without a template of its own.
    """
    choices = ", ".join(sorted(TEMPLATES))
    if name is None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer has no chat template of its own; set llm.chat_template= to one of {choices}"
            )
        return tokenizer.get_chat_template()
    if name not in TEMPLATES:
        raise ValueError(f"llm.chat_template={name} is unknown; choose one of {choices}")
    return TEMPLATES[name]
