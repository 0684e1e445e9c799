"""Which pretrained model a part is: by name, by the facts of its architecture, and by its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

SAMPLE = 1024  # values a tensor that enter its fingerprint
# What a configuration says beside facts of the architecture: where the weights lie, how they are kept and run, and what
# the manifest names elsewhere.
NO_FACTS = {
    *("pretrained", "package", "weights", "trust_remote_code", "gradient_checkpointing"),
    *("transformers_version", "architectures", "dtype", "use_cache", "quantization_config"),
    *("image_size", "layer", "mean", "std", "interpolation", "resize"),
}


def identity(part: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """Which base model a part is: hub id or folder, facts of the architecture, and a hash of the weights.

    Much of what a model computes stands in no tensor: activation, epsilon of norms, rotary base, soft-capping. So the
    facts are kept one by one, those of Transformers' configuration or else the `options` that made the part.
    """
    configs: Any = (getattr(module, "config", None) for module in part.modules())
    facts = next((config.to_dict() for config in configs if hasattr(config, "to_dict")), options)
    return {
        "pretrained": _source(options.get("pretrained")),
        "config": {key: value for key, value in facts.items() if key not in NO_FACTS and not key.startswith("_")},
        "fingerprint": fingerprint(part),
    }


def _source(pretrained: Any) -> Any:
    """A hub id as it is, a folder by its absolute path."""
    if isinstance(pretrained, list):
        return [_source(each) for each in pretrained]
    return str(Path(pretrained).absolute()) if pretrained and Path(pretrained).is_dir() else pretrained


def fingerprint(module: nn.Module) -> str:
    """A hash of a part's tensor names, shapes and evenly spaced values, the same for float32 and bfloat16 copies.

    Reading 1,024 values of each tensor takes well under a second for a model of billions of parameters; two trained
    models do not agree on them. Tensors on the meta device count by name and shape alone.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta and tensor.numel():
            flat = tensor.detach().flatten()
            num = min(SAMPLE, len(flat))
            chosen = flat[torch.arange(num, device=flat.device) * (len(flat) - 1) // max(1, num - 1)]
            digest.update(chosen.float().bfloat16().view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()
