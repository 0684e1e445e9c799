"""Progress bar in optimizer steps, with loss, tokens per second and remaining time."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bar,
)

from vlm.data.datamodule import VLMDataModule
from vlm.text.turns import count
from vlm.training.run import CONSOLE


class Progress(pl.Callback):
    """Shows a bar in a terminal; otherwise prints a line at every logged step."""

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        if isinstance(data := trainer.datamodule, VLMDataModule):  # type: ignore[attr-defined]
            CONSOLE.print(_threads_and_workers(trainer, data))
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=CONSOLE,
            speed_estimate_period=3600,  # long, so that the remaining time includes validations
            disable=not CONSOLE.is_terminal,
        )
        total = int(trainer.estimated_stepping_batches)
        self._task = self._bar.add_task("training", total=total, figures="")
        self._bar.start()

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self._last = trainer.global_step  # above 0 in a resumed run

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not trainer.is_global_zero or trainer.global_step == self._last:
            return
        self._last = trainer.global_step
        figures = f"loss {trainer.callback_metrics['train/loss']:.3f}"
        speed = trainer.callback_metrics.get("perf/tokens_per_second")
        if speed is not None:
            figures += f"  {speed:,.0f} tokens/s"
        self._bar.update(self._task, completed=trainer.global_step, figures=figures)
        if self._bar.disable and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            left = self._bar.tasks[0].time_remaining
            wait = "" if left is None else f"  {left:.0f} s left"
            CONSOLE.print(f"step {trainer.global_step}/{self._bar.tasks[0].total:.0f}  {figures}{wait}")

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.is_global_zero and trainer.state.fn == "fit":
            metrics = trainer.callback_metrics
            names = [name for name in ("val/loss", "val/visual_gain", "text/forgetting") if name in metrics]
            figures = ", ".join(f"{name} {metrics[name]:z.3f}" for name in names)
            CONSOLE.print(f"step {trainer.global_step}: {figures} nats/token")

    def on_fit_end(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            self._bar.stop()

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        if trainer.is_global_zero and hasattr(self, "_bar"):
            self._bar.stop()


def _threads_and_workers(trainer: pl.Trainer, data: VLMDataModule) -> str:
    device = trainer.strategy.root_device.type
    threads = f"{count(torch.get_num_threads(), 'thread')} for the model, " if device == "cpu" else ""
    ranks = f" in each of {trainer.world_size} processes" if trainer.world_size > 1 else ""
    return f"{device.upper()}: {threads}{count(data.num_workers, 'data worker')} (data.num_workers){ranks}"
