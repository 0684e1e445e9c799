"""Ends a run after a number of tokens or of seconds, so that the jobs of a sweep cost the same."""

from __future__ import annotations

import time
from typing import Annotated, Any, ClassVar, Literal

import lightning.pytorch as pl
import torch

from vlm.callbacks.stop import between_steps
from vlm.ranges import Number, Range
from vlm.schema import Batch


class Budget(pl.Callback):
    """Stops after the step that reaches the budget; then the module's `budget_is_spent` is True.

    Tokens are those of all processes, with visual tokens and prompts, without padding. Seconds are those of training
    steps, without validations. A resumed run continues to count.

    Args:
        match: what is counted; with "steps" or None nothing, because `trainer.max_steps` ends the run.
        budget: tokens or seconds.
    """

    order: ClassVar[int] = -1  # before Save, which reads trainer.should_stop

    def __init__(
        self,
        *,
        match: Literal["steps", "tokens", "seconds"] | None = None,
        budget: Annotated[Number, Range(1, 10**15)] | None = None,
    ) -> None:
        self.match, self.budget, self.spent = match, budget, 0.0
        self._start: float | None = None

    def state_dict(self) -> dict[str, float]:
        return {"spent": self.spent}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.spent = state_dict["spent"]

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Batch, batch_idx: int) -> None:
        if self._start is None:
            self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if self.budget is None or self._start is None:
            return
        now = time.perf_counter()
        spent = float(batch.attention_mask.sum()) if self.match == "tokens" else now - self._start
        self._start = now
        if trainer.world_size > 1:  # all ranks must stop after the same step
            value: Any = torch.tensor(spent, device=trainer.strategy.root_device)
            spent = float(trainer.strategy.reduce(value, reduce_op="sum" if self.match == "tokens" else "max"))
        self.spent += spent
        if between_steps(trainer) and self.spent >= self.budget:
            trainer.should_stop = module.budget_is_spent = True

    def on_validation_start(self, trainer: pl.Trainer, module: Any) -> None:
        self._start = None
