"""Greedy answers to one question about 64 images, 32 tokens each in batches of 16, here and by Transformers' LLaVA.

python -m benchmarks.generating
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.models import DEVICE, IMAGE_ID, LLM, NUM_VISUAL, PAD_ID, SIDE, autocast, ours, theirs
from benchmarks.turns import Timing, in_turns, print_table

NUM_IMAGES, BATCH_SIZE, NUM_TOKENS = 64, 16, 32
BEFORE, AFTER = list(range(300, 304)), list(range(400, 416))  # the tokens of the prompt around the image
NEVER = LLM["vocab_size"]  # the token that ends an answer: none, because random weights may end one at once


def images() -> torch.Tensor:
    return torch.randn(NUM_IMAGES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def with_vlm() -> Iterator[Any]:
    from vlm.launch.entry import keep_freed_memory
    from vlm.schema import Batch, Sample

    keep_freed_memory()
    model, pixels = ours().eval().to(DEVICE), images()
    ids = torch.tensor([*BEFORE, *[PAD_ID] * NUM_VISUAL, *AFTER]).expand(BATCH_SIZE, -1)
    image_mask = torch.zeros_like(ids, dtype=torch.bool)
    image_mask[:, len(BEFORE) : len(BEFORE) + NUM_VISUAL] = True
    names = [str(row) for row in range(BATCH_SIZE)]
    shared: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids, dtype=torch.bool),
        "position_ids": torch.arange(ids.shape[1]).expand_as(ids),
        "image_mask": image_mask,
        "images_before": (torch.arange(ids.shape[1]) >= len(BEFORE)).long().expand_as(ids),
        "images_hidden": torch.zeros_like(ids),
        "labels": torch.full_like(ids, -100),
        "sample_index": torch.arange(BATCH_SIZE)[:, None].expand_as(ids),
        "num_images": torch.ones(BATCH_SIZE, dtype=torch.long),
        "layouts": [[(1,)]] * BATCH_SIZE,
        "ids": names,
        "samples": [Sample(name, [], []) for name in names],
    }
    yield None
    while True:
        answers = []
        for start in range(0, NUM_IMAGES, BATCH_SIZE):
            batch = Batch(pixel_values=pixels[start : start + BATCH_SIZE], **shared).to(torch.device(DEVICE))
            with autocast():
                answers.append(model.generate(batch, stop_ids=[NEVER], max_new_tokens=NUM_TOKENS))
        yield first_tokens(answers)


def with_transformers() -> Iterator[Any]:
    model, pixels = theirs().eval(), images()
    ids = torch.tensor([*BEFORE, *[IMAGE_ID] * NUM_VISUAL, *AFTER], device=DEVICE).expand(BATCH_SIZE, -1)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = NEVER
    yield None
    while True:
        answers = []
        for start in range(0, NUM_IMAGES, BATCH_SIZE):
            batch = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "pixel_values": pixels[start : start + 16],
            }
            with torch.no_grad(), autocast():
                answers.append(model.generate(**batch, max_new_tokens=NUM_TOKENS, do_sample=False)[:, -NUM_TOKENS:])
        yield first_tokens(answers)


def first_tokens(answers: list[torch.Tensor]) -> list[int]:
    """The first token of every answer; later ones follow from it."""
    return torch.cat([answer[:, 0] for answer in answers]).tolist()


def compare(*, turns: int) -> dict[str, Timing]:
    timings = in_turns({"vlm": with_vlm, "Transformers": with_transformers}, turns=turns)
    mine, other = (timing.values[0] for timing in timings.values())
    same = sum(a == b for a, b in zip(mine, other, strict=True))
    assert same >= 0.8 * NUM_IMAGES, f"{same} of {NUM_IMAGES} first tokens agree"  # random weights have many near-ties
    return timings


if __name__ == "__main__":
    print_table("generate", compare(turns=int(os.environ.get("TURNS", "5"))))
