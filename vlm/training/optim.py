"""Trainable parameters of a stage, parameter groups, weight decay and learning rate schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import nn

from vlm.models.base import Model
from vlm.options import check_keys, check_mapping, check_types, parameters, shown
from vlm.ranges import LearningRate, Length, RatioAboveZero

Schedule = Literal["cosine", "linear", "constant"]
# One learning rate for a part; or rates for its modules by name, and for the `rest`; or None.
Rate = LearningRate | Annotated[dict[str, LearningRate], Length(1)] | None
# Notations of the states in a config that are mappings.
STATE_WORDS = {"last_n": "{last_n: N}", "only": "{only: [<module>]}"}


def check_states(states: Mapping[str, Any], model: type[Model]) -> None:
    """Raise ValueError for a state that a part of the model does not support, or if nothing is trained."""
    for part, allowed in model.parts.items():
        if part not in states:
            raise ValueError(f"stage.{part} is missing; set it to {_choices(allowed)}")
        state = states[part]
        name = _name_of(state) if isinstance(state, Mapping) else state
        if not isinstance(name, str) or name not in allowed:
            raise ValueError(f"stage.{part}={state!r} is not a state of the {part}; choose {_choices(allowed)}")
    if all(states[part] == "frozen" for part in model.parts):
        example = next((part for part in model.parts if part not in model.pretrained), next(iter(model.parts)))
        raise ValueError(f"every part is frozen, so the stage trains nothing; set for example stage.{example}=full")


def _name_of(state: Mapping[str, Any]) -> str | None:
    """The name of a state that is a mapping; None if it is none of them."""
    last_n, only = state.get("last_n"), state.get("only")
    if set(state) == {"last_n"} and isinstance(last_n, int) and not isinstance(last_n, bool):
        return "last_n"
    is_list = isinstance(only, list) and only and all(isinstance(name, str) for name in only)
    return "only" if set(state) == {"only"} and is_list else None


def _choices(allowed: Sequence[str]) -> str:
    words = [STATE_WORDS.get(state, state) for state in allowed]
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def check_lora(lora: Any, part: Any) -> None:
    """Raise ValueError for an invalid LoRA option of `part`, a class with `add_lora`."""
    check_mapping("stage.lora", lora)
    if isinstance(pattern := lora.get("target_modules"), str):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"stage.lora.target_modules={shown(pattern)} is not a regular expression ({error}); "
                "give a list of names"
            ) from error
    check_keys("stage.lora", lora, parameters(part.add_lora).keys() - {"self"})
    check_types("stage.lora", lora, part.add_lora)


def check_steps(trainer: Mapping[str, Any]) -> None:
    """Raise ValueError if the length is given in epochs; warm-up and schedule need steps."""
    if trainer.get("max_epochs") is not None:
        raise ValueError(
            "trainer.max_epochs is not supported, because the training data has no end; set trainer.max_steps"
        )


def check_rates(
    states: Mapping[str, Any], model: type[Model], *, lr: Mapping[str, Rate], layer_decay: RatioAboveZero | None
) -> None:
    """Raise ValueError if a trained part has no learning rate, or several with `layer_decay`."""
    for part in model.parts:
        rate = lr.get(part)
        if states[part] != "frozen" and rate is None:
            raise ValueError(f"the stage trains the {part} but it has no learning rate; set stage.lr.{part}")
        if isinstance(rate, Mapping) and "rest" not in rate:
            raise ValueError(
                f"stage.lr.{part} has no rest: {rate}; set stage.lr.{part}.rest, the learning rate of the other modules"
            )
    decayed = model.layer_decay_part
    if layer_decay is not None and decayed is not None and isinstance(lr.get(decayed), dict):
        raise ValueError(
            f"stage.layer_decay={layer_decay} needs one learning rate, but stage.lr.{decayed}={lr[decayed]} has "
            "several; set stage.layer_decay=null or one rate"
        )


def set_trainable(model: Model, states: Mapping[str, str | Mapping[str, Any]], lora: Mapping[str, Any]) -> None:
    """Freeze every parameter, then unfreeze those that the stage names for each part.

    `lora` adds an adapter to the part, unless it has one from an earlier stage, and trains only the adapter and the
    rows of added tokens; `{last_n: N}` trains the last N blocks, and `{only: [names]}` these modules of the part.
    Raises ValueError for another state, if N exceeds the number of blocks, or if the part has no such module.
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
            if (added := getattr(module, "added_tokens", None)) is not None:
                added.requires_grad_(True)
        elif isinstance(state, Mapping):
            for trained in _modules(model, part, state):
                trained.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:  # in bfloat16 small updates of AdamW would be rounded away
            parameter.data = parameter.data.float()
    match_buffers(model)


def _modules(model: Model, part: str, state: Mapping[str, Any]) -> list[nn.Module]:
    """The modules of a part that a stage trains. Raises ValueError if the part lacks one."""
    if "last_n" in state:
        return last_blocks(model, part, state["last_n"])
    modules = dict(getattr(model, part).named_children())
    if unknown := [name for name in state["only"] if name not in modules]:
        raise ValueError(
            f"stage.{part}.only has {unknown[0]!r}, which is not a module of the {part}; choose of {', '.join(modules)}"
        )
    return [modules[name] for name in state["only"]]


