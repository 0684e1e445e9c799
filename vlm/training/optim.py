"""What a stage trains and how: trainable state per part, parameter groups, weight decay, schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import nn

from vlm.models.base import Model
from vlm.options import known, mapping, parameters, shown, typed
from vlm.ranges import LearningRate, Length, RatioAboveZero

Schedule = Literal["cosine", "linear", "constant"]
# Of a part; or of some of its modules by name, and of the `rest`; None: no rate.
Rate = LearningRate | Annotated[dict[str, LearningRate], Length(1)] | None
STATE_WORDS = {"last_n": "{last_n: N}"}  # how a state is written in a config


def check_states(states: Mapping[str, Any], model: type[Model]) -> None:
    """Raise ValueError for a state that a part of the model cannot have, or where nothing is trained."""
    for part, allowed in model.parts.items():
        if part not in states:
            raise ValueError(f"stage.{part} is missing; set it to {_choices(allowed)}")
        state = states[part]
        last_n = state.get("last_n") if isinstance(state, Mapping) and set(state) == {"last_n"} else None
        name = "last_n" if isinstance(last_n, int) and not isinstance(last_n, bool) else state
        if not isinstance(name, str) or name not in allowed:
            raise ValueError(f"stage.{part}={state!r} is not a state of the {part}; choose {_choices(allowed)}")
    if all(states[part] == "frozen" for part in model.parts):
        example = next((part for part, allowed in model.parts.items() if allowed == ("frozen", "full")), None)
        example = example or next(iter(model.parts))
        raise ValueError(f"the stage trains nothing: every part is frozen; set for example stage.{example}=full")


def _choices(allowed: Sequence[str]) -> str:
    words = [STATE_WORDS.get(state, state) for state in allowed]
    return " or ".join([", ".join(words[:-1]), words[-1]])


def check_lora(lora: Any, part: Any) -> None:
    """Raise ValueError for an option of the adapter that a part, a class with `add_lora`, cannot use."""
    mapping("stage.lora", lora)
    if isinstance(pattern := lora.get("target_modules"), str):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"stage.lora.target_modules={shown(pattern)} is not a regular expression ({error}); "
                "give a list of names"
            ) from error
    known("stage.lora", lora, parameters(part.add_lora).keys() - {"self"})
    typed("stage.lora", lora, part.add_lora)


def check_steps(trainer: Mapping[str, Any]) -> None:
    """Raise ValueError where the length is not given in steps, of which warm-up and schedule are shares."""
    if trainer.get("max_epochs") is not None:
        raise ValueError("trainer.max_epochs counts passes over data, which has no end here; set trainer.max_steps")


def check_rates(
    states: Mapping[str, Any], model: type[Model], *, lr: Mapping[str, Rate], layer_decay: RatioAboveZero | None
) -> None:
    """Raise ValueError where a part is trained and has no learning rate, or where its blocks would have odd ones."""
    for part in model.parts:
        rate = lr.get(part)
        if states[part] != "frozen" and rate is None:
            raise ValueError(f"the stage trains the {part} but gives it no learning rate; set stage.lr.{part}")
        if isinstance(rate, Mapping) and "rest" not in rate:
            raise ValueError(f"stage.lr.{part} has no rest: {rate}; set stage.lr.{part}.rest, the rate of the others")
    decayed = model.layer_decay_part
    if layer_decay is not None and decayed is not None and isinstance(lr.get(decayed), dict):
        raise ValueError(
            f"stage.layer_decay={layer_decay} starts from one rate, but stage.lr.{decayed}={lr[decayed]} has several; "
            "set stage.layer_decay=null or one rate"
        )


def set_trainable(model: Model, states: Mapping[str, str | Mapping[str, int]], lora: Mapping[str, Any]) -> None:
    """Freeze every parameter, then unfreeze those that the stage names for each part.

    `frozen` and `full` speak for themselves; `lora` adds an adapter to the part, unless it has one from an earlier
    stage, and trains that alone; `{last_n: N}` trains the last N blocks of the part. Raises ValueError for another
    state, or more blocks than there are.
    """
    check_states(states, type(model))
    model.requires_grad_(False)
    for part in model.parts:
        state, module = states[part], getattr(model, part)
        if state == "full":
            module.requires_grad_(True)
        elif state == "lora":
            if not lora_names(module):
                module.add_lora(**lora)
            for name in lora_names(module):
                module.get_parameter(name).requires_grad_(True)
        elif isinstance(state, Mapping):
            for block in last_blocks(model, part, state["last_n"]):
                block.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:  # a step of AdamW is lost in bfloat16's 8 bits: what is trained is float32
            parameter.data = parameter.data.float()
    match_buffers(model)


def last_blocks(model: Model, part: str, last_n: int) -> list[nn.Module]:
    """The last blocks of a part. Raises ValueError where it has not so many."""
    blocks = model.blocks(part)
    if not 1 <= last_n <= len(blocks):
        raise ValueError(
            f"stage.{part}.last_n={last_n} but the {part} has {len(blocks)} blocks; set 1 to {len(blocks)}"
        )
    return blocks[-last_n:]


def round_frozen(model: Model, states: Mapping[str, Any]) -> None:
    """Round to bfloat16 what a stage leaves frozen of the pretrained parts, in place.

    What trains keeps the values of its file: rounded first and widened again, a weight would start up to 0.4 % off.
    Running statistics are rounded with the weights beside them, as `match_buffers` wants them; tables that no weight
    stands beside, such as rotary frequencies, stay exact.
    """
    for part in model.pretrained:
        state, module = states[part], getattr(model, part)
        trained = [module] if state == "full" else []
        if isinstance(state, Mapping):
            trained = last_blocks(model, part, state["last_n"])
        kept = {id(inner) for block in trained for inner in block.modules()}
        for inner in (inner for inner in module.modules() if id(inner) not in kept):
            weights = [p for p in inner.parameters(recurse=False) if p.is_floating_point()]
            for tensor in (*weights, *(inner.buffers(recurse=False) if weights else ())):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.bfloat16()


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
    model: Model,
    *,
    lr: Mapping[str, Rate],
    weight_decay: float,
    layer_decay: float | None = None,
    objective: nn.Module | None = None,
) -> list[dict[str, Any]]:
    """Two groups for each rate of a part, with and without weight decay; each carries its `name` and its peak rate.

    What decays is a layer's matrix or kernel: the `weight`, of two axes or more, of anything but a table of embeddings.
    Norms, biases, gates, queries, positions and learned tokens do not, as in BEiT (Bao et al., arXiv 2106.08254).

    With `layer_decay` the model's `layer_decay_part` has two groups a block. Of n blocks, block i (from 0) learns at
    lr · layer_decay^(n-1-i), and what comes before them at lr · layer_decay^n. BEiT counts from its head, which learns
    at lr; here the last block does, for the connector in the head's place has a rate of its own.

    The parameters of an objective, such as a temperature, are a part of their own, called `objective`.

    Raises ValueError for a trainable parameter that has no learning rate.
    """
    parts: dict[str, nn.Module] = {part: getattr(model, part) for part in model.parts}
    if objective is not None:
        parts["objective"] = objective
    tables = {id(m.weight) for part in parts.values() for m in part.modules() if isinstance(m, nn.Embedding)}
    groups = []
    for part, module in parts.items():
        blocks = model.blocks(part) if layer_decay is not None and part == model.layer_decay_part else []
        for label, rate, trained in _rates(part, module, lr.get(part), layer_decay, blocks):
            if trained and rate is None:
                raise ValueError(
                    f"{len(trained)} parameters of the {part} are trained but have no learning rate, first "
                    f"{next(iter(trained))}; set stage.lr.{part}"
                )
            matrices = {n for n, p in trained.items() if p.ndim > 1 and n.endswith("weight") and id(p) not in tables}
            for kind, decay in (("decay", weight_decay), ("no_decay", 0.0)):
                members = [p for name, p in trained.items() if (name in matrices) == (kind == "decay")]
                if members:
                    groups.append({"name": f"{label}/{kind}", "params": members, "lr": rate, "weight_decay": decay})
    return groups


def _rates(
    part: str, module: nn.Module, lr: Rate, layer_decay: float | None, blocks: Sequence[nn.Module]
) -> list[tuple[str, float | None, dict[str, nn.Parameter]]]:
    """A label, a peak learning rate and the parameters that it is for; with `blocks`, for each of them."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if isinstance(lr, dict):
        return _by_module(part, module, lr, trained)
    if not blocks or lr is None or layer_decay is None:
        return [(part, lr, trained)]
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
