"""Base class of the evaluators: metrics of a model on validation data, the same in train.py and eval.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vlm.data.datamodule import VLMDataModule
from vlm.schema import Batch, LossOutput, Sample, is_loss


@dataclass(frozen=True)
class Context:
    """What an evaluator works with.

    `sum_over_ranks` sums each number over all ranks; `from_rank_zero` broadcasts the number of rank 0. Every rank must
    call them equally often. `autocast` is the precision of the run.
    """

    model: Any
    objective: Any
    data: Any
    device: torch.device
    sum_over_ranks: Callable[[Sequence[Tensor | float]], list[float]]
    from_rank_zero: Callable[[float], float]
    autocast: Callable[[], AbstractContextManager[Any]]


class Evaluator:
    """Metrics of a model.

    With `at="validation"` it runs at every validation: `update` gets each batch with the output of the objective. With
    `at="end"` it runs after the last step and in eval.py, and `finish` iterates over the data itself. `finish` returns
    the metrics with their full names, such as `val/visual_gain`, on every rank.

    Attributes:
        at: when the metrics are computed.
        needs: the protocols of `vlm.models.base` that the model must have.
        samples: records of the last `finish`, for samples.jsonl.
    """

    at: Literal["validation", "end"]
    needs: ClassVar[tuple[type, ...]] = ()
    samples: Sequence[dict[str, Any]] = ()

    def missing(self, data: VLMDataModule, *, num_ranks: int) -> dict[str, str]:
        """Before the first step: metrics that cannot be computed on this data with `num_ranks` ranks -> reason."""
        return {}

    def before_training(self, context: Context) -> None:
        """Measure the baseline of the metrics; a resumed run has it in its checkpoint."""

    def start(self) -> None:
        """Start a validation."""

    def update(self, context: Context, batch: Batch, output: LossOutput) -> None:
        """Add a validation batch; gradients are disabled."""

    def finish(self, context: Context) -> dict[str, float]:
        """The metrics."""
        return {}

    def answered(self, context: Context, indices: Sequence[int]) -> tuple[list[Sample], list[dict[str, Any]]]:
        """Some validation samples without the bad ones, and a record of each with the model's answer.

        Every rank must call this. Both lists are empty for an evaluator that generates no answers.
        """
        return [], []

    def reason_to_stop(self, step: int) -> str | None:
        """After logging: a sentence with the reason to stop training at `step`, or None."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from a checkpoint."""


class Means:
    """Means over batches and ranks, as sums with counts.

    Every rank must add the same names in the same order.
    """

    def __init__(self) -> None:
        self._pairs: dict[str, Tensor] = {}

    def add(self, name: str, total: float, count: int) -> None:
        pair = torch.tensor([total, count], dtype=torch.float64)
        self._pairs[name] = self._pairs.get(name, 0) + pair

    def add_losses(self, prefix: str, output: LossOutput, *, counts: bool = True) -> None:
        """Add each loss of an output as `prefix` + name; with `counts` off its sum and count are taken as 0."""
        for name in filter(is_loss, output.sums):
            self.add(prefix + name, output.sums[name].item() * counts, output.counts[name] * counts)

    def over_ranks(self, context: Context) -> dict[str, float]:
        """The mean of each name with a count above 0."""
        sums = context.sum_over_ranks([number for pair in self._pairs.values() for number in pair])
        pairs = zip(self._pairs, sums[::2], sums[1::2], strict=True)
        return {name: total / count for name, total, count in pairs if count}


def total(means: Mapping[str, float], prefix: str) -> float:
    """The sum of the means whose names start with `prefix`."""
    return sum(mean for name, mean in means.items() if name.startswith(prefix))
