"""`plan.memory_gb`: which options make a run fit into the memory of a GPU, in order of preference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlm import config
from vlm.ranges import Number

RESERVE = 0.1  # of the GPU's memory, for the CUDA context and the gaps of its allocator
LORA_LR = 2.0e-4  # of conf/stage/instruct.yaml; a LoRA learns at about ten times the rate of the whole LLM


@dataclass(frozen=True)
class Way:
    """A way to run the same training.

    Attributes:
        options: the changed options, by full key.
        held_gb: weights, gradients and optimizer states.
        row_gb: activations of a row.
        update_gb: what the optimizer's update allocates.
    """

    options: Mapping[str, Any]
    held_gb: float
    row_gb: float
    update_gb: float = 0.0

    def memory_gb(self, rows: int) -> float:
        """The peak with so many rows per batch."""
        return self.held_gb + max(rows * self.row_gb, self.update_gb)


@dataclass(frozen=True)
class Suggestion:
    """Options, as they are written on the command line, and the memory that they need."""

    options: tuple[str, ...]
    memory_gb: float


def changes(settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The changes to try, from none to those that change the training most.

    Recomputing layers changes no result; a LoRA in place of the whole LLM and quantized weights do.
    """
    yield {}
    part = config.model_class(settings).lora_part()
    if part is None:
        return
    options, state = settings.get(part) or {}, settings["stage"].get(part)
    recompute = {f"{part}.gradient_checkpointing": True}
    can_recompute = options.get("gradient_checkpointing") is False
    if can_recompute:
        yield recompute
    trained: dict[str, Any] = {}
    if state == "full" or (isinstance(state, Mapping) and "last_n" in state):
        trained = {f"stage.{part}": "lora", f"stage.lr.{part}": LORA_LR}
        yield trained
        if can_recompute:
            yield {**trained, **recompute}
    if options.get("quantization") == "none":
        quantized = {**trained, f"{part}.quantization": "nf4"}
        yield quantized
        if can_recompute:
            yield {**quantized, **recompute}


def for_gpu(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as a GPU would run them: with PyTorch's attention and, where the user chose none, bf16-mixed."""
    changed = dict(settings)
    if torch.cuda.is_available():
        return changed
    if settings["trainer"]["precision"] == "auto":
        changed = with_options(changed, {"trainer.precision": "bf16-mixed"})
    for part in config.model_class(settings).groups(settings):
        if settings[part].get("attention") == "auto":
            changed = with_options(changed, {f"{part}.attention": "sdpa"})
    return changed


def with_options(settings: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with other values, by full key."""
    changed = dict(settings)
    for key, value in options.items():
        first, _, rest = key.partition(".")
        changed[first] = with_options(changed[first], {rest: value}) if rest else value
    return changed


def suggest(
    ways: Sequence[dict[str, Any]],
    measure: Callable[[dict[str, Any]], Way],
    *,
    rows: int,
    accumulate_grad_batches: int,
    memory_gb: Number,
    rows_option: str = "data.batch_size",
    least_rows: int = 1,
) -> tuple[list[Suggestion], Suggestion]:
    """What fits, in order of preference, and what needs the least memory.

    A way is taken with the most rows per batch that fit; batches are accumulated to the same number of rows per step. A
    way that fits with all rows ends the search, because each further way changes more."""
    found: list[Suggestion] = []
    tried: list[Suggestion] = []
    for options in ways:
        way = measure(options)
        for each in (each for each in range(rows, 0, -1) if rows % each == 0 and (each >= least_rows or each == rows)):
            split = {rows_option: each, "trainer.accumulate_grad_batches": accumulate_grad_batches * rows // each}
            values = options if each == rows else {**options, **split}
            words = tuple(f"{key}={_word(value)}" for key, value in values.items())
            tried.append(Suggestion(words, way.memory_gb(each)))
            if tried[-1].memory_gb <= (1 - RESERVE) * memory_gb:
                found.append(tried[-1])
                break
        if found and found[-1] is tried[-1] and each == rows:
            break
    return found, min(tried, key=lambda suggestion: suggestion.memory_gb)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
