"""Runs as a folder with its own modeling file, for what no class of Transformers holds.

The folder has modeling_vlm.py and a copy of each module of this package that the encoder and the connector need, so
this package need not be installed. Transformers runs such code with `trust_remote_code=True` only.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from vlm.encoders.hf import HFEncoder
from vlm.exchange import modeling_vlm
from vlm.exchange.llava import without_adapter
from vlm.exchange.processor import fixed_processor
from vlm.llms.causal import CausalLM
from vlm.models.composed import Composed

NAME = "VLMForConditionalGeneration"
RUNS_CODE = True
NEEDS_IMAGE = False
IMPORT = re.compile(r"^from vlm\.([\w.]+) import", re.MULTILINE)
SHAPES = re.compile(r"^from jaxtyping import .*\n", re.MULTILINE)  # annotations are never evaluated
OF_THE_WEIGHTS = ("_target_", "tiles", "weights", "package", "gradient_checkpointing")
processor = fixed_processor
COPIED = "# Copied from vlm-template (Apache License 2.0), as it was when this folder was exported.\n"


def obstacles(model: Composed) -> Iterator[str]:
    """What of a model such a folder cannot hold: each option, and what to set."""
    if model.tiles.grids:
        yield f"encoder.tiles.grids={[list(grid) for grid in model.tiles.grids]} must be []"
    if model.connector.fusion != "tokens":
        yield "the connector must give tokens to the LLM, as connector=mlp does"
    if type(model.llm) is not CausalLM:
        yield "the LLM must be decoder-only"
    if getattr(model.connector, "instructions", None) is not None:
        yield "connector.instruction=true must be false"
    for part in (model.encoder, model.connector):
        if not type(part).__module__.startswith("vlm."):
            yield f"{type(part).__name__} is a class of your own"


def language_name(name: str, base: str) -> str:
    """The name in the exported model of a tensor of the LLM."""
    return f"language_model.{name}"


def save(
    model: Composed, settings: Mapping[str, Any], folder: Path, *, image_id: int, stop_ids: list[int], dtype: Any
) -> list[int]:
    """Write config, weights and code; `settings` are those of the run. Returns unused rows of the vocabulary: none."""
    folder.mkdir()
    encoder, connector, llm = model.encoder, model.connector, model.llm
    sizes = {
        "vision_width": encoder.width,
        "llm_width": llm.width,
        "grid": list(encoder.grid),
        "output_rms": 1.0,  # of the first weights alone
    }
    adapter = _adapter(llm)
    config = modeling_vlm.VLMConfig(
        encoder=_encoder_options(encoder, settings["encoder"]),
        connector={**_without_weights(settings["connector"]), **sizes},
        text_config=llm.model.config.to_dict(),
        image_token_id=image_id,
        adapter=_adapter_facts(llm, adapter),
        tie_word_embeddings=bool(llm.model.config.tie_word_embeddings),
        architectures=[NAME],
        dtype=dtype,
        auto_map={
            "AutoConfig": "modeling_vlm.VLMConfig",
            "AutoModelForImageTextToText": f"modeling_vlm.{NAME}",
        },
    )
    config.save_pretrained(folder)
    state = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    state |= {f"connector.{name}": tensor for name, tensor in connector.state_dict().items()}
    state |= {f"language_model.{name}": tensor for name, tensor in without_adapter(llm.model).items()}
    for number, (down, up) in enumerate(adapter.values()):
        state |= {f"adapters.{number}.down.weight": down, f"adapters.{number}.up.weight": up}
    typed = _cast(state, dtype)
    for part, module in (("encoder", encoder), ("connector", connector)):
        computed = {f"{part}.{name}": buffer for name, buffer in module.named_buffers()}
        typed |= {name: buffer.clone() for name, buffer in computed.items() if name not in typed}
    head = next(name for name, module in llm.model.named_modules() if module is llm.model.get_output_embeddings())
    save_torch_state_dict(typed, folder, shared_tensors_to_discard=[f"language_model.{head}.weight"])
    _write_code(type(encoder), type(connector), folder)
    return []


def _adapter(llm: CausalLM) -> dict[str, tuple[Tensor, Tensor]]:
    """The matrices of a LoRA that cannot be apart from the model, because it acts on some tokens only, by layer."""
    state, a = llm.model.state_dict(), ".lora_A.default.weight"
    layers = [name.removesuffix(a) for name in state if name.endswith(a) and llm.adapted.tokens != "all"]
    return {name: (state[f"{name}{a}"], state[f"{name}{a.replace('A', 'B')}"]) for name in layers}


def _adapter_facts(llm: CausalLM, adapter: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Any] | None:
    if not adapter:
        return None
    layers = [(name, down.shape[1], len(up)) for name, (down, up) in adapter.items()]
    first = llm.model.get_submodule(next(iter(adapter)))
    scales = {"r": first.r["default"], "scale": first.scaling["default"]}
    return {"tokens": llm.adapted.tokens, **scales, "layers": layers}


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors with their floats in `dtype`; what is tied stays one tensor, which is written once."""
    found: dict[tuple[int, torch.Size], Tensor] = {}
    for tensor in state.values():
        if tensor.is_floating_point():
            found.setdefault((tensor.data_ptr(), tensor.shape), tensor.to(dtype))
    return {name: found.get((tensor.data_ptr(), tensor.shape), tensor) for name, tensor in state.items()}


def _encoder_options(encoder: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that build the encoder without a file of its pretrained weights."""
    found = _without_weights(options)
    if isinstance(encoder, HFEncoder):
        transform, facts = encoder.transform, encoder.tower.config.to_diff_dict()
        found |= {
            "pretrained": "none",
            "config": {key: value for key, value in facts.items() if key not in ("architectures", "dtype")},
            **{key: getattr(transform, key) for key in ("mean", "std", "interpolation")},
        }
        found["config"]["model_type"] = encoder.tower.config.model_type
        found["config"].pop("transformers_version", None)
    return found


def _without_weights(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a part without those that say where its first weights are from."""
    found = {key: value for key, value in options.items() if key not in OF_THE_WEIGHTS}
    if "init" in found:
        found |= {"init": "random", "init_from": None, "init_projection": False}
    return found


def _write_code(encoder: type[nn.Module], connector: type[nn.Module], folder: Path) -> None:
    """Write modeling_vlm.py and a flat copy of each module that it imports, one file beside the other."""
    text = inspect.getsource(modeling_vlm)
    for line, part, name in (
        ("from vlm.connectors.mlp import MLP as Connector", connector, "Connector"),
        ("from vlm.encoders.hf import HFEncoder as Encoder", encoder, "Encoder"),
    ):
        assert line in text
        text = text.replace(line, f"from {part.__module__} import {part.__name__} as {name}")
    waiting, written = {"modeling_vlm": text}, set[str]()
    while waiting:
        file, text = waiting.popitem()
        written.add(file)
        copied = SHAPES.sub("", IMPORT.sub(lambda found: f"from .{_file(found[1])} import", text))
        (folder / f"{file}.py").write_text(COPIED + copied, encoding="utf-8")
        for module in IMPORT.findall(text):
            if _file(module) not in written:
                waiting[_file(module)] = inspect.getsource(import_module(f"vlm.{module}"))


def _file(module: str) -> str:
    return f"vlm_{module.replace('.', '_')}"
