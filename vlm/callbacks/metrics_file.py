"""metrics.jsonl: one JSON object a log step, with its `step` in optimiser steps from 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from vlm import files


class MetricsFile(pl.Callback):
    """Appends the train metrics at every logged step and the val and text metrics at every validation of a fit."""

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self._last = trainer.global_step  # not 0 where a run goes on

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step > self._last and step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._last = step
            self._write(trainer, {*_beginning(trainer, "perf/"), *module.figures})

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.state.fn == "fit":
            self._write(trainer, _beginning(trainer, "val/", "text/"))

    def _write(self, trainer: pl.Trainer, names: set[str]) -> None:
        if trainer.is_global_zero:
            values = {name: float(value) for name, value in trainer.callback_metrics.items() if name in names}
            with files.append(Path(trainer.default_root_dir) / "metrics.jsonl") as file:
                file.write(json.dumps({"step": trainer.global_step, **values}) + "\n")


def _beginning(trainer: pl.Trainer, *beginnings: str) -> set[str]:
    return {name for name in trainer.callback_metrics if name.startswith(beginnings)}
