"""LLM weights in a Python package: a GGUF file, converted once to safetensors in the user's cache.

Conversion takes about a minute for a vocabulary of 262,144; the converted folder loads in a second.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
from pathlib import Path

import torch


def cache_folder() -> Path:
    """The folder of converted weights: `$VLM_CACHE`, else the user's cache folder."""
    root = os.environ.get("VLM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vlm"
    return Path(root)


def package_folder(package: str) -> Path | None:
    """The folder for the converted weights of the package, or None if the package is not installed."""
    if importlib.util.find_spec(package) is None:
        return None
    return cache_folder() / f"{package}-{importlib.import_module(package).EXPECTED_SHA256[:12]}"


def convert_package(package: str) -> Path | None:
    """Folder with the package's model in Transformers' layout (safetensors, bfloat16), or None if not installed.

    The package offers `assemble(path)`, which joins its parts and checks their SHA-256, and `EXPECTED_SHA256`. The
    folder is renamed into place when complete, so an interrupted conversion is never read.
    """
    folder = package_folder(package)
    if folder is None or folder.is_dir():
        return folder
    weights = importlib.import_module(package)
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"Converting the weights of {package} for the first time (about a minute) into {folder}")
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        _convert(weights.assemble(Path(work) / "model.gguf"), Path(work) / "done")
        try:
            (Path(work) / "done").rename(folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise
    return folder


def _convert(file: Path, folder: Path) -> None:
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.config.save_pretrained(folder)
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
