"""Transformers' BLIP-2 (arXiv 2301.12597) and InstructBLIP (arXiv 2305.06500) as the tensors of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlm.connectors.qformer_weights import our_name
from vlm.exchange.blip2 import LAST_NORM, renamed
from vlm.exchange.from_llava import MAX_LENGTH, image_options
from vlm.exchange.instructblip import to_blip2_name
from vlm.exchange.run_folder import Imported

CONNECTOR = ("query_tokens", "qformer.", "language_projection.", f"vision_model.{LAST_NORM}")
LLMS = {False: "vlm.llms.causal.CausalLM", True: "vlm.llms.seq2seq.Seq2SeqLM"}


def read_folder(folder: Path, run: Path, *, chat_template: str | None) -> Imported:
    """A folder of `Blip2ForConditionalGeneration` or `InstructBlipForConditionalGeneration`.

    Its vision encoder, as timm names its weights, its LLM and the tokenizer of its Q-Former are written into `run`.
    `chat_template` is a name in `vlm.text.templates`, or None for the template of the folder.
    """
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    processor: Any = AutoProcessor.from_pretrained(folder)
    config, tokenizer = model.eval().config, processor.tokenizer
    model.language_model.save_pretrained(run / "llm")
    if chat_template is None and processor.chat_template:
        tokenizer.chat_template = processor.chat_template
    tokenizer.save_pretrained(run / "llm")
    tensors = {f"connector.{name}": tensor for name, tensor in _connector(model.state_dict()).items()}
    options = {
        "data.max_length": min(MAX_LENGTH, getattr(config.text_config, "max_position_embeddings", MAX_LENGTH)),
        **_encoder(model.vision_model, run / "encoder"),
        **image_options(processor.image_processor),
        **{"llm": "hf", "llm.pretrained": str(run / "llm"), "llm.chat_template": chat_template},
        "llm._target_": LLMS[bool(config.text_config.is_encoder_decoder)],
        **qformer_options(tensors, num_heads=config.qformer_config.num_attention_heads),
    }
    asked = {}
    if config.model_type == "instructblip":
        processor.qformer_tokenizer.save_pretrained(run / "tokenizer")
        options |= {"connector.instruction": True, "connector.tokenizer": str(run / "tokenizer")}
        asked = {
            "qformer_input_ids": processor.qformer_tokenizer("What is in the picture?", return_tensors="pt").input_ids
        }

    def logits(pixel_values: Tensor, ids: Tensor, image_mask: Tensor, logits_mask: Tensor) -> Tensor:
        placed = ids.masked_fill(image_mask, config.image_token_id)[None]  # 1 T
        inputs = {"pixel_values": pixel_values, **asked}
        if not config.text_config.is_encoder_decoder:
            return model(input_ids=placed, **inputs).logits[0, logits_mask]
        first = int(logits_mask.nonzero()[0]) + 1
        start = torch.tensor([[config.text_config.decoder_start_token_id]])
        answer = torch.cat([start, placed[:, first:]], dim=1)
        return model(input_ids=placed[:, :first], decoder_input_ids=answer, **inputs).logits[0]

    return Imported(options, tensors, logits, instruction=asked.get("qformer_input_ids"))


def _encoder(vision: Any, folder: Path) -> dict[str, Any]:
    """Write the weights of the vision encoder for timm; returns the options of `encoder`."""
    state = {renamed(name, backwards=True): tensor for name, tensor in vision.state_dict().items()}
    folder.mkdir()
    save_file(
        {n: tensor.contiguous() for n, tensor in state.items() if not n.startswith(LAST_NORM)},
        folder / "model.safetensors",
    )
    config = vision.config
    return {
        "encoder": "timm",
        "encoder.name": "vit_base_patch16_224",
        "encoder.pretrained": str(folder),
        "encoder.image_size": config.image_size,
        "encoder.keep_tokens": True,
        "++encoder.model_args": {
            "patch_size": config.patch_size,
            "embed_dim": config.hidden_size,
            "depth": config.num_hidden_layers,
            "num_heads": config.num_attention_heads,
            "mlp_ratio": (config.intermediate_size + 0.5) / config.hidden_size,  # timm rounds their product down
            "qkv_bias": config.qkv_bias,
        },
    }


def _connector(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the Q-Former, its features' norm and its projection, under our names."""
    tensors = {}
    for name, tensor in state.items():
        if name.startswith(CONNECTOR):
            ours = our_name(to_blip2_name(name))
            assert ours is not None, name
            tensors[ours] = tensor[0] if name == "query_tokens" else tensor
    return tensors


def qformer_options(tensors: Mapping[str, Tensor], *, num_heads: int) -> dict[str, Any]:
    """The options of a connector with these tensors."""
    blocks = sorted({int(found[1]) for name in tensors if (found := re.match(r"connector\.blocks\.(\d+)\.", name))})
    crossing = [block for block in blocks if f"connector.blocks.{block}.cross.query.weight" in tensors]
    num_queries, width = tensors["connector.queries"].shape
    return {
        "connector": "qformer",
        "connector.position": False,
        "connector.norm": "connector.feature_norm.weight" in tensors,
        "connector.text": "connector.words.weight" in tensors,
        "connector.num_queries": num_queries,
        "connector.width": width,
        "connector.num_heads": num_heads,
        "connector.depth": len(blocks),
        "connector.cross_attention_every": crossing[1] - crossing[0] if len(crossing) > 1 else len(blocks),
    }
