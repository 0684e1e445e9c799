"""Compares an exported folder with the run that it is from: held-out samples, answered in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm.data.collate import collate
from vlm.data.datamodule import VLMDataModule
from vlm.models.composed import Composed
from vlm.schema import IGNORE, BadSample, Sample
from vlm.text.row import Encoded
from vlm.text.turns import count

# Of the largest logit: what float32 rounds otherwise in another order of sums, and what other pixels may change.
TOLERANCE, PIXEL_TOLERANCE = 1e-3, 0.05
RELOAD = Path(__file__).with_name("reload.py")


class Drift(ValueError):
    """The exported folder answers differently."""


@dataclass(frozen=True)
class Reference:
    """What a run computes on one held-out sample, on the CPU in float32.

    `prompt` and `conversation` are ids, with `image_id` where visual tokens go; `logits` [M, V] predict the tokens at
    `positions` of the conversation, those of the answers; `text` is the greedy answer to the prompt.
    """

    sample: Sample
    prompt: list[int]
    conversation: list[int]
    positions: list[int]
    pixel_values: Tensor  # [N, 3, H, W]
    logits: Tensor
    text: str


@dataclass(frozen=True)
class Agreement:
    """Largest differences between a run and its export, on the samples of a check."""

    num_samples: int
    logits: float  # of the largest logit, with the same pixels
    logits_of_own_pixels: float  # of the largest logit, with the pixels of the exported image processor
    pixels: float  # in levels of 255


def references(
    model: Composed, data: VLMDataModule, *, num_samples: int, max_new_tokens: int, image_id: int, with_image: bool
) -> list[Reference]:
    """What the model computes on held-out samples, spread evenly over the validation split.

    Bad ones are left out, and with `with_image` those that have none.
    """
    found = []
    for index in data.val_indices(num_samples):
        try:
            sample = data.text.answered(data.reader.sample(data.splits["val"], index))
            encoded = data.text.encode_prompt(sample), data.text.encode(sample)
        except BadSample:
            continue
        if with_image and not sample.images:
            continue
        found.append(_reference(model, data, sample, *encoded, max_new_tokens=max_new_tokens, image_id=image_id))
    if not found:
        raise ValueError("none of the held-out samples of the run can be read; see vlm-doctor")
    return found


@torch.no_grad()
def _reference(
    model: Composed,
    data: VLMDataModule,
    sample: Sample,
    prompt: Encoded,
    whole: Encoded,
    *,
    max_new_tokens: int,
    image_id: int,
) -> Reference:
    asked = collate([data.reader.row(sample, prompt)], spec=data.spec, pad_id=data.text.pad_id, side="left")
    told = collate([data.reader.row(sample, whole)], spec=data.spec, pad_id=data.text.pad_id)
    ids = model.generate(asked, stop_ids=data.text.stop_ids, max_new_tokens=max_new_tokens)[0].tolist()
    return Reference(
        sample=sample,
        prompt=_with_images(prompt, image_id),
        conversation=_with_images(whole, image_id),
        positions=[at for at, label in enumerate(whole.labels) if at and label != IGNORE],
        pixel_values=told.pixel_values.contiguous(),
        logits=model(told).float(),
        text=str(data.text.tokenizer.decode(ids, skip_special_tokens=True)).strip(),
    )


def _with_images(encoded: Encoded, image_id: int) -> list[int]:
    return [image_id if image else token for token, image in zip(encoded.input_ids, encoded.image_mask, strict=True)]


def check(
    folder: Path,
    expected: Sequence[Reference],
    *,
    std: Sequence[float],
    max_new_tokens: int,
    adapter: str | None = None,
    trust_remote_code: bool = False,
) -> Agreement:
    """Answer the samples with the folder in a fresh process; `std` is that of the pixels.

    Raises Drift, which names the sample and the largest difference, unless tokens and greedy texts are equal and logits
    within the tolerances.
    """
    with tempfile.TemporaryDirectory() as work:
        _write_request(Path(work), expected, max_new_tokens, adapter, trust_remote_code)
        reload(folder, Path(work))
        answers = load_file(Path(work) / "answer.safetensors")
        texts = json.loads((Path(work) / "answer.json").read_text(encoding="utf-8"))
    differences = [_compare(each, number, answers, std) for number, each in enumerate(expected)]
    for each, text in zip(expected, texts, strict=True):
        if text != each.text:
            raise Drift(_drift(each, f"its greedy answer is {text!r:.80}, and the run's {each.text!r:.80}"))
    return Agreement(len(expected), *(max(column) for column in zip(*differences, strict=True)))


def _write_request(
    work: Path, expected: Sequence[Reference], max_new_tokens: int, adapter: str | None, trust_remote_code: bool
) -> None:
    tensors: dict[str, Tensor] = {}
    conversations = []
    for number, each in enumerate(expected):
        messages: Any = deepcopy(each.sample.messages)
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        images = iter(range(len(each.sample.images)))
        for item in (item for message in messages for item in message["content"]):
            if item["type"] == "image":
                item["path"] = f"{number}-{(image := next(images))}.png"
                each.sample.images[image].save(work / item["path"])
        conversations.append([{key: message[key] for key in ("role", "content")} for message in messages])
        tensors[f"{number}.conversation"] = torch.tensor(each.conversation)
        tensors[f"{number}.positions"] = torch.tensor(each.positions)
        if len(each.pixel_values):
            tensors[f"{number}.pixel_values"] = each.pixel_values
    save_file(tensors, work / "request.safetensors")
    request = {
        "messages": conversations,
        "max_new_tokens": max_new_tokens,
        "adapter": adapter,
        "trust_remote_code": trust_remote_code,
    }
    (work / "request.json").write_text(json.dumps(request), encoding="utf-8")


def reload(folder: Path, work: Path) -> None:
    """Run reload.py in a fresh process, which does not import this package."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules")}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-P", str(RELOAD), str(folder), str(work)]
    done = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True)
    if done.returncode:
        raise Drift(f"Transformers cannot use the exported folder: {done.stderr.strip().splitlines()[-1]:.300}")


