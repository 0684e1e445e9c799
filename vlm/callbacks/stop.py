"""Ctrl-C, SIGTERM or `trainer.max_time` ends a run after the step in progress, with all saved."""

from __future__ import annotations

import signal
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Timer

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # from the keyboard; from a scheduler that wants the machine back


class StopOnSignal(pl.Callback):
    """Turns the first signal into a stop request, a second Ctrl-C ends at once.

    `received` is the first, on whichever rank it came, or None.
    """

    received: signal.Signals | None = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        def ask(signum: int, frame: Any) -> None:
            signal.signal(signum, self._before[signum])
            self.received = signal.Signals(signum)
            again = "; press Ctrl-C again to stop at once" if signum == signal.SIGINT else ""
            print(f"\nStopping after this step{again}.", flush=True)

        # In the place of Lightning's own handler of SIGTERM, which raises in the middle of whatever is under way.
        self._before: dict[int, Any] = {signum: signal.signal(signum, ask) for signum in SIGNALS}

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # a step that has begun is done first
        if trainer.world_size > 1:  # ranks stop after the same step or wait for each other for ever
            ours = torch.tensor(int(self.received or 0), device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(ours, reduce_op="max"))
            self.received = signal.Signals(number) if number else None
        trainer.should_stop = trainer.should_stop or self.received is not None

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for signum, before in self._before.items():
            signal.signal(signum, before)


class StopOnTime(Timer):
    """Lightning's timer, which then does without its own, but at the end of a step, and for this process alone.

    A stop among the accumulated batches of a step would lose their gradients. A run that goes on has its time again, as
    a job that a scheduler queues again has.
    """

    def __init__(self, *, max_time: Any) -> None:
        try:
            super().__init__(duration=max_time)
        except MisconfigurationException as error:
            raise ValueError(
                f"trainer.max_time={max_time!r} is no time; write it as 00:04:30:00, from days on"
            ) from error

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass
