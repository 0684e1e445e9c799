"""Runs as Transformers' LlavaForConditionalGeneration (Liu et al., arXiv 2310.03744)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from vlm.connectors.linear import Linear
from vlm.connectors.mlp import ACTIVATIONS, MLP
from vlm.encoders.hf import HFEncoder
from vlm.exchange.processor import export_image_processor
from vlm.llms.base import LanguageModel
from vlm.llms.causal import CausalLM
from vlm.models.composed import Composed

NAME = "LlavaForConditionalGeneration"
RUNS_CODE = False  # of its own
NEEDS_IMAGE = False
ROWS = 64  # a vocabulary that has to grow gets a multiple of so many rows


def obstacles(model: Composed) -> Iterator[str]:
    """What of a model LlavaForConditionalGeneration cannot hold: each option, and what to set."""
    encoder, connector, llm = model.encoder, model.connector, model.llm
    if type(encoder) is not HFEncoder:
        yield "the encoder is not one of encoder=hf (as clip_vit_l14_336 is)"
    elif encoder.num_dropped > 1:
        yield f"the encoder has {encoder.num_dropped} tokens before the patches, and LLaVA drops 0 or 1"
    if model.tiles.grids:
        yield f"encoder.tiles.grids={[list(grid) for grid in model.tiles.grids]} must be []"
    if type(connector) not in (MLP, Linear):
        yield "the connector must be mlp or linear"
    else:
        if not isinstance(connector.norm, nn.Identity):
            yield "connector.norm=true must be false"
        if connector.position is not None and bool(connector.position.any()):
            yield "connector.position=true must be false"
        if (depth := len(connector.layers)) > 2:
            yield f"connector.depth={depth} must be at most 2"
        elif (width := connector.layers[0].out_features) != llm.width:
            yield f"connector.hidden_width={width} must be the LLM's width, {llm.width}"
    if type(llm) is not CausalLM:
        yield "the LLM must be decoder-only"
    else:
        config, head = llm.model.config, llm.model.get_output_embeddings()
        known: Any = MODEL_MAPPING.get(type(config), None)
        if type(base_model(llm)) is not known:
            yield f"Transformers has no base model of a {config.model_type}"
        if getattr(head, "bias", None) is not None:
            yield f"the output layer of a {config.model_type} has a bias"
        if llm.width != config.hidden_size:
            yield f"the embeddings have width {llm.width} and the LLM has {config.hidden_size}"
        if getattr(config, "final_logit_softcapping", None):
            yield f"a {config.model_type} caps its logits"


def base_model(llm: CausalLM) -> Any:
    """The LLM without its output layer."""
    return getattr(llm.model, llm.model.base_model_prefix)


def save(
    model: Composed, settings: Mapping[str, Any], folder: Path, *, image_id: int, stop_ids: list[int], dtype: Any
) -> list[int]:
    """Write config and weights. Returns the rows of the vocabulary that are no tokens, which are never answers."""
    exported: Any = convert(model, image_id=image_id)
    exported.to(dtype).save_pretrained(folder)
    return [*range(num_rows(model.llm), exported.get_output_embeddings().weight.shape[0])]


def convert(model: Composed, *, image_id: int) -> LlavaForConditionalGeneration:
    """The same weights in LLaVA's class. A vocabulary without a row for `image_id` gets rows of zeros at its end."""
    tower, llm = model.encoder.published_tower(), model.llm
    text_config = deepcopy(llm.model.config)
    text_config.vocab_size = rows = num_rows(llm, image_id)
    layers, activation = model.connector.layers, model.connector.activation
    act = (
        next(name for name, function in ACTIVATIONS.items() if function is activation) if len(layers) > 1 else "linear"
    )
    config = LlavaConfig(
        vision_config=tower.model.config,
        text_config=text_config,
        image_token_index=image_id,
        image_seq_length=model.connector.num_tokens,
        projector_hidden_act=act,
        vision_feature_layer=tower.layers[0] if len(tower.layers) == 1 else tower.layers,
        vision_feature_select_strategy="default" if tower.num_dropped else "full",
    )
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(config)
    base = llm.model.base_model_prefix
    state = {f"model.vision_tower.{name}": tensor for name, tensor in tower.model.state_dict().items()}
    state |= {f"model.multi_modal_projector.{name}": tensor for name, tensor in _projector(layers).items()}
    state |= {language_name(name, base): tensor for name, tensor in without_adapter(llm.model).items()}
    llava.load_state_dict(extended(state, llava, rows), assign=True)
    llava.tie_weights()
    return llava.eval()


def num_rows(llm: LanguageModel, image_id: int = -1) -> int:
    """Rows of the vocabulary; where it has none for `image_id`, more of them."""
    rows = llm.model.get_input_embeddings().num_embeddings
    return rows if image_id < rows else -(-(image_id + 1) // ROWS) * ROWS


def extended(state: Mapping[str, Tensor], exported: Any, rows: int) -> dict[str, Tensor]:
    """The tensors of a model, those of its vocabulary with zeros at their end."""
    found = dict(state)
    for name, module in exported.named_modules():
        of_words = isinstance(module, nn.Embedding) and module.num_embeddings == rows
        if of_words or module is exported.get_output_embeddings():
            found[f"{name}.weight"] = F.pad(state[f"{name}.weight"], (0, 0, 0, rows - len(state[f"{name}.weight"])))
    return found


def language_name(name: str, base: str) -> str:
    """The name in LlavaForConditionalGeneration of a tensor of the LLM, whose base model is called `base`."""
    return f"model.language_model.{name.removeprefix(f'{base}.')}" if name.startswith(f"{base}.") else name


def without_adapter(llm: Any) -> dict[str, Tensor]:
    """The tensors of an LLM of Transformers without those of its LoRA adapter."""
    return {
        name.replace(".base_layer.", "."): tensor for name, tensor in llm.state_dict().items() if ".lora_" not in name
    }


def _projector(layers: Any) -> dict[str, Tensor]:
    """LLaVA's two layers; the second of a single one is the identity."""
    first, *rest = layers
    width = first.out_features
    last = rest[0].state_dict() if rest else {"weight": torch.eye(width), "bias": torch.zeros(width)}
    return {
        f"linear_{number}.{name}": tensor
        for number, state in ((1, first.state_dict()), (2, last))
        for name, tensor in state.items()
    }


def processor(model: Composed, *, tokenizer: Any, template: str) -> LlavaProcessor:
    """LLaVA's processor, with as many image tokens as the encoder has patches."""
    (rows, cols), (height, width) = model.encoder.grid, model.encoder.image_size
    patch = height // rows
    assert (height // patch, width // patch) == (rows, cols)
    return LlavaProcessor(
        image_processor=export_image_processor(model.encoder.transform),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default" if model.encoder.num_dropped else "full",
        num_additional_image_tokens=model.encoder.num_dropped,
        chat_template=template,
    )
