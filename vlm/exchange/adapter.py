"""A LoRA adapter (arXiv 2106.09685) as PEFT writes it, for the exported model without it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import save_file

from vlm.llms.causal import CausalLM

FOLDER = "adapter"


def write(llm: CausalLM, options: Mapping[str, Any], folder: Path, language_name: Callable[[str, str], str]) -> str:
    """Write the adapter of `llm` below `folder`; returns the name of its folder.

    `language_name` gives the name in the exported model of a tensor of the LLM, from it and the name of its base model.
    """
    base = llm.model.base_model_prefix
    tensors = {
        f"base_model.model.{language_name(name, base)}".replace(".default", ""): tensor.contiguous()
        for name, tensor in llm.model.state_dict().items()
        if ".lora_" in name
    }
    modules = {language_name(name.partition(".lora_")[0], base) for name in llm.model.state_dict() if ".lora_" in name}
    settings = LoraConfig(
        r=options["r"],
        lora_alpha=options["alpha"],
        lora_dropout=options["dropout"],
        use_dora=options.get("use_dora", False),
        target_modules=sorted(modules),
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    settings.save_pretrained(str(folder / FOLDER))
    save_file(tensors, folder / FOLDER / "adapter_model.safetensors", metadata={"format": "pt"})
    return FOLDER
