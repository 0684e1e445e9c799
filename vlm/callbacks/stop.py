"""Ctrl-C, SIGTERM or `trainer.max_time` stops a run after the current step and saves it."""

from __future__ import annotations

import signal
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Timer

from vlm.data.workers import SIGNALS


def between_steps(trainer: Any) -> bool:
    """Whether the last batch completed an optimizer step."""
    return not trainer.fit_loop._should_accumulate()


class StopOnSignal(pl.Callback):
    """The first signal requests a stop; a second Ctrl-C stops at once; other signals are ignored then.

    No validation runs after the signal, because the sender may not wait. The module's `stopped_by` is the signal,
    whichever rank received it.
    """

    order: ClassVar[int] = -2  # before callbacks that read trainer.should_stop
    received: signal.Signals | None = None

    def on_train_start(self, trainer: Any, module: pl.LightningModule) -> None:
        interrupted = False

        def request_stop(signum: int, frame: Any) -> None:
            nonlocal interrupted
            if interrupted and signum == signal.SIGINT:
                raise KeyboardInterrupt
            interrupted |= signum == signal.SIGINT
            if self.received is None:
                self.received = signal.Signals(signum)
                again = "; press Ctrl-C again to stop at once" if interrupted else ""
                print(f"\nStopping after this step{again}.", flush=True)

        # Replaces Lightning's handlers: its SIGTERM handler raises in the middle of a step, and its SIGUSR1 handler
        # under SLURM saves there. Lightning restores the original handlers after the fit.
        for signum in SIGNALS:
            signal.signal(signum, request_stop)
        connector = trainer._signal_connector
        if connector.received_sigterm:  # before this method; Lightning would raise after the first batch
            self.received, connector.received_sigterm = signal.SIGTERM, False

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._stop_if_requested(trainer)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._stop_if_requested(trainer)

    def on_fit_end(self, trainer: pl.Trainer, module: Any) -> None:
        module.stopped_by = self.agree(trainer)

    def _stop_if_requested(self, trainer: Any) -> None:
        if not between_steps(trainer):
            return  # the current step is completed first
        self.agree(trainer)
        if self.received is not None:
            trainer.should_stop, trainer.limit_val_batches = True, 0

    def agree(self, trainer: pl.Trainer) -> signal.Signals | None:
        """The signal of any rank; all ranks must stop after the same step, otherwise they deadlock."""
        if trainer.world_size > 1:
            received = torch.tensor(int(self.received or 0), device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(received, reduce_op="max"))
            self.received = signal.Signals(number) if number else None
        return self.received


class StopOnTime(Timer):
    """Lightning's Timer, checked only between optimizer steps.

    Lightning adds no other Timer then. A stop between accumulated batches would lose their gradients. A resumed run has
    the full time again, like a job that a scheduler requeues.

    Args:
        max_time: DD:HH:MM:SS; None is no limit.
    """

    order: ClassVar[int] = -1  # before Save, which reads trainer.should_stop

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
