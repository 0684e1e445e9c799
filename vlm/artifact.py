"""What a run leaves behind: the tensors that were trained, and a manifest of what they belong to.

    artifact/weights.safetensors   every tensor trained in this stage or in one before it, nothing frozen
    artifact/manifest.json         format, parts and options, identities of the base models, template, stages, code

Saving writes each file aside and renames it, so that a full disk or a killed process leaves the previous one whole.
Both files describe the same tensors at every save of a run, so any pair of them fits.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from vlm.optim import lora_names, match_buffers

FORMAT_VERSION = 1
SAMPLE = 1024  # values a tensor that enter its fingerprint


class SaveError(ValueError):
    """The disk did not take what should be saved; what was saved before is intact."""


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


def trained_names(model: nn.Module, inherited: list[str]) -> list[str]:
    """Parameters that this stage trains or an earlier one has trained, also where an adapter has renamed them since."""
    earlier = {name.replace(".base_layer.", ".") for name in inherited}
    parameters = model.named_parameters()
    return [name for name, p in parameters if p.requires_grad or name.replace(".base_layer.", ".") in earlier]


def save(folder: Path, *, model: nn.Module, manifest: Mapping[str, Any], names: list[str], step: int) -> None:
    """Write an artefact. Raises SaveError, leaving the previous one as it was, where the disk does not take it."""
    tensors = {name: model.get_parameter(name).detach().cpu().contiguous() for name in names}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / "weights.safetensors.tmp"
        save_file(tensors, aside, metadata={"format": "pt", "step": str(step)})
        os.replace(aside, folder / "weights.safetensors")
        write_json(folder / "manifest.json", {"format_version": FORMAT_VERSION, **manifest, "tensors": names})
    except (OSError, SafetensorError) as error:
        for left in folder.glob("*.tmp"):
            left.unlink()
        before = (
            "the artefact saved before is intact" if (folder / "weights.safetensors").exists() else "none was saved"
        )
        raise SaveError(f"could not save the artefact of step {step} in {folder}: {error}; {before}") from error


def write_json(path: Path, content: Any) -> None:
    """Write aside, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    os.replace(aside, path)


def read_manifest(run: str | Path) -> dict[str, Any]:
    """The manifest of a run directory. Raises ValueError where it is none, or is of another format."""
    path = Path(run) / "artifact" / "manifest.json"
    if not path.is_file():
        raise ValueError(f"ckpt={run} is no run directory: it has no artifact/manifest.json")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a manifest: {error}") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}, this code reads {FORMAT_VERSION}; update the older one")
    return manifest


def load(run: str | Path, *, model: nn.Module, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Put a run's trained tensors into `model`, which `manifest` describes, and return the run's own manifest.

    An adapter of the LLM is added where the run has one. Raises ValueError naming the first field in which the two
    manifests' bases differ, or the tensors that do not fit.
    """
    theirs = read_manifest(run)
    rounded = theirs.get("quantization", "none")  # not recorded at first
    _compare("llm.quantization", rounded, manifest["quantization"], run)  # before the fingerprint, which it changes
    for field in ("bases", "parts", "chat_template", "num_image_tokens"):
        _compare(field, theirs[field], manifest[field], run)
    if theirs["lora"] and not lora_names(model.llm):  # type: ignore[arg-type]
        model.llm.add_lora(**theirs["lora"])  # type: ignore[operator,union-attr]
    parameters = dict(model.named_parameters())
    with safe_open(Path(run) / "artifact" / "weights.safetensors", framework="pt") as file:
        stored = set(file.keys())
        if stored != set(theirs["tensors"]) or not stored <= set(parameters):
            odd = sorted(stored ^ set(theirs["tensors"])) or sorted(stored - set(parameters))
            raise ValueError(f"ckpt={run} does not fit this model: {len(odd)} tensors differ, first {odd[0]!r}")
        for name in sorted(stored):
            tensor, target = file.get_tensor(name), parameters[name]
            if tensor.shape != target.shape:
                raise ValueError(f"ckpt={run}: {name} has shape {tuple(tensor.shape)}, here {tuple(target.shape)}")
            # A copy, for a tensor of a file may lie at an address that makes a sum round otherwise.
            target.data = tensor.to(target.device, copy=True)
    match_buffers(model)
    return theirs


def _compare(field: str, theirs: Any, ours: Any, run: str | Path) -> None:
    """Raise on the first difference of two nested fields."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in dict.fromkeys([*theirs, *ours]):
            _compare(f"{field}.{key}", theirs.get(key), ours.get(key), run)
    elif theirs != ours:
        raise ValueError(f"ckpt={run} was trained with {field} = {theirs}, here it is {ours}; use the same parts")
