"""Config keys of earlier versions, refused with their new names."""

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
    """Raise ValueError if a dotted key was renamed."""
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            raise ValueError(f"the option {key} was renamed; use {new}{key.removeprefix(old)}")


def refuse_renamed(cfg: Mapping[str, Any]) -> None:
    """Raise ValueError if a config has a renamed key."""
    for old in RENAMED:
        holder, key = _holder(cfg, old)
        if isinstance(holder, Mapping) and key in holder:
            refuse_renamed_key(old)


def rename(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an earlier version with its single values under their new keys."""
    renamed = deepcopy(dict(settings))
    for old, new in RENAMED.items():
        holder, key = _holder(renamed, old)
        if isinstance(holder, dict) and key in holder and not isinstance(holder[key], Mapping):
            holder[new.rpartition(".")[2]] = holder.pop(key)
    return renamed


def _holder(cfg: Mapping[str, Any], key: str) -> tuple[Any, str]:
    """The mapping that would hold a dotted key, or None, and the last part of the key."""
    *sections, last = key.split(".")
    holder: Any = cfg
    for section in sections:
        holder = holder.get(section) if isinstance(holder, Mapping) else None
    return holder, last
