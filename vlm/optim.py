"""What a stage trains and how: trainable state per part, parameter groups, weight decay, schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

PARTS = ("encoder", "connector", "llm")
STATES = "frozen, full, lora or last_n: N"


def set_trainable(model: nn.Module, states: Mapping[str, str | Mapping[str, int]], lora: Mapping[str, Any]) -> None:
    """Freeze every parameter, then free those that the stage names for each part.

    `frozen` and `full` speak for themselves; `lora` adds an adapter to the LLM, unless it has one from an earlier
    stage, and frees that alone; `{last_n: N}` frees the last N blocks of the encoder or layers of the LLM.
    """
    model.requires_grad_(False)
    for part in PARTS:
        state, module = states[part], getattr(model, part)
        if state == "full":
            module.requires_grad_(True)
        elif state == "lora" and hasattr(module, "add_lora"):
            if not lora_names(module):
                module.add_lora(**lora)
            for name in lora_names(module):
                module.get_parameter(name).requires_grad_(True)
        elif isinstance(state, Mapping) and set(state) == {"last_n"} and part != "connector":
            blocks = list(module.blocks() if hasattr(module, "blocks") else module.layers())
            if not 1 <= state["last_n"] <= len(blocks):
                raise ValueError(f"stage.{part}.last_n={state['last_n']} but the {part} has {len(blocks)} blocks")
            for block in blocks[-state["last_n"] :]:
                block.requires_grad_(True)
        elif state != "frozen":
            raise ValueError(f"stage.{part}={state!r} is not a state of the {part}; choose {STATES}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the stage trains nothing: every part is frozen; set for example stage.connector=full")
    for parameter in model.parameters():
        if parameter.requires_grad:  # a step of AdamW is lost in bfloat16's 8 bits: what is trained is float32
            parameter.data = parameter.data.float()


def lora_names(module: nn.Module) -> list[str]:
    """Names of the adapter's parameters."""
    return [name for name, _ in module.named_parameters() if re.search(r"\.lora_[A-Za-z_]+\.", name)]


def parameter_groups(model: nn.Module, *, lr: Mapping[str, float | None], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups a part, with and without weight decay; each carries its `name` and peak learning rate.

    Only matrices decay: biases, norms, gates, and the vectors that a connector learns per token do not.
    """
    groups = []
    for part in PARTS:
        decay: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in getattr(model, part).named_parameters():
            if parameter.requires_grad:
                vector = parameter.ndim < 2 or name.split(".")[-1] in ("position", "queries")
                (rest if vector else decay).append(parameter)
        for kind, parameters, decayed in (("decay", decay, weight_decay), ("no_decay", rest, 0.0)):
            if parameters:
                if lr.get(part) is None:
                    raise ValueError(f"the stage trains the {part} but gives it no learning rate; set stage.lr.{part}")
                groups.append({"name": f"{part}/{kind}", "params": parameters, "lr": lr[part], "weight_decay": decayed})
    return groups


def cosine(
    optimizer: torch.optim.Optimizer, *, warmup: int, steps: int, floor: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over `warmup` steps, then half a cosine from the peak down to `floor` times the peak."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