def last_blocks(model: Model, part: str, last_n: int) -> list[nn.Module]:
    """The last blocks of a part. Raises ValueError if it has fewer."""
    blocks = model.blocks(part)
    if not 1 <= last_n <= len(blocks):
        raise ValueError(
            f"stage.{part}.last_n={last_n} but the {part} has {len(blocks)} blocks; set it from 1 to {len(blocks)}"
        )
    return blocks[-last_n:]


def cast_frozen(model: Model, states: Mapping[str, Any]) -> None:
    """Cast the frozen parameters of the pretrained parts to bfloat16, in place.

    Trainable parameters keep float32, because rounding would change them by up to 0.4 %. Buffers of a module with
    parameters, such as running statistics, are cast too (see `match_buffers`); other buffers, such as rotary
    frequencies, are not.
    """
    for part in model.pretrained:
        state, module = states[part], getattr(model, part)
        trained = [module] if state == "full" else []
        if isinstance(state, Mapping):
            trained = _modules(model, part, state)
        kept = {id(inner) for block in trained for inner in block.modules()}
        for inner in (inner for inner in module.modules() if id(inner) not in kept):
            weights = [p for p in inner.parameters(recurse=False) if p.is_floating_point()]
            for tensor in (*weights, *(inner.buffers(recurse=False) if weights else ())):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.bfloat16()


def match_buffers(model: nn.Module) -> None:
    """Cast buffers of modules with float32 parameters to float32; batch norm needs the same type for both."""
    for module in model.modules():
        if any(parameter.dtype == torch.float32 for parameter in module.parameters(recurse=False)):
            for buffer in module.buffers(recurse=False):
                buffer.data = buffer.data.float() if buffer.is_floating_point() else buffer.data


def lora_names(module: nn.Module) -> list[str]:
    """Names of the LoRA parameters."""
    return [name for name, _ in module.named_parameters() if re.search(r"\.lora_[A-Za-z_]+\.", name)]


def parameter_groups(
    model: Model,
    *,
    lr: Mapping[str, Rate],
    weight_decay: float,
    layer_decay: float | None = None,
    objective: nn.Module | None = None,
) -> list[dict[str, Any]]:
    """Two groups per learning rate of a part, with and without weight decay; each has a `name` and its peak rate.

    Weight decay applies to each `weight` with two or more axes, except embeddings. Norms, biases, gates, queries,
    position embeddings and learned tokens have none, as in BEiT (Bao et al., arXiv 2106.08254).

    With `layer_decay` the model's `layer_decay_part` has two groups per block. Of n blocks, block i (from 0) has the
    rate lr · layer_decay^(n-1-i), and modules before the blocks lr · layer_decay^n. In BEiT the head has the rate lr;
    here the last block has, because the connector has its own rate.

    The parameters of an objective, such as a temperature, form a part called `objective`.

    Raises ValueError for a trainable parameter that has no learning rate.
    """
    parts: dict[str, nn.Module] = {part: getattr(model, part) for part in model.parts}
    if objective is not None:
        parts["objective"] = objective
    embeddings = {id(m.weight) for part in parts.values() for m in part.modules() if isinstance(m, nn.Embedding)}
    groups = []
    for part, module in parts.items():
        blocks = model.blocks(part) if layer_decay is not None and part == model.layer_decay_part else []
        for label, rate, trained in _rates(part, module, lr.get(part), layer_decay, blocks):
            if trained and rate is None:
                raise ValueError(
                    f"{len(trained)} parameters of the {part} are trained but have no learning rate, first "
                    f"{next(iter(trained))}; set stage.lr.{part}"
                )
            decayed = {n for n, p in trained.items() if p.ndim > 1 and n.endswith("weight") and id(p) not in embeddings}
            for kind, decay in (("decay", weight_decay), ("no_decay", 0.0)):
                members = [p for name, p in trained.items() if (name in decayed) == (kind == "decay")]
                if members:
                    groups.append({"name": f"{label}/{kind}", "params": members, "lr": rate, "weight_decay": decay})
    return groups


def _rates(
    part: str, module: nn.Module, lr: Rate, layer_decay: float | None, blocks: Sequence[nn.Module]
) -> list[tuple[str, float | None, dict[str, nn.Parameter]]]:
    """(label, peak learning rate, parameters) of a part; with `blocks`, of each block."""
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
    """As `_rates`, for each module and each of the part's own parameters in `lr`, and for the rest."""
    choices = [name for name, _ in (*module.named_children(), *module.named_parameters(recurse=False))]
    if "rest" not in lr or (unknown := lr.keys() - {"rest", *choices}):
        what = f"has no rest: {lr}" if "rest" not in lr else f"names {min(unknown)}"
        raise ValueError(f"stage.lr.{part} {what}; give a learning rate to the rest and to any of {', '.join(choices)}")
    owner = {name: first if (first := name.partition(".")[0]) in lr else "rest" for name in trained}
    return [
        (f"{part}/{key}", rate, {name: parameter for name, parameter in trained.items() if owner[name] == key})
        for key, rate in lr.items()
    ]


def learning_rates(groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The learning rates of `parameter_groups`, without `/decay` and `/no_decay`, whose rates are equal."""
    return {group["name"].rpartition("/")[0]: group["lr"] for group in groups}


def make_schedule(
    optimizer: torch.optim.Optimizer, *, kind: Schedule, warmup: int, steps: int, min_ratio: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over `warmup` steps to each group's peak rate, then decay to `min_ratio` times the peak.

    The decay is half a cosine or linear; `constant` stays at the peak.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        decay = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[kind]
        return min_ratio + (1 - min_ratio) * decay

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
