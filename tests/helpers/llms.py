"""Small random versions of every LLM option: the YAML's own facts, but narrow and shallow."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from vlm import config
from vlm.launch.entry import CONF
from vlm.llms.base import LanguageModel
from vlm.llms.bytes import byte_tokenizer
from vlm.llms.seq2seq import Seq2SeqLM

# What a shrunk copy has in the place of its architecture's own, where that has it.
SMALL: dict[str, Any] = {
    "vocab_size": 320,
    **dict.fromkeys(("hidden_size", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads"), 4),
    "num_key_value_heads": 2,
    **dict.fromkeys(("head_dim", "d_kv"), 8),
    "query_pre_attn_scalar": 8,
    "sliding_window": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}


SPREAD = {"opt": {"init_std": 0.2}, "t5": {}}  # logits that differ; the others call it initializer_range


@cache
def shared() -> DictConfig:
    return OmegaConf.load(Path(CONF) / "llm" / "_options.yaml")


def composed(option: str) -> dict[str, Any]:
    """The option's settings, without Hydra: tests/test_config.py composes them all."""
    cfg = OmegaConf.load(Path(CONF) / "llm" / f"{option}.yaml")
    assert cfg.pop("defaults") == ["_options", "_self_"]
    return OmegaConf.to_container(OmegaConf.merge(shared(), cfg))  # type: ignore[return-value]


def facts(option: str) -> dict[str, Any]:
    return composed(option)["config"]


def shrunk(option: str) -> dict[str, Any]:
    own = facts(option)
    small = {key: SMALL[key] if key in SMALL and value is not None else value for key, value in own.items()}
    rope = {
        key: value[:3] if isinstance(value, list) else value  # ½ · 0.75 of a head of 8
        for key, value in own.get("rope_parameters", {}).items()
    }
    return (
        small | ({"rope_parameters": rope} if rope else {}) | SPREAD.get(own["model_type"], {"initializer_range": 0.2})
    )


def small_llm(option: str, **changes: Any) -> LanguageModel:
    settings = composed(option) | {"config": shrunk(option), "weights": "random"} | changes
    torch.manual_seed(0)
    return get_class(settings.pop("_target_"))(**settings)


def settings(*overrides: str) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        return config.plain(compose("train", ["encoder=tiny", "run_dir=x", *overrides]))


def saved(llm: LanguageModel, folder: Path) -> str:
    llm.model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


T5: dict[str, Any] = {
    "model_type": "t5",
    "vocab_size": 320,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
    "tie_word_embeddings": False,
}


def t5(**changes: Any) -> Seq2SeqLM:
    torch.manual_seed(0)
    options = {"config": {**T5, **changes.pop("facts", {})}, "weights": "random", **changes}
    return Seq2SeqLM(pretrained=None, **options)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0, "sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3": {"head_dim": 8},
}
