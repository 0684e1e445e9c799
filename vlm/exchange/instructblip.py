"""Runs as Transformers' InstructBlipForConditionalGeneration (Dai et al., arXiv 2305.06500)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import processors
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration, InstructBlipProcessor

from vlm.connectors.qformer_weights import TEXT_VOCABULARY, to_blip2
from vlm.exchange import blip2
from vlm.exchange.llava import num_rows
from vlm.exchange.processor import IMAGE_TOKEN, export_image_processor
from vlm.models.composed import Composed

NAME = "InstructBlipForConditionalGeneration"
RUNS_CODE = False  # of its own
NEEDS_IMAGE = True
TEMPLATE = "instructblip"

language_name = blip2.language_name


def obstacles(model: Composed) -> Iterator[str]:
    """What of a model InstructBlipForConditionalGeneration cannot hold: each option, and what to set."""
    if model.chat_template != TEMPLATE:
        yield f"llm.chat_template={model.chat_template} must be {TEMPLATE}: the whole prompt enters its Q-Former"
    yield from blip2.obstacles_of_parts(model)


def save(
    model: Composed, settings: Mapping[str, Any], folder: Path, *, image_id: int, stop_ids: list[int], dtype: Any
) -> list[int]:
    """Write config and weights. Returns the rows of the vocabulary that are no tokens, as `vlm.exchange.blip2.save`."""
    exported = blip2.assemble(
        model,
        (InstructBlipConfig, InstructBlipForConditionalGeneration),
        connector={from_blip2(name): tensor for name, tensor in to_blip2(model.connector.state_dict()).items()},
        qformer={"vocab_size": TEXT_VOCABULARY},
        image_id=image_id,
        stop_ids=stop_ids,
    )
    exported.to(dtype).save_pretrained(folder)
    return [*range(num_rows(model.llm), exported.get_output_embeddings().weight.shape[0])]


def from_blip2(name: str) -> str:
    """The name of a tensor of the Q-Former, which there has the embeddings of its text."""
    if name.startswith("qformer.layernorm."):
        return name.replace("qformer.", "qformer.embeddings.", 1)
    return f"qformer.{name}" if name.startswith("embeddings.") else name


def to_blip2_name(name: str) -> str:
    """Its name in BLIP-2."""
    if name.startswith("qformer.embeddings.layernorm."):
        return name.replace("embeddings.", "", 1)
    return name.removeprefix("qformer.") if name.startswith("qformer.embeddings.") else name


def processor(model: Composed, *, tokenizer: Any, template: str) -> InstructBlipProcessor:
    """InstructBLIP's processor. It writes image tokens and the bos token itself, and knows no chat template.

    So the tokenizer has the template, which writes the rest: `processor.tokenizer.apply_chat_template`.
    """
    tokenizer.chat_template = "{%- set bos_token = none -%}" + template.replace(IMAGE_TOKEN, "")
    if bos := tokenizer.bos_token:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    return InstructBlipProcessor(
        image_processor=export_image_processor(model.encoder.transform),
        tokenizer=tokenizer,
        qformer_tokenizer=model.connector.instructions.tokenizer,
        num_query_tokens=model.connector.num_tokens,
    )
