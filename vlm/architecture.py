"""Transformers' configuration from the options `llm.config` and `encoder.config`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES


def from_facts(facts: Mapping[str, Any], *, option: str) -> PretrainedConfig:
    """The configuration that an option describes. Raises ValueError if values are missing or inconsistent."""
    facts = dict(facts)
    kind = facts.pop("model_type", None)
    if kind not in CONFIG_MAPPING_NAMES:
        close = ", ".join(get_close_matches(str(kind), CONFIG_MAPPING_NAMES, n=3)) or "llama, siglip_vision_model"
        raise ValueError(f"{option}.model_type={kind} is not a model type of Transformers; choose one, such as {close}")
    for key, divisor in (("num_attention_heads", "num_key_value_heads"), ("hidden_size", "num_attention_heads")):
        number, parts = facts.get(key), facts.get(divisor)
        independent = key == "hidden_size" and facts.get("head_dim") is not None
        if isinstance(number, int) and isinstance(parts, int) and number % parts and not independent:
            raise ValueError(
                f"{option}.{key}={number} is not a multiple of {option}.{divisor}={parts}; "
                f"set {option}.{key}={max(1, number // parts) * parts}"
            )
    with facts_of(option):
        return AutoConfig.for_model(kind, **facts)


DEPTH = ("num_hidden_layers", "num_layers", "n_layer")  # Transformers' names of the number of layers


def depth_of(facts: Mapping[str, Any]) -> int | None:
    """The number of layers in the facts of an architecture, or None if they do not name it."""
    return next((facts[key] for key in DEPTH if isinstance(facts.get(key), int)), None)


def with_depth(facts: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """The facts with another number of layers; a list with a value for each layer keeps the first ones."""
    before = depth_of(facts)
    changed = {key: depth for key in DEPTH if key in facts}
    lists = {key: value[:depth] for key, value in facts.items() if isinstance(value, list) and len(value) == before}
    return {**facts, **lists, **changed}


@contextmanager
def facts_of(option: str) -> Iterator[None]:
    """Context for building a model from an option: an error of the library becomes one sentence with the option."""
    try:
        yield
    except (ValueError, TypeError, KeyError, RuntimeError, AssertionError) as error:
        cause = str(error).strip().rpartition("\n")[2].strip() or type(error).__name__
        cause = cause.rstrip(".")
        raise ValueError(f"{option} describes an architecture that cannot be built: {cause}; correct it") from error
