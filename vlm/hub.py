"""A quick answer where the model hub cannot be reached."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache

CACHED = ("config.json", "model.safetensors")  # either shows that the repository was read before


def look_up(pretrained: str) -> None:
    """Raise OSError at once if `pretrained` is no folder, not in the cache, and its repository cannot be reached.

    The hub's own client goes on trying for a minute, a line a try, before it says so.
    """
    repo, _, revision = pretrained.partition("@")  # timm's way of naming a revision
    if Path(pretrained).is_dir():
        return
    if any(try_to_load_from_cache(repo, file, revision=revision or None) for file in CACHED):
        return
    try:
        HfApi().model_info(repo, revision=revision or None, timeout=20)
    except Exception as error:  # its kinds depend on the HTTP library that the hub client uses
        raise OSError(str(error)) from error
