"""What every evaluator promises: figures of a model on validation data, the same in training and in eval.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vlm.data.datamodule import VLMDataModule
from vlm.schema import Batch, LossOutput, is_loss


@dataclass(frozen=True)
class Context:
    """What an evaluator works with; `data` is the run's `VLMDataModule`.

    `sum_over_ranks` adds each number up over all ranks, `from_first_rank` gives all of them the number of the first;
    every rank must call them equally often. `autocast` is the precision of the run.
    """

    model: Any
    objective: Any
    data: Any
    device: torch.device
    sum_over_ranks: Callable[[Sequence[Tensor | float]], list[float]]
    from_first_rank: Callable[[float], float]
    autocast: Callable[[], AbstractContextManager[Any]]


class Evaluator:
    """Figures of a model.

    One that is due `at` every `validation` is shown each validation batch with what the objective makes of it; one that
    is due at the `end`, after the last step and in eval.py, goes through the data by itself. `finish` gives the figures
    by their full names, such as `val/visual_gain`, on every rank.

    Attributes:
        at: when the figures are due.
        needs: the protocols of `vlm.models.base` that the model must have.
        samples: of the last `finish`, records to be written into samples.jsonl.
    """

    at: ClassVar[Literal["validation", "end"]]
    needs: ClassVar[tuple[type, ...]] = ()
    samples: Sequence[dict[str, Any]] = ()

    def missing(self, data: VLMDataModule, *, num_ranks: int) -> dict[str, str]:
        """Before the first step: the figures that this data cannot give in so many processes, and why.

        It reads no more than it has to.
        """
        return {}

    def before_training(self, context: Context) -> None:
        """Measure what the figures are compared with; a run that resumes has it from its checkpoint."""

    def start(self) -> None:
        """Begin a validation."""

    def update(self, context: Context, batch: Batch, output: LossOutput) -> None:
        """Take in a validation batch, without gradients."""

    def finish(self, context: Context) -> dict[str, float]:
        """The figures."""
        return {}

    def reason_to_stop(self, step: int) -> str | None:
        """After the figures are logged: why the training should end here, in a sentence."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what a checkpoint kept."""


class Means:
    """Sums with what each was summed over, added up over batches and ranks.

    Every rank must add the same names in the same order.
    """

    def __init__(self) -> None:
        self._pairs: dict[str, Tensor] = {}

    def add(self, name: str, total: float, count: int) -> None:
        pair = torch.tensor([total, count], dtype=torch.float64)
        self._pairs[name] = self._pairs.get(name, 0) + pair

    def add_losses(self, prefix: str, output: LossOutput, *, counts: bool = True) -> None:
        """Add each loss of an output as `prefix` and its name; with `counts` off, nothing is added to them."""
        for name in filter(is_loss, output.sums):
            self.add(prefix + name, output.sums[name].item() * counts, output.counts[name] * counts)

    def over_ranks(self, context: Context) -> dict[str, float]:
        """The mean of each name that anything was counted for."""
        sums = context.sum_over_ranks([number for pair in self._pairs.values() for number in pair])
        pairs = zip(self._pairs, sums[::2], sums[1::2], strict=True)
        return {name: total / count for name, total, count in pairs if count}


def total(means: Mapping[str, float], prefix: str) -> float:
    """The sum of the means that `prefix` was added to."""
    return sum(mean for name, mean in means.items() if name.startswith(prefix))
