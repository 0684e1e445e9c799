"""Ctrl-C, SIGTERM or `trainer.max_time` ends a run after the step in progress, with all saved."""

from __future__ import annotations

import signal
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Timer

from vlm.data.workers import SIGNALS


def between_steps(trainer: Any) -> bool:
    """Whether no gradients of accumulated batches wait for more."""
    return not trainer.fit_loop._should_accumulate()


class StopOnSignal(pl.Callback):
    """Turns the first signal into a stop request; a second Ctrl-C ends at once, further signals change nothing.

    No validation follows it, also where one was due: who sends it may not wait. The module's `stopped_by` is the first
    signal, on whichever rank it came.
    """

    order: ClassVar[int] = -2  # before those that look at whether the training should stop
    received: signal.Signals | None = None

    def on_train_start(self, trainer: Any, module: pl.LightningModule) -> None:
        interrupted = False

        def ask(signum: int, frame: Any) -> None:
            nonlocal interrupted
            if interrupted and signum == signal.SIGINT:
                raise KeyboardInterrupt
            interrupted |= signum == signal.SIGINT
            if self.received is None:
                self.received = signal.Signals(signum)
                again = "; press Ctrl-C again to stop at once" if interrupted else ""
                print(f"\nStopping after this step{again}.", flush=True)

        # In the place of Lightning's own handlers: that of SIGTERM raises in the middle of whatever is under way, and
        # that of SIGUSR1 under SLURM saves there. Lightning restores those from before the fit once all is saved.
        for signum in SIGNALS:
            signal.signal(signum, ask)
        connector = trainer._signal_connector
        if connector.received_sigterm:  # just before; Lightning would raise after the first batch
            self.received, connector.received_sigterm = signal.SIGTERM, False

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._look(trainer)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._look(trainer)

    def on_fit_end(self, trainer: pl.Trainer, module: Any) -> None:
        module.stopped_by = self.agree(trainer)

    def _look(self, trainer: Any) -> None:
        if not between_steps(trainer):
            return  # a step that has begun is done first
        self.agree(trainer)
        if self.received is not None:
            trainer.should_stop, trainer.limit_val_batches = True, 0

    def agree(self, trainer: pl.Trainer) -> signal.Signals | None:
        """The signal that all ranks stop for; they stop after the same step or wait for each other for ever."""
        if trainer.world_size > 1:
            ours = torch.tensor(int(self.received or 0), device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(ours, reduce_op="max"))
            self.received = signal.Signals(number) if number else None
        return self.received


class StopOnTime(Timer):
    """Lightning's timer, which then does without its own, but at the end of a step, and for this process alone.

    A stop among the accumulated batches of a step would lose their gradients. A run that goes on has its time again, as
    a job that a scheduler queues again has.

    Args:
        max_time: DD:HH:MM:SS; None stops nothing.
    """

    order: ClassVar[int] = -1  # before Save, which looks at whether the training should stop

    def __init__(self, *, max_time: str | None = None) -> None:
        try:
            super().__init__(duration=max_time)
        except MisconfigurationException as error:
            raise ValueError(
                f"trainer.max_time={max_time!r} must be DD:HH:MM:SS, days first, such as 00:04:30:00"
            ) from error

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if between_steps(trainer):
            super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass
