"""Ctrl-C ends a run after the step in progress, with its artefact written; a second one ends it at once."""

from __future__ import annotations

import signal
from typing import Any

import lightning.pytorch as pl


class StopOnInterrupt(pl.Callback):
    """Turns the first SIGINT into a stop request; `interrupted` tells that there was one."""

    interrupted = False

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        def ask(signum: int, frame: Any) -> None:
            signal.signal(signal.SIGINT, self._before)
            self.interrupted = trainer.should_stop = True
            print("\nStopping after this step; press Ctrl-C again to stop at once.", flush=True)

        self._before = signal.signal(signal.SIGINT, ask)

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        signal.signal(signal.SIGINT, self._before)
