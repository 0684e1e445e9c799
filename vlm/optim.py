"""What a stage trains and how: trainable state per part, parameter groups, weight decay, schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from vlm.ranges import LearningRate

PARTS = ("encoder", "connector", "llm")
STATES = {
    "encoder": "frozen, full or {last_n: N}",
    "connector": "frozen or full",
    "llm": "frozen, full, lora or {last_n: N}",
}
Schedule = Literal["cosine", "linear", "constant"]
# Of a part; or of some of its modules by name, and of the `rest`; None: no rate.
Rate = LearningRate | dict[str, LearningRate] | None


def check_states(states: Mapping[str, Any]) -> None:
    """Raise ValueError for a part's state that there is not, or where nothing trains."""
    for part in PARTS:
        state = states[part]
        last_n = state.get("last_n") if isinstance(state, Mapping) and set(state) == {"last_n"} else None
        blocks = part != "connector" and isinstance(last_n, int) and not isinstance(last_n, bool)
        if state not in ("frozen", "full") and not (state == "lora" and part == "llm") and not blocks:
            raise ValueError(f"stage.{part}={state!r} is not a state of the {part}; choose {STATES[part]}")
    if all(states[part] == "frozen" for part in PARTS):
        raise ValueError("the stage trains nothing: every part is frozen; set for example stage.connector=full")


def check_steps(trainer: Mapping[str, Any]) -> None:
    """Raise ValueError where the length is not given in steps, of which warm-up and schedule are shares."""
    if trainer.get("max_epochs") is not None:
        raise ValueError("trainer.max_epochs counts passes over data, which has no end here; set trainer.max_steps")


def check_rates(states: Mapping[str, Any], *, lr: Mapping[str, Rate], layer_decay: float | None) -> None:
    """Raise ValueError where a part trains and has no learning rate, or where blocks would learn at odd ones."""
    for part in PARTS:
        trains = states[part] in ("full", "lora") or isinstance(states[part], Mapping)
        if trains and lr.get(part) is None:
            raise ValueError(f"the stage trains the {part} but gives it no learning rate; set stage.lr.{part}")
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(
            f"stage.layer_decay={layer_decay} is no factor between 0 and 1; 1 or null gives one rate to all"
        )
    if layer_decay is not None and isinstance(lr.get("encoder"), dict):
        raise ValueError(
            f"stage.layer_decay={layer_decay} starts from one rate, but stage.lr.encoder={lr['encoder']} has several; "
            "set stage.layer_decay=null or one rate"
        )


def set_trainable(model: nn.Module, states: Mapping[str, str | Mapping[str, int]], lora: Mapping[str, Any]) -> None:
    """Freeze every parameter, then free those that the stage names for each part.

    `frozen` and `full` speak for themselves; `lora` adds an adapter to the LLM, unless it has one from an earlier
    stage, and frees that alone; `{last_n: N}` frees the last N blocks of the encoder or layers of the LLM. Raises
    ValueError for another state, or more blocks than there are.
    """
    check_states(states)
    model.requires_grad_(False)
    for part in PARTS:
        state, module = states[part], getattr(model, part)
        if state == "full":
            module.requires_grad_(True)
        elif state == "lora":
            if not lora_names(module):
                module.add_lora(**lora)
            for name in lora_names(module):
                module.get_parameter(name).requires_grad_(True)
        elif isinstance(state, Mapping):
            blocks = list(module.blocks() if hasattr(module, "blocks") else module.layers())
            if not 1 <= state["last_n"] <= len(blocks):
                raise ValueError(f"stage.{part}.last_n={state['last_n']} but the {part} has {len(blocks)} blocks")
            for block in blocks[-state["last_n"] :]:
                block.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:  # a step of AdamW is lost in bfloat16's 8 bits: what is trained is float32
            parameter.data = parameter.data.float()
    match_buffers(model)


