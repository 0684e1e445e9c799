"""How time and memory of an align step grow with text tokens T, visual tokens K, rows B and vocabulary V.

Each of the four is doubled twice while the others stay; the exponent is the slope of a line through the logarithms.
Memory is what the step needs beyond the built model.

    python -m benchmarks.growth
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks import models
from benchmarks.turns import in_turns

BASE = {"T": 64, "K": 49, "B": 4, "V": 16_384}
STEPS = {"T": (64, 128, 256), "K": (49, 196, 784), "B": (4, 8, 16), "V": (16_384, 32_768, 65_536)}
LAYERS = 6  # of encoder and LLM, so that the largest step takes a second


def step(sizes: dict[str, int]) -> Iterator[float]:
    """Forward and backward of a step; the value is the resident memory of the built model in 10⁹ bytes."""
    from vlm.objectives.language_modeling import LanguageModeling
    from vlm.schema import Batch, Sample

    side = 16 * round(sizes["K"] ** 0.5)
    models.VISION |= {"image_size": side, "num_hidden_layers": LAYERS}
    models.LLM |= {"vocab_size": sizes["V"], "num_hidden_layers": LAYERS}
    model, objective = models.ours(), LanguageModeling()
    rows, length = sizes["B"], sizes["T"] + sizes["K"]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(300, 16_000, (rows, length), generator=generator)
    image_mask = torch.zeros_like(ids, dtype=torch.bool)
    image_mask[:, 4 : 4 + sizes["K"]] = True
    labels = ids.clone()
    labels[:, : length - sizes["T"] * 3 // 4] = -100
    images_before = (torch.arange(length) >= 4).long().expand_as(ids)
    batch = Batch(
        pixel_values=torch.randn(rows, 3, side, side, generator=generator),
        input_ids=ids.masked_fill(image_mask, 0),
        attention_mask=torch.ones_like(image_mask),
        position_ids=torch.arange(length).expand_as(ids),
        image_mask=image_mask,
        images_before=images_before,
        images_hidden=torch.zeros_like(ids),
        labels=labels,
        sample_index=torch.arange(rows)[:, None].expand_as(ids),
        num_images=torch.ones(rows, dtype=torch.long),
        layouts=[[(1,)]] * rows,
        ids=[str(row) for row in range(rows)],
        samples=[Sample(str(row), [], []) for row in range(rows)],
    )
    with open("/proc/self/statm") as file:  # Linux
        built = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
    yield built
    while True:
        with models.autocast():
            output = objective(model, batch)
        output.sums["lm_loss"].backward()
        model.zero_grad()
        yield built


def compare(*, turns: int) -> dict[str, dict[str, Any]]:
    """For each size: its values, seconds, memory in 10⁹ bytes, and the two exponents."""
    found = {}
    for name, values in STEPS.items():
        ways = {str(value): partial(step, {**BASE, name: value}) for value in values}
        timings = in_turns(ways, turns=turns)
        seconds = [timing.seconds for timing in timings.values()]
        memory = [timing.memory_gb - timing.values[0] for timing in timings.values()]
        found[name] = {"values": list(values), "seconds": seconds, "memory_gb": memory}
        for what, grown in (("time_exponent", seconds), ("memory_exponent", memory)):
            found[name][what] = float(np.polyfit(np.log(values), np.log(grown), 1)[0])
    return found


if __name__ == "__main__":
    for name, row in compare(turns=int(os.environ.get("TURNS", "3"))).items():
        figures = "  ".join(
            f"{value:>6}: {seconds:.2f} s {memory:.2f} GB"
            for value, seconds, memory in zip(row["values"], row["seconds"], row["memory_gb"], strict=True)
        )
        print(f"{name}  time^{row['time_exponent']:.2f}  memory^{row['memory_exponent']:.2f}   {figures}", flush=True)
