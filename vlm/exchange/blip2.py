"""Runs as Transformers' Blip2ForConditionalGeneration (Li et al., arXiv 2301.12597)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2VisionConfig, Blip2VisionModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vlm.connectors.qformer import FEATURE_NORM_EPS, QFormer
from vlm.connectors.qformer_weights import to_blip2
from vlm.encoders.timm import TimmEncoder
from vlm.exchange.llava import extended, num_rows, without_adapter
from vlm.exchange.processor import fixed_processor
from vlm.llms.causal import CausalLM
from vlm.llms.seq2seq import Seq2SeqLM
from vlm.models.composed import Composed

NAME = "Blip2ForConditionalGeneration"
RUNS_CODE = False  # of its own
NEEDS_IMAGE = True  # in each prompt
VISION = (  # names in timm's vision transformers -> in Transformers' Blip2VisionModel, replaced in turn
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("blocks.", "encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.", ".self_attn."),
    (".self_attn.proj.", ".self_attn.projection."),
)
LAST_NORM = "post_layernorm."  # of the vision model; here it belongs to the Q-Former

processor = fixed_processor


def obstacles(model: Composed) -> Iterator[str]:
    """What of a model Blip2ForConditionalGeneration cannot hold: each option, and what to set."""
    if getattr(model.connector, "instructions", None) is not None:
        yield "connector.instruction=true must be false"
    yield from obstacles_of_parts(model)


def obstacles_of_parts(model: Composed) -> Iterator[str]:
    """What neither BLIP-2's nor InstructBLIP's class can hold."""
    connector, llm = model.connector, model.llm
    yield from _obstacles_of_encoder(model.encoder)
    if model.tiles.grids:
        yield f"encoder.tiles.grids={[list(grid) for grid in model.tiles.grids]} must be []"
    if type(connector) is not QFormer:
        yield "the connector must be qformer"
    else:
        if connector.position is not None:
            yield "connector.position=true must be false"
        if isinstance(connector.feature_norm, nn.Identity):
            yield "connector.norm=false must be true"
    config = llm.model.config
    decodes_only = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if type(llm) is not (CausalLM if decodes_only else Seq2SeqLM):
        yield f"the LLM must be {'decoder-only' if decodes_only else 'an encoder and a decoder'}, as it is there"
    elif llm.width != config.hidden_size:
        yield f"the embeddings have width {llm.width} and the LLM has {config.hidden_size}"


def _obstacles_of_encoder(encoder: Any) -> Iterator[str]:
    blocks = encoder.blocks() if type(encoder) is TimmEncoder else []
    if not blocks or not all(type(block) in (Block, EvaBlock) for block in blocks):
        yield "the encoder is not one of encoder=timm with the blocks of a vision transformer (as eva_g14_224 has)"
    elif encoder.num_kept_tokens != 1:
        yield "encoder.keep_tokens=false must be true, of an encoder with one class token"
    elif getattr(encoder.model, "rope", None) is not None:
        yield "the encoder has rotary position embeddings"
    elif not _is_plain(blocks[0]):
        yield f"the encoder has another activation than GELU, or norms with another eps than {FEATURE_NORM_EPS}"
    else:
        with torch.device("meta"):
            expected = Blip2VisionModel(Blip2VisionConfig(**vision_options(encoder))).state_dict()
        shapes = {name: tensor.shape for name, tensor in expected.items() if not name.startswith(LAST_NORM)}
        found = {name: tensor.shape for name, tensor in vision_state(encoder).items()}
        if different := sorted(name for name in {*shapes, *found} if shapes.get(name) != found.get(name)):
            yield f"the encoder has other weights than BLIP-2's, first {different[0]}"


def _is_plain(block: Any) -> bool:
    act = block.mlp.act
    return isinstance(act, nn.GELU) and act.approximate == "none" and block.norm1.eps == FEATURE_NORM_EPS


def vision_options(encoder: Any) -> dict[str, Any]:
    """The architecture of an encoder in the words of Transformers' Blip2VisionConfig."""
    block = encoder.model.blocks[0]
    return {
        "hidden_size": encoder.width,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(encoder.model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": encoder.image_size[0],
        "patch_size": encoder.image_size[0] // encoder.grid[0],
        "layer_norm_eps": FEATURE_NORM_EPS,
        "qkv_bias": any(name.endswith(("qkv.bias", "q_bias")) for name, _ in block.named_parameters()),
    }


def vision_state(encoder: Any) -> dict[str, Tensor]:
    """The weights of an encoder under the names of Blip2VisionModel, without its last norm."""
    state = dict(encoder.model.state_dict())
    for name in [name for name in state if name.endswith(".q_bias")]:  # EVA's keys have no bias
        query, value = state.pop(name), state.pop(name.replace("q_bias", "v_bias"))
        state[name.replace("q_bias", "qkv.bias")] = torch.cat([query, torch.zeros_like(query), value])
    return {renamed(name): tensor for name, tensor in state.items()}


def renamed(name: str, *, backwards: bool = False) -> str:
    """The name of a tensor of timm in Transformers, or backwards."""
    for pair in reversed(VISION) if backwards else VISION:
        name = name.replace(*(reversed(pair) if backwards else pair))
    return name


def language_name(name: str, base: str) -> str:
    """The name in the exported model of a tensor of the LLM."""
    return f"language_model.{name}"


def save(
    model: Composed, settings: Mapping[str, Any], folder: Path, *, image_id: int, stop_ids: list[int], dtype: Any
) -> list[int]:
    """Write config and weights, without the Q-Former's text path, which BLIP-2's class lacks.

    Returns the rows of the vocabulary that are no tokens. Their logits are 0: this class suppresses no tokens.
    """
    text_path = QFormer.can_be_dropped["text"]
    kept = {name: t for name, t in model.connector.state_dict().items() if not re.match(text_path, name)}
    exported = assemble(
        model,
        (Blip2Config, Blip2ForConditionalGeneration),
        connector=to_blip2(kept),
        qformer={},
        image_id=image_id,
        stop_ids=stop_ids,
    )
    exported.to(dtype).save_pretrained(folder)
    return [*range(num_rows(model.llm), exported.get_output_embeddings().weight.shape[0])]


def assemble(
    model: Composed,
    classes: tuple[Any, Any],
    *,
    connector: Mapping[str, Tensor],
    qformer: Mapping[str, Any],
    image_id: int,
    stop_ids: list[int],
) -> Any:
    """A model of these classes (config and model) with the tensors of the `connector`, and options of its `qformer`.

    It generates with the LLM's own generation config, which Transformers makes of the LLM's config: so that has the
    `stop_ids`.
    """
    text_config = deepcopy(model.llm.model.config)
    text_config.vocab_size = rows = num_rows(model.llm, image_id)
    text_config.eos_token_id = stop_ids
    config = classes[0](
        vision_config=vision_options(model.encoder),
        qformer_config={**qformer_options(model.connector), **qformer},
        text_config=text_config,
        num_query_tokens=model.connector.num_tokens,
        image_token_index=image_id,
    )
    with torch.device("meta"):
        exported = classes[1](config)
    state = {f"vision_model.{name}": tensor for name, tensor in vision_state(model.encoder).items()}
    state |= connector
    state |= {f"language_model.{name}": tensor for name, tensor in without_adapter(model.llm.model).items()}
    exported.load_state_dict(extended(state, exported, rows), assign=True)
    exported.tie_weights()
    return exported.eval()


def qformer_options(connector: Any) -> dict[str, Any]:
    """The architecture of a Q-Former in the words of Transformers' Blip2QFormerConfig."""
    blocks, width = connector.blocks, connector.queries.shape[1]
    crossing = [number for number, block in enumerate(blocks) if block.cross is not None]
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attention.num_heads,
        "cross_attention_frequency": crossing[1] if len(crossing) > 1 else len(blocks),
    }
