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


@contextmanager
def facts_of(option: str) -> Iterator[None]:
    """Context for building a model from an option: an error of the library becomes one sentence with the option."""
    try:
        yield
    except (ValueError, TypeError, KeyError, RuntimeError, AssertionError) as error:
        cause = str(error).strip().rpartition("\n")[2].strip() or type(error).__name__
        cause = cause.rstrip(".")
        raise ValueError(f"{option} describes an architecture that cannot be built: {cause}; correct it") from error
