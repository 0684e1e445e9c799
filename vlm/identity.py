"""Identity of a pretrained part: name, architecture and a fingerprint of the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

SAMPLE = 1024  # values per tensor in a fingerprint
ADDED = "added_tokens."  # prefix of the names of what is no pretrained tensor
# Keys of a config that do not describe the architecture, or that the manifest has elsewhere.
IGNORED_KEYS = {
    *("pretrained", "package", "weights", "trust_remote_code", "gradient_checkpointing"),
    *("transformers_version", "architectures", "dtype", "use_cache", "quantization_config"),
    *("image_size", "layer", "mean", "std", "interpolation", "resize", "tiles"),
}


def identity(part: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """Hub id or folder, config and fingerprint of a pretrained part.

    The config matters because activation, epsilon of norms, rotary base and soft-capping are in no tensor. It is
    Transformers' config, or else the `options` of the part.
    """
    configs: Any = (getattr(module, "config", None) for module in part.modules())
    config = next((config.to_dict() for config in configs if hasattr(config, "to_dict")), options)
    return {
        "pretrained": _source(options.get("pretrained")),
        "config": {key: value for key, value in config.items() if key not in IGNORED_KEYS and not key.startswith("_")},
        "fingerprint": fingerprint(part),
    }


def _source(pretrained: Any) -> Any:
    """A hub id unchanged, or the absolute path of a folder."""
    if isinstance(pretrained, list):
        return [_source(each) for each in pretrained]
    return str(Path(pretrained).absolute()) if pretrained and Path(pretrained).is_dir() else pretrained


def fingerprint(module: nn.Module) -> str:
    """A hash of tensor names, shapes and 1,024 evenly spaced values per tensor, equal for float32 and bfloat16.

    It takes less than a second for billions of parameters. Of tensors on the meta device only name and shape count.
    Rows of tokens that are added to an LLM do not count.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        if name.startswith(ADDED):
            continue
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta and tensor.numel():
            flat = tensor.detach().flatten()
            num = min(SAMPLE, len(flat))
            chosen = flat[torch.arange(num, device=flat.device) * (len(flat) - 1) // max(1, num - 1)]
            digest.update(chosen.float().bfloat16().view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()
