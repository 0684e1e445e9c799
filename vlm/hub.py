"""Folders and hub ids with pretrained weights: a quick answer where there are none, or where they are not whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from vlm.file_kinds import LFS_POINTER

CACHED = ("config.json", "model.safetensors")  # either shows that the repository was read before
MASKS = ("attn.bias", "attention.bias")  # buffers of GPT-2 and its kin
LONGEST_HEADER = 10**8  # bytes, safetensors' own limit


def look_up(pretrained: str) -> None:
    """Raise OSError at once if `pretrained` is no folder, not in the cache, and its repository cannot be reached.

    The hub's own client goes on trying for a minute, a line a try, before it says so.
    """
    repo, _, revision = pretrained.partition("@")  # timm's way of naming a revision
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
    except Exception as error:  # its kinds depend on the HTTP library that the hub client uses
        raise OSError(str(error)) from error


def config_of(pretrained: str, **options: Any) -> PretrainedConfig:
    """The configuration of a folder or hub id.

    Raises OSError where there is none, or where it is of no model that Transformers knows.
    """
    look_up(pretrained)
    if Path(pretrained).is_dir() and not Path(pretrained, "config.json").is_file():
        raise OSError("that folder has no config.json")
    try:
        return AutoConfig.from_pretrained(pretrained, **options)
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise
        raise OSError(
            f"Transformers knows no model by its config.json: {first_line(error).partition('. ')[0]}"
        ) from error


def _is_path(pretrained: str) -> bool:
    """Whether a text can only mean a folder: a hub id is a name, or an owner and a name."""
    owner, _, _ = pretrained.partition("/")
    odd = pretrained.startswith(("/", ".", "~")) or pretrained.endswith("/") or "\\" in pretrained
    return odd or pretrained.count("/") > 1 or (owner != pretrained and Path(owner).is_dir())


@contextmanager
def readable_weights(pretrained: str, part: str) -> Iterator[None]:
    """Around the loading of weights: files that are cut, or only stand for others, are refused by name.

    Raises ValueError.
    """
    check_files(Path(pretrained), part)
    try:
        yield
    except (SafetensorError, RuntimeError) as error:  # Transformers' word for shapes that differ is a RuntimeError
        raise ValueError(
            f"the {part}'s weights in {pretrained!r} cannot be read ({first_line(error)}); download them again, or set "
            f"{part}.pretrained to other weights"
        ) from error


def check_files(folder: Path, part: str) -> None:
    """Raise ValueError for a file of a local folder that is not whole."""
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not file.is_file():
            continue
        with open(file, "rb") as opened:
            if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError(
                    f"{str(file)!r} only points to the {part}'s file, which Git LFS has not fetched; run git lfs pull "
                    "in its folder, or download the file"
                )
            if file.suffix == ".safetensors":
                opened.seek(0)
                size, wanted = file.stat().st_size, _whole_size(opened)
                if wanted is None:
                    raise ValueError(f"{str(file)!r} is not a safetensors file; download it again")
                if size < wanted:
                    raise ValueError(f"{str(file)!r} is cut: it has {size:,} of {wanted:,} bytes; download it again")


def _whole_size(opened: Any) -> int | None:
    """The bytes that a safetensors file should have; None where it does not begin as one."""
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
    """Raise ValueError where the files lack tensors of a model, or have weights of layers that it leaves unused.

    Its library would draw the former at random and pass over the latter: those of a larger model, or of another one.
    What stands beside the layers (another tower, a head, a pooler) may be unused, and so may buffers.
    """
    if lacking := sorted(missing):
        raise ValueError(
            f"{pretrained!r} lacks {len(lacking)} of the {part}'s tensors, the first {lacking[0]!r}; "
            f"download it again, or set {part}.pretrained to weights of this architecture"
        )
    if left := sorted(name for name in unused if _is_weight_of_layer(name, model)):
        raise ValueError(
            f"{pretrained!r} holds {len(left)} tensors that its configuration has no place for in the {part}'s layers, "
            f"the first {left[0]!r}; correct the number of layers and the like there, or set {part}.pretrained to "
            "weights of this architecture"
        )


def _is_weight_of_layer(name: str, model: nn.Module) -> bool:
    """Whether a tensor's name is that of a weight in a list of layers, whether or not the list is so long."""
    found = re.match(r"(.+?)\.\d+\.(.+)", name)
    if found is None or not name.endswith((".weight", ".bias")) or name.endswith(MASKS):
        return False
    try:
        return isinstance(model.get_submodule(found[1]), nn.ModuleList | nn.Sequential)
    except AttributeError:
        return False


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return str(error).strip().partition("\n")[0]
