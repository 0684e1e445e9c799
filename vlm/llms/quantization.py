"""Weights in 8 or 4 bits with bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch

Quantization = Literal["none", "int8", "nf4"]


def check_quantization(quantization: Quantization, *, weights: str) -> None:
    """Raise ValueError, before anything is loaded, if the quantization is not possible here."""
    if quantization == "none" or weights == "meta":
        return
    if weights == "random":
        raise ValueError(
            f"llm.quantization={quantization} needs pretrained weights, but llm.weights=random; "
            "set llm.quantization=none"
        )
    if not torch.cuda.is_available():
        raise ValueError(
            f"llm.quantization={quantization} needs a CUDA GPU and this machine has none; set llm.quantization=none"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"llm.quantization={quantization} needs bitsandbytes, which is not installed; "
            "run pip install 'vlm-template[quantization]' or set llm.quantization=none"
        )


def loading_options(quantization: Quantization, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantize the linear layers and compute in `dtype`."""
    if quantization == "none":
        return {}
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return {"quantization_config": settings, "device_map": {"": torch.cuda.current_device()}}