def _compare(
    expected: Reference, number: int, answers: dict[str, Tensor], std: Sequence[float]
) -> tuple[float, float, float]:
    ids = answers[f"{number}.ids"].tolist()
    if ids != expected.prompt:
        at = next((at for at, pair in enumerate(zip(ids, expected.prompt, strict=False)) if pair[0] != pair[1]), None)
        where = f"token {at} is {ids[at]}, not {expected.prompt[at]}" if at is not None else "the rest is equal"
        raise Drift(
            _drift(expected, f"its prompt has {count(len(ids), 'token')}, the run's {len(expected.prompt)}; {where}")
        )
    size = expected.logits.shape[1]  # an extended vocabulary has more
    largest = float(expected.logits.abs().max())
    found = []
    for name, tolerance in (("logits", TOLERANCE), ("logits_of_own_pixels", PIXEL_TOLERANCE)):
        theirs = answers.get(f"{number}.{name}")
        difference = 0.0 if theirs is None else float((theirs[:, :size] - expected.logits).abs().max())
        if not difference <= tolerance * largest:
            pixels = "" if name == "logits" else " with the pixels of its own image processor"
            raise Drift(
                _drift(
                    expected,
                    f"its logits{pixels} differ by up to {difference:.3g} where the largest is {largest:.3g} "
                    f"({tolerance:.0e} of that is allowed)",
                )
            )
        found.append(difference / largest)
    pixel_values = answers.get(f"{number}.pixel_values")
    if pixel_values is None:
        return found[0], found[1], 0.0
    levels = 255 * torch.tensor(list(std)).view(3, 1, 1)
    return found[0], found[1], float(((pixel_values - expected.pixel_values) * levels).abs().max())


def _drift(expected: Reference, what: str) -> str:
    return (
        f"the export differs from the run on the held-out sample {expected.sample.id!r:.80}: {what}; nothing is written"
    )
