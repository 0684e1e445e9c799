"""Chat templates by name, in the Jinja dialect of Transformers. They render a conversation as one string.

The content of a message is a string or a list of `{"type": "text" | "image"}`; an image is rendered as
`IMAGE_PLACEHOLDER`. What a template writes does not depend on the content, not even on whether it is empty: otherwise
`TextEncoder` could not locate the turns.

The template of a named LLM writes the same bytes as the published template, for conversations without tools. A comment
says where ours differs deliberately. Where a published template has options, such as today's date, ours has fixed
values, so rows are the same in every run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A private token: no tokenizer has it, and no text may contain it. `TextEncoder` replaces it by visual tokens.
IMAGE_PLACEHOLDER = "<|vlm:image|>"

_CONTENT = (
    "{%- macro render(content) -%}"
    "{%- if content is string -%}{{- content -}}"
    "{%- else -%}{%- for item in content -%}"
    "{{- '" + IMAGE_PLACEHOLDER + "' if item['type'] == 'image' else item['text'] -}}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
)

# For captions and base models: the question, a newline, the answer, and no roles.
_PLAIN = (
    "{{- bos_token or '' -}}"
    "{%- for message in messages -%}"
    "{{- render(message['content']) -}}"
    "{{- eos_token if message['role'] == 'assistant' else '\\n' -}}"
    "{%- endfor -%}"
)

# A caption that ends with a newline, as LLaVA's first stage, BLIP-2 and MiniGPT-4 train; the prompt may be empty.
_CAPTION = (
    "{{- bos_token or '' -}}"
    "{%- for message in messages -%}"
    "{{- render(message['content']) + ('\\n' if message['role'] == 'assistant' else '') -}}"
    "{%- endfor -%}"
)

# BLIP-2's second stage with a decoder-only LLM: the image before the bos token, and a caption that ends with a newline.
_BLIP2 = (
    "{%- for message in messages -%}"
    "{{- render(message['content']) + ('\\n' if message['role'] == 'assistant' else bos_token or '') -}}"
    "{%- endfor -%}"
)

# Flamingo: texts end with a token that the LLM learns (`llm.added_tokens`), and nothing else is written between images
# and texts. OpenFlamingo writes an eos token after the last one, without a loss.
_FLAMINGO = (
    "{{- bos_token or '' -}}"
    "{%- for message in messages -%}"
    "{{- render(message['content']) + ('<|endofchunk|>' if message['role'] == 'assistant' else '') -}}"
    "{%- endfor -%}"
)

# InstructBLIP: the question and the answer after it, without roles; see IMAGES_FIRST.
_INSTRUCTBLIP = (
    "{{- bos_token or '' -}}"
    "{%- for message in messages -%}"
    "{{- render(message['content']) + (eos_token if message['role'] == 'assistant' else ' ') -}}"
    "{%- endfor -%}"
)

# MiniGPT-4's second stage. It writes <Img> and </Img> around an image, which here belong to the prompt.
_MINIGPT4 = (
    "{{- bos_token or '' -}}"
    "{%- set own = messages[0]['role'] == 'system' -%}"
    "{{- (render(messages[0]['content']) if own else '') + '###' -}}"
    "{%- for message in (messages[1:] if own else messages) -%}"
    "{{- 'Assistant: ' if message['role'] == 'assistant' else 'Human: ' -}}"
    "{{- render(message['content']) + ('###' if message['role'] == 'assistant' else ' ###') -}}"
    "{%- endfor -%}"
    "{{- 'Assistant: ' if add_generation_prompt else '' -}}"
)

# Some tokenizers (SmolLM) have `<|im_start|>` as their bos token, which must not be written twice.
_CHATML = (
    "{{- bos_token if bos_token and bos_token != '<|im_start|>' else '' -}}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + render(message['content']) + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{{- '<|im_start|>assistant\\n' if add_generation_prompt else '' -}}"
)

# SmolLM2: no bos token, and a default system text.
_SMOLLM2 = (
    "{{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' "
    "if messages[0]['role'] != 'system' else '' -}}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + render(message['content']) + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{{- '<|im_start|>assistant\\n' if add_generation_prompt else '' -}}"
)

# Qwen3 with `enable_thinking=False`: an empty thought comes before the last answer and before a generated one. Earlier
# answers have none. Deliberate difference: a "</think>" in a text is kept.
_QWEN3 = (
    "{%- for message in messages -%}"
    "{%- set answers = message['role'] == 'assistant' and loop.last -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + ('<think>\\n\\n</think>\\n\\n' if answers else '') -}}"
    "{{- render(message['content']).lstrip('\\n') if answers else render(message['content']) -}}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' if add_generation_prompt else '' -}}"
)

# Gemma has no system role: the system text comes first in the first user turn. All other texts are stripped.
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

# Llama 3 strips each text.
_LLAMA3 = (
    "{{- bos_token or '' -}}"
    "{%- for message in messages -%}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}"
    "{{- render(message['content']) | trim + '<|eot_id|>' -}}"
    "{%- endfor -%}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' if add_generation_prompt else '' -}}"
)

# Llama 3.1 and 3.2 begin with a system header of two dates and the conversation's system text. Deliberate difference:
# the second date is the default of the published template, not today's, because runs must be repeatable.
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

# Vicuna: roles as words, all on one line. A system text replaces Vicuna's default one. The prompt ends at the colon,
# because SentencePiece has one token for the space and the first word of the answer.
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

# Llama 2: every pair of turns begins with a bos token. [INST] and <<SYS>> are plain text, even if a user writes them.
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

# Mistral (v0.3) has no system role: the system text comes first in the last user turn. Answers are stripped. Deliberate
# difference: the system text is kept if an answer follows, as in the prompt for it; the published template drops it.
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

# Phi-4-mini ends an answer with <|end|>, and a conversation with the eos token.
_PHI = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + render(message['content']) + '<|end|>' -}}"
    "{%- endfor -%}"
    "{{- '<|assistant|>' if add_generation_prompt else eos_token -}}"
)

# T5 was trained with an eos token at the end of the encoder's input too.
_T5 = (
    "{%- for message in messages -%}"
    "{{- render(message['content']) + ('\\n' if message['role'] == 'system' else eos_token) -}}"
    "{%- endfor -%}"
)

_BODIES = {
    "plain": _PLAIN,
    "blip2": _BLIP2,
    "caption": _CAPTION,
    "flamingo": _FLAMINGO,
    "instructblip": _INSTRUCTBLIP,
    "chatml": _CHATML,
    "smollm2": _SMOLLM2,
    "qwen3": _QWEN3,
    "gemma": _GEMMA,
    "llama2": _LLAMA2,
    "llama3": _LLAMA3,
    "llama3_2": _LLAMA3_2,
    "vicuna_v1": _VICUNA_V1,
    "minigpt4": _MINIGPT4,
    "mistral": _MISTRAL,
    "phi": _PHI,
    "t5": _T5,
}
TEMPLATES = {name: _CONTENT + body for name, body in _BODIES.items()}

# Templates whose published training code tokenizes each text between images separately, as LLaVA and FastChat do. The
# tokenizer adds bos, and with SentencePiece each such text begins with a space ("<s> ▁A", not "<s> A").
PLAIN_TEXTS = frozenset({"plain", "caption", "vicuna_v1", "minigpt4"})

# Templates whose published code puts the images that begin a conversation before its bos token.
IMAGES_FIRST = frozenset({"instructblip"})

# The ends of turns that are plain text. The others are special tokens.
ENDS = {"blip2": "\n", "caption": "\n", "minigpt4": "###"}

# Variables for a tokenizer's own template: Qwen3's and others then write no thought, and those of Llama 3.1 and 3.2
# write their default date, not today's.
OWN_OPTIONS = {"enable_thinking": False, "date_string": "26 Jul 2024"}


def resolve(name: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja text of the template `name`; None is the tokenizer's own template.

    Raises ValueError for an unknown name, or if `name` is None and the tokenizer has no template.
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
