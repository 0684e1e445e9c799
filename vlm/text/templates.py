"""Chat templates by name: how a conversation becomes one string, in the Jinja dialect of Transformers.

A message's content is a string or a list of `{"type": "text" | "image"}`; an image is rendered as `IMAGE_PLACEHOLDER`.
No template looks at what a content says (not even whether it is empty), so that `TextEncoder` can find every turn.
"""

from __future__ import annotations

# Private: no tokenizer has it and no text may hold it. `TextEncoder` puts the visual tokens in its place.
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

# Gemma has no system role: its text opens the first user turn. It trims what stands around each text.
_GEMMA = (
    "{{- bos_token or '' -}}"
    "{%- set fold = messages[0]['role'] == 'system' -%}"
    "{%- for message in (messages[1:] if fold else messages) -%}"
    "{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}"
    "{{- render(messages[0]['content']) | trim + '\\n\\n' if fold and loop.first else '' -}}"
    "{{- render(message['content']) | trim + '<end_of_turn>\\n' -}}"
    "{%- endfor -%}"
    "{{- '<start_of_turn>model\\n' if add_generation_prompt else '' -}}"
)

TEMPLATES = {name: _CONTENT + body for name, body in (("plain", _PLAIN), ("chatml", _CHATML), ("gemma", _GEMMA))}