def match_buffers(model: nn.Module) -> None:
    """Make buffers float32 beside float32 parameters: batch norm computes with both, and refuses two types."""
    for module in model.modules():
        if any(parameter.dtype == torch.float32 for parameter in module.parameters(recurse=False)):
            for buffer in module.buffers(recurse=False):
                buffer.data = buffer.data.float() if buffer.is_floating_point() else buffer.data


def lora_names(module: nn.Module) -> list[str]:
    """Names of the adapter's parameters."""
    return [name for name, _ in module.named_parameters() if re.search(r"\.lora_[A-Za-z_]+\.", name)]


def parameter_groups(
    model: nn.Module, *, lr: Mapping[str, Rate], weight_decay: float, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Two groups for each rate of a part, with and without weight decay; each carries its `name` and its peak rate.

    What decays is a layer's matrix or kernel: the `weight`, of two axes or more, of anything but a table of embeddings.
    Norms, biases, gates, queries, positions and learned tokens do not, as in BEiT (Bao et al., arXiv 2106.08254).

    With `layer_decay` the encoder has two groups a block. Of n blocks, block i (from 0) learns at
    lr · layer_decay^(n-1-i), and what comes before them at lr · layer_decay^n. BEiT counts from its head, which learns
    at lr; here the last block does, for the connector in the head's place has a rate of its own.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups = []
    for part in PARTS:
        for label, rate, trained in _rates(part, getattr(model, part), lr.get(part), layer_decay):
            matrices = {n for n, p in trained.items() if p.ndim > 1 and n.endswith("weight") and id(p) not in tables}
            for kind, decay in (("decay", weight_decay), ("no_decay", 0.0)):
                members = [p for name, p in trained.items() if (name in matrices) == (kind == "decay")]
                if members:
                    assert rate is not None, f"no learning rate for the {part}"
                    groups.append({"name": f"{label}/{kind}", "params": members, "lr": rate, "weight_decay": decay})
    return groups


def _rates(
    part: str, module: Any, lr: Rate, layer_decay: float | None
) -> list[tuple[str, float | None, dict[str, nn.Parameter]]]:
    """A label, a peak learning rate and what trains at it."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if isinstance(lr, dict):
        return _by_module(part, module, lr, trained)
    if layer_decay is None or part != "encoder" or lr is None:
        return [(part, lr, trained)]
    blocks = module.blocks()
    number = {id(parameter): index for index, block in enumerate(blocks) for parameter in block.parameters()}
    return [
        (
            f"{part}/block_{index}" if index >= 0 else f"{part}/stem",
            lr * layer_decay ** (len(blocks) - 1 - index),
            {name: parameter for name, parameter in trained.items() if number.get(id(parameter), -1) == index},
        )
        for index in range(-1, len(blocks))
    ]


def _by_module(
    part: str, module: nn.Module, lr: dict[str, float], trained: dict[str, nn.Parameter]
) -> list[tuple[str, float | None, dict[str, nn.Parameter]]]:
    """As `_rates`, for each module that `lr` names and for the rest."""
    choices = [name for name, _ in module.named_children()]
    if "rest" not in lr or (odd := lr.keys() - {"rest", *choices}):
        what = f"has no rest: {lr}" if "rest" not in lr else f"names {min(odd)}"
        raise ValueError(f"stage.lr.{part} {what}; give a rate to the rest and to any of {', '.join(choices)}")
    owner = {name: first if (first := name.partition(".")[0]) in lr else "rest" for name in trained}
    return [
        (f"{part}/{key}", rate, {name: parameter for name, parameter in trained.items() if owner[name] == key})
        for key, rate in lr.items()
    ]


def make_schedule(
    optimizer: torch.optim.Optimizer, *, kind: Schedule, warmup: int, steps: int, floor: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over `warmup` steps to each group's peak, then a way down to `floor` times the peak.

    `cosine` is half a cosine, `linear` a straight line; `constant` stays at the peak, whatever the floor.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        left = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[kind]
        return floor + (1 - floor) * left

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
