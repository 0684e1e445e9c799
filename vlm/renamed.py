"""Config keys of an earlier version, which are refused with the key of today."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

RENAMED = {
    "answers": "evaluators.answers",
    "checkpoint": "callbacks.save",
    "callbacks.forgetting": "evaluators.forgetting",
    "stage.objective": "objective",
    "stage.warmup_share": "stage.warmup_ratio",
    "stage.lr_floor": "stage.min_lr_ratio",
    "data.max_bad_share": "data.max_bad_ratio",
    "data.augment.colour": "data.augment.color",
    "connector.head_width": "connector.head_dim",
}


def refuse_renamed_key(key: str) -> None:
    """Raise ValueError where a dotted key is of an earlier version."""
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            raise ValueError(f"the option {key} is called {new}{key.removeprefix(old)} now; write it so")


def refuse_renamed(cfg: Mapping[str, Any]) -> None:
    """Raise ValueError where a config has a key of an earlier version."""
    for old in RENAMED:
        holder, key = _holder(cfg, old)
        if isinstance(holder, Mapping) and key in holder:
            refuse_renamed_key(old)


def rename(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run of an earlier version with single values under the keys of today."""
    renamed = deepcopy(dict(settings))
    for old, new in RENAMED.items():
        holder, key = _holder(renamed, old)
        if isinstance(holder, dict) and key in holder and not isinstance(holder[key], Mapping):
            holder[new.rpartition(".")[2]] = holder.pop(key)
    return renamed


def _holder(cfg: Mapping[str, Any], key: str) -> tuple[Any, str]:
    """What holds a dotted key, if anything does, and the key's last word."""
    *sections, last = key.split(".")
    holder: Any = cfg
    for section in sections:
        holder = holder.get(section) if isinstance(holder, Mapping) else None
    return holder, last
