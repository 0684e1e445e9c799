"""Load an exported folder with Transformers alone, and answer the samples beside it; run as a program of its own.

    python reload.py <exported folder> <folder of samples>

The folder of samples has request.json and request.safetensors (`vlm.exchange.check` writes them) and gets answer.json
and answer.safetensors. Nothing of this package is imported, so that the exported folder is all that is used.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor


@torch.no_grad()
def answer(folder: Path, samples: Path) -> None:
    """Write the tokens, pixels, logits and greedy text of each sample."""
    request = json.loads((samples / "request.json").read_text(encoding="utf-8"))
    given = load_file(samples / "request.safetensors")
    trust = {"trust_remote_code": request["trust_remote_code"]}
    processor = AutoProcessor.from_pretrained(folder, **trust)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **trust).eval()
    if request["adapter"]:
        model.load_adapter(folder / request["adapter"])
    tensors: dict[str, Tensor] = {}
    texts: list[str] = []
    for number, messages in enumerate(request["messages"]):
        for message in messages:
            for item in message["content"]:
                if item["type"] == "image":
                    item["path"] = str(samples / item["path"])
        inputs = inputs_of(processor, messages)
        ids = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=request["max_new_tokens"])
        new = ids[0] if model.config.text_config.is_encoder_decoder else ids[0, inputs["input_ids"].shape[1] :]
        texts.append(processor.decode(new, skip_special_tokens=True).strip())
        tensors[f"{number}.ids"] = inputs["input_ids"][0]
        row = {name.partition(".")[2]: tensor for name, tensor in given.items() if name.startswith(f"{number}.")}
        row |= {name: tensor for name, tensor in inputs.items() if name.startswith("qformer_")}
        tensors[f"{number}.logits"] = _logits(model, row)
        if "pixel_values" in inputs:
            tensors[f"{number}.pixel_values"] = inputs["pixel_values"]
            tensors[f"{number}.logits_of_own_pixels"] = _logits(model, {**row, "pixel_values": inputs["pixel_values"]})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, samples / "answer.safetensors")
    (samples / "answer.json").write_text(json.dumps(texts), encoding="utf-8")


def inputs_of(processor: Any, messages: list[dict[str, Any]]) -> Any:
    """The inputs of a model for messages whose images are files; InstructBLIP's processor knows no chat template."""
    if processor.chat_template:
        return processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    text = processor.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    items = [item for message in messages for item in message["content"] if item["type"] == "image"]
    return processor(images=[Image.open(item["path"]) for item in items], text=text, return_tensors="pt")


def _logits(model: Any, row: dict[str, Tensor]) -> Tensor:
    """Logits [M, V] that predict the tokens at `positions` of a conversation."""
    ids, positions = row["conversation"], row["positions"]
    inputs = {name: tensor for name, tensor in row.items() if name not in ("conversation", "positions")}
    if model.config.text_config.is_encoder_decoder:
        prompt, answers = ids[: positions[0]], ids[positions]
        return model(input_ids=prompt[None], labels=answers[None], **inputs).logits[0]
    return model(input_ids=ids[None], **inputs).logits[0, positions - 1]


if __name__ == "__main__":
    answer(Path(sys.argv[1]), Path(sys.argv[2]))
    if "vlm" in sys.modules:
        sys.exit("it imports vlm, which other machines may lack")
