"""LLaVA's weights as the tensors of a run: Transformers' folder, and mm_projector.bin of the authors' code.

Liu et al., arXiv 2310.03744.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoProcessor, LlavaForConditionalGeneration

from vlm.connectors.mlp import ACTIVATIONS
from vlm.exchange.run_folder import Imported

MAX_LENGTH = 1024  # tokens of a row, the default of conf/data
PLAIN = {"connector.norm": False, "connector.position": False}


def read_folder(folder: Path, run: Path, *, chat_template: str | None) -> Imported:
    """A folder of `LlavaForConditionalGeneration`; its vision encoder and its LLM are written into `run`.

    `chat_template` is a name in `vlm.text.templates`, or None for the template of the folder.
    """
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    processor: Any = AutoProcessor.from_pretrained(folder)
    config = model.eval().config
    model.model.vision_tower.save_pretrained(run / "encoder")
    language_model(model).save_pretrained(run / "llm")
    tokenizer = processor.tokenizer
    if chat_template is None:
        tokenizer.chat_template = processor.chat_template
    tokenizer.save_pretrained(run / "llm")
    connector, tensors = _connector(config, model.model.multi_modal_projector.state_dict())
    positions = getattr(config.text_config, "max_position_embeddings", MAX_LENGTH)
    options = {
        "data.max_length": min(MAX_LENGTH, positions),
        **{"encoder": "hf", "encoder.pretrained": str(run / "encoder"), "encoder.layer": config.vision_feature_layer},
        **{"llm": "hf", "llm.pretrained": str(run / "llm"), "llm.chat_template": chat_template},
        **connector,
        **image_options(processor.image_processor),
    }

    def logits(pixel_values: Tensor, ids: Tensor, image_mask: Tensor, logits_mask: Tensor) -> Tensor:
        placed = ids.masked_fill(image_mask, config.image_token_id)[None]
        return model(input_ids=placed, pixel_values=pixel_values).logits[0, logits_mask]

    return Imported(options, tensors, logits)


def language_model(model: Any) -> Any:
    """The LLM of a LlavaForConditionalGeneration with its output layer, as Transformers builds it alone."""
    with torch.device("meta"):
        alone = AutoModelForCausalLM.from_config(model.config.text_config, dtype=torch.float32)
    setattr(alone, alone.base_model_prefix, model.model.language_model)
    alone.set_output_embeddings(model.lm_head)
    return alone


def image_options(image_processor: Any) -> dict[str, Any]:
    """The options of an encoder whose transform does what an image processor of Transformers does."""
    if getattr(image_processor, "do_pad", False):
        resize = "pad"
    else:
        resize = "crop" if getattr(image_processor, "do_center_crop", False) else "squash"
    return {
        "encoder.mean": list(image_processor.image_mean),
        "encoder.std": list(image_processor.image_std),
        "encoder.interpolation": Image.Resampling(image_processor.resample).name.lower(),
        "encoder.resize": resize,
    }


def _connector(config: Any, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The options and tensors of the connector with LLaVA's two layers, the second of which may be the identity."""
    act = config.projector_hidden_act
    if act == "linear" and torch.equal(state["linear_2.weight"], torch.eye(len(state["linear_2.weight"]))):
        tensors = {f"connector.layers.0.{kind}": state[f"linear_1.{kind}"] for kind in ("weight", "bias")}
        return {"connector": "linear", **PLAIN}, tensors
    if act not in ACTIVATIONS:
        raise ValueError(
            f"a projector with activation {act} cannot be imported; those here are {', '.join(ACTIVATIONS)}"
        )
    if not config.multimodal_projector_bias:
        raise ValueError("a projector without bias cannot be imported; connector=mlp has biases")
    names = {f"linear_{number + 1}.{kind}": f"connector.layers.{number}.{kind}" for number in (0, 1) for kind in KINDS}
    options = {"connector": "mlp", "connector.activation": act, **PLAIN}
    return options, {ours: state[theirs] for theirs, ours in names.items()}


KINDS = ("weight", "bias")


def read_projector(state: Mapping[str, Tensor]) -> Imported:
    """The tensors of LLaVA's mm_projector.bin: linear layers 0, 2, … of a sequence, or one linear layer.

    Raises ValueError for other names.
    """
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        _, found, rest = name.partition("mm_projector.")
        number, _, kind = rest.rpartition(".")
        if not found or kind not in KINDS or not (number or "0").isdecimal() or int(number or 0) % 2:
            raise ValueError(
                f"{name!r:.80} is not a tensor of LLaVA's mm_projector.bin, such as model.mm_projector.0.weight"
            )
        layers.setdefault(int(number or 0) // 2, {})[kind] = tensor.float()
    tensors = {f"connector.layers.{n}.{kind}": tensor for n, layer in layers.items() for kind, tensor in layer.items()}
    depth = {} if len(layers) == 1 else {"connector.depth": len(layers)}
    return Imported({"connector": "linear" if len(layers) == 1 else "mlp", **depth, **PLAIN}, tensors)
