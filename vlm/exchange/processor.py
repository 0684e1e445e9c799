"""The files beside exported weights: tokenizer, chat template, image processor and generation config."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

from PIL import Image
from tokenizers import AddedToken, Tokenizer, processors
from transformers import (
    CLIPImageProcessor,
    GenerationConfig,
    LlavaImageProcessor,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from vlm.encoders.transform import Transform
from vlm.llms.base import LanguageModel
from vlm.models.composed import Composed
from vlm.text.encode import TextEncoder
from vlm.text.templates import IMAGE_PLACEHOLDER, OWN_OPTIONS

IMAGE_TOKEN = "<image>"
MAX_NEW_TOKENS = 256  # as vlm.inference answers

# Before the chat template of the run: a system prompt, and contents of text and images as one string each.
_MESSAGES = (
    "{%- set vlm = namespace(messages=[]) -%}"
    "{%- if SYSTEM is not none and messages[0]['role'] != 'system' -%}"
    "{%- set vlm.messages = [{'role': 'system', 'content': CONTENT_OF_SYSTEM}] -%}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- set turn = namespace(text='') -%}"
    "{%- if message['content'] is string -%}{%- set turn.text = message['content'] -%}"
    "{%- else -%}{%- for item in message['content'] -%}"
    "{%- set turn.text = turn.text + (item['text'] if item['type'] == 'text' else 'IMAGE') -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set vlm.messages = vlm.messages + [{'role': message['role'], 'content': CONTENT_OF_TURN}] -%}"
    "{%- endfor -%}"
    "{%- set messages = vlm.messages -%}"
)

# After it: the generation prompt without its last spaces, the bos token after the first images, and a space before each
# text between images.
_CUT = "{{- rendered[:-SPACES] if add_generation_prompt else rendered -}}"
_IMAGES_FIRST = (
    "{%- if bos_token and rendered.startswith(bos_token) -%}"
    "{%- set start = namespace(text=bos_token) -%}"
    "{%- for text in rendered[bos_token | length:].split('IMAGE') -%}"
    "{{- '' if loop.first else 'IMAGE' -}}"
    "{%- if text or loop.last -%}{{- start.text + text -}}{%- set start.text = '' -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- else -%}{{- rendered -}}{%- endif -%}"
)
_SEPARATED = (
    "{%- if bos_token and rendered.startswith(bos_token) -%}"
    "{{- bos_token -}}{%- set rendered = rendered[bos_token | length:] -%}"
    "{%- endif -%}"
    "{%- for text in rendered.split('IMAGE') -%}"
    "{{- ('' if loop.first else 'IMAGE') + (' ' if text else '') + text -}}"
    "{%- endfor -%}"
)


def export_tokenizer(tokenizer: PreTrainedTokenizerBase, *, num_positions: int | None) -> PreTrainedTokenizerFast:
    """A copy that knows the image token and adds no special tokens: as in training, the chat template writes them."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = processors.Sequence([])
    named: dict[str, Any] = {
        name: getattr(tokenizer, name)
        for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        if getattr(tokenizer, name) is not None
    }
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    copy = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"pad_token": tokenizer.eos_token, **named},
        additional_special_tokens=[token for token in special if token not in named.values()],
        padding_side="left",
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        **({} if num_positions is None else {"model_max_length": num_positions}),
    )
    copy.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    return copy


def export_template(text: TextEncoder, *, own: bool) -> str:
    """The chat template of a run for messages whose content is a string, or a list of texts and images in their order.

    `own` is whether it is the tokenizer's own, which has variables of its own.
    """
    content = "{}" if text.takes_strings else "[{{'type': 'text', 'text': {}}}]"
    system = text.system_prompt
    words = {
        "CONTENT_OF_SYSTEM": content.format(_literal(system)),
        "CONTENT_OF_TURN": content.format("turn.text"),
        "SYSTEM": _literal(system),
        "IMAGE": IMAGE_TOKEN,
    }
    before = _MESSAGES
    for word, replacement in words.items():
        before = before.replace(word, replacement)
    if own:
        before += "".join(f"{{%- set {name} = {_literal(value)} -%}}" for name, value in OWN_OPTIONS.items())
    whole = before + text.template.replace(IMAGE_PLACEHOLDER, IMAGE_TOKEN)
    if spaces := text.num_cut_spaces:
        whole = f"{{%- set rendered -%}}{whole}{{%- endset -%}}{_CUT.replace('SPACES', str(spaces))}"
    if text.puts_images_first:
        whole = f"{{%- set rendered -%}}{whole}{{%- endset -%}}{_IMAGES_FIRST.replace('IMAGE', IMAGE_TOKEN)}"
    if text.separates_texts:
        whole = f"{{%- set rendered -%}}{whole}{{%- endset -%}}{_SEPARATED.replace('IMAGE', IMAGE_TOKEN)}"
    return whole


def _literal(value: Any) -> str:
    """A value as Jinja writes it."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def export_image_processor(transform: Transform) -> Any:
    """An image processor of Transformers that does what `transform` does.

    LLaVA's pads before it resizes, so with `pad` pixels differ where image and padding meet.
    """
    height, width = transform.size
    options: dict[str, Any] = {
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
        "resample": Image.Resampling[transform.interpolation.upper()],
        "crop_size": {"height": height, "width": width},
    }
    if transform.resize == "squash":
        return CLIPImageProcessor(size={"height": height, "width": width}, do_center_crop=False, **options)
    options["size"] = {"shortest_edge": min(height, width)}
    return LlavaImageProcessor(do_pad=True, **options) if transform.resize == "pad" else CLIPImageProcessor(**options)


def fixed_processor(model: Composed, *, tokenizer: Any, template: str) -> LlavaProcessor:
    """LLaVA's processor; a patch that is larger than the image leaves a fixed number of image tokens."""
    return LlavaProcessor(
        image_processor=export_image_processor(model.encoder.transform),
        tokenizer=tokenizer,
        patch_size=max(model.encoder.image_size) + 1,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=model.connector.num_tokens,
        chat_template=template,
    )


def export_generation(llm: LanguageModel, *, stop_ids: list[int], pad_id: int, unused_ids: list[int]) -> Any:
    """The generation config; `unused_ids` are rows of the vocabulary that are no tokens."""
    config = deepcopy(llm.model.generation_config) if llm.generation == "checkpoint" else GenerationConfig()
    start = getattr(llm.model.config, "decoder_start_token_id", None)
    options = {
        "eos_token_id": stop_ids,
        "pad_token_id": pad_id,
        "max_new_tokens": MAX_NEW_TOKENS,
        "decoder_start_token_id": start,
        "suppress_tokens": unused_ids or None,
    }
    config.update(**{key: value for key, value in options.items() if value is not None})
    return config
