"""Hydra's composition in a third of its time: tests compose over a thousand configs.

Three parts of Hydra repeat work whose result is known. With their replacements the composed configs are the same
(tests/test_composing.py).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from hydra._internal import defaults_list
from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_store import ConfigStore
from hydra.plugins.config_source import ConfigResult

from vlm.launch.configs import CONF

# Where the configs are that do not change while tests run: Hydra's own, this project's, and those of plugins.
SHIPPED = [("pkg", "hydra.conf"), ("file", CONF), ("structured", "")]

load_config = ConfigRepository.load_config
create_interpolation_map = defaults_list._create_interpolation_map
loaded: dict[str, ConfigResult | None] = {}


def load_config_once(repository: ConfigRepository, config_path: str) -> ConfigResult | None:
    """A composition loads some 30 configs. What it merges and changes is a copy of the config, not of its defaults."""
    if [(source.scheme(), source.path) for source in repository.sources] != SHIPPED:
        return load_config(repository, config_path)
    if config_path not in loaded:
        loaded[config_path] = load_config(repository, config_path)
    result = loaded[config_path]
    return None if result is None else replace(result, config=copy.deepcopy(result.config))


def interpolation_map_where_needed(overrides: Any, defaults: Any, self_added: bool) -> Any:
    """The choices by which ${…} in a defaults list is resolved; most lists have none."""
    if any(default.is_interpolation() for default in defaults if not default.is_self()):
        return create_interpolation_map(overrides, defaults, self_added)
    return None


REPLACED = [
    # A composition copies what it loads configs with, and with it the store, to which it does not write.
    (ConfigStore, "__deepcopy__", None, lambda store, memo: store),
    (ConfigRepository, "load_config", load_config, load_config_once),
    (defaults_list, "_create_interpolation_map", create_interpolation_map, interpolation_map_where_needed),
]


def speed_up() -> None:
    """Replace the three parts in this process."""
    for owner, name, _, replacement in REPLACED:
        setattr(owner, name, replacement)
