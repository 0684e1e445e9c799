"""Tiny models of pairs of an image and a text, and one rank of two that trains one.

`python -m tests.helpers.pair_models <folder> <case>` is one rank of two (gloo, CPU), which has five or three of
eight pairs; its environment says which.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from tests.helpers.blip2 import shaken
from tests.helpers.pairs import PACKAGE, SHARES, TEXTS, make_pairs
from vlm.encoders.cell_classes import CellClasses
from vlm.encoders.timm import TimmEncoder
from vlm.models.dual_stream import DualStream
from vlm.models.single_stream import SingleStream
from vlm.objectives.conditional_masking import ConditionalMasking
from vlm.objectives.gather import num_ranks
from vlm.objectives.masked_pairs import MaskedPairs
from vlm.schema import Batch

NAME, IMAGE_SIDE, CELL = "test_efficientnet", 96, 32  # a grid of 3×3 cells of 64 features
NUM_CELLS, MASK, VOCABULARY = 9, 103, 30_522
COMMON: dict[str, Any] = {"init": "random", "init_from": "x", "package": PACKAGE, "dropout": 0.0}
DUAL: dict[str, Any] = {
    **{"depth": 3, "width": 16, "num_heads": 2, "image_depth": 2, "image_width": 24, "image_heads": 3},
    **{"image_feed_width": 40, "co_width": 20, "co_heads": 2},
}
SINGLE: dict[str, Any] = {"depth": 2, "width": 16, "num_heads": 2}
WEIGHTS: Any = {"word": 1, "feature": 1, "class": 1, "matching": 1}
CASES: dict[str, tuple[Any, Any, bool]] = {  # model, objective, and whether it is in training
    "masked_pairs": (DualStream, MaskedPairs(mask_ratio=0.5), True),
    "a task": (SingleStream, ConditionalMasking(weights=WEIGHTS), True),
    "all tasks": (SingleStream, ConditionalMasking(weights=WEIGHTS, mask_ratio=0.5), False),
}


@cache
def encoder() -> TimmEncoder:
    torch.manual_seed(1)
    return TimmEncoder(name=NAME, weights="random", image_size=IMAGE_SIDE).requires_grad_(False)


@cache
def classes() -> CellClasses:
    torch.manual_seed(2)
    return CellClasses(name=NAME, weights="random").requires_grad_(False)


def tiny_dual(**changes: Any) -> DualStream:
    parts = {"encoder": encoder(), "classes": classes()}
    torch.manual_seed(3)
    return DualStream(**parts, **{**COMMON, **DUAL, **changes})


def tiny_single(**changes: Any) -> SingleStream:
    parts = {"encoder": encoder(), "classes": classes()}
    torch.manual_seed(3)
    return SingleStream(**parts, **{**COMMON, **SINGLE, **changes})


def tiny(kind: Any) -> Any:
    """The model with parameters of its own that are no two alike; the encoder keeps its."""
    model = {DualStream: tiny_dual, SingleStream: tiny_single}[kind]()
    for part in model.parts:
        if part not in ("encoder", "classes"):
            shaken(getattr(model, part))
    return model.eval()


def images(num: int, *, seed: int = 0) -> list[Tensor]:
    return list(torch.randn(num, 3, IMAGE_SIDE, IMAGE_SIDE, generator=torch.Generator().manual_seed(seed)))


def pairs(start: int = 0, stop: int = 8) -> Batch:
    """Some of eight pairs, padded to the longest of these."""
    batch = make_pairs(TEXTS[start:stop], images=images(8)[start:stop])
    return replace(batch, ids=[f"pair/{number}" for number in range(start, stop)])


def masked_by_hand(ids: list[int], numbers: Tensor, ratio: float) -> tuple[list[int], list[int]]:
    """The text with masked words, and their places."""
    places = [place for place in range(1, len(ids) - 1) if numbers[place, 0] < ratio]
    seen = list(ids)
    for place in places:
        if numbers[place, 1] < 0.8:
            seen[place] = MASK
        elif numbers[place, 1] < 0.9:
            seen[place] = int(numbers[place, 2] * VOCABULARY)
    return seen, places


def blanked(image: Tensor, cells: list[int]) -> Tensor:
    image = image.clone()
    for cell in cells:
        top, left = CELL * (cell // 3), CELL * (cell % 3)
        image[:, top : top + CELL, left : left + CELL] = 0
    return image


def learned(case: str, batch: Batch) -> dict[str, Any]:
    """The losses of a step and the gradients, over all ranks."""
    model_class, objective, training = CASES[case]
    model, objective = tiny(model_class), objective.train(training)
    torch.manual_seed(7 + 100 * num_ranks() * (dist.get_rank() if num_ranks() > 1 else 0))  # rank 0 as one alone
    output = objective(model, batch)
    torch.stack([output.sums[name] for name in output.sums if name.endswith("_loss")]).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    sums = {name: output.sums[name].detach() for name in output.sums}
    counts = {name: torch.tensor(float(count)) for name, count in output.counts.items()}
    if num_ranks() > 1:
        for tensor in (*gradients.values(), *sums.values(), *counts.values()):
            dist.all_reduce(tensor)
    return {"sums": sums, "counts": counts, "gradients": gradients}


def main(folder: Path, case: str) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.save(learned(case, pairs(*SHARES[rank])), folder / f"rank_{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
