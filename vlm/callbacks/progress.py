"""Printed lines of a run: device, steps, losses, validations; in a terminal a bar with the remaining time."""

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
    """Shows a bar in a terminal; otherwise prints a line at the first, at every logged and at the last step."""

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        if not trainer.is_global_zero:
            return
        if isinstance(trainer.datamodule, VLMDataModule):
            CONSOLE.print(threads_and_workers(trainer))
            if choices := module.model.speed_choices:
                CONSOLE.print("perf: " + " ".join(f"{name}={choice}" for name, choice in choices.items()))
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

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self._last = trainer.global_step  # above 0 in a resumed run
        if trainer.is_global_zero and isinstance(trainer.datamodule, VLMDataModule):
            every = trainer.log_every_n_steps
            lines = "every step" if every == 1 else f"at step 1, {_every(every)} and at the end"
            printed = "" if CONSOLE.is_terminal else f"; the loss is printed {lines}"
            CONSOLE.print(f"Training: {schedule(trainer)}{printed}", soft_wrap=True)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not trainer.is_global_zero or trainer.global_step == self._last:
            return
        self._last, total = trainer.global_step, int(self._bar.tasks[0].total or 0)
        figures = f"loss {trainer.callback_metrics['train/loss']:.3f}"
        speed = trainer.callback_metrics.get("perf/tokens_per_second")
        if speed is not None:
            figures += f"  {speed:,.0f} tokens/s"
        self._bar.update(self._task, completed=trainer.global_step, figures=figures)
        is_last = trainer.global_step == total or trainer.should_stop
        is_due = trainer.global_step == 1 or trainer.global_step % trainer.log_every_n_steps == 0
        if self._bar.disable and (is_due or is_last):
            left = self._bar.tasks[0].time_remaining
            wait = "" if left is None or is_last else f"  {left:.0f} s left"
            CONSOLE.print(f"step {trainer.global_step}/{total}  {figures}{wait}")

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        if trainer.is_global_zero and trainer.state.fn == "validate" and not hasattr(self, "_bar"):  # of eval.py
            CONSOLE.print(threads_and_workers(trainer))

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if trainer.is_global_zero and trainer.state.fn == "fit":
            metrics = trainer.callback_metrics
            names = [name for name in ("val/loss", "val/visual_gain", "text/forgetting") if name in metrics]
            figures = ", ".join(f"{name} {metrics[name]:z.3f}" for name in names)
            CONSOLE.print(f"validation at step {trainer.global_step}: {figures} nats per token")

    def on_fit_end(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            self._bar.stop()

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        if trainer.is_global_zero and hasattr(self, "_bar"):
            self._bar.stop()


def threads_and_workers(trainer: Any) -> str:
    """The device, and how many threads and data workers its processes have."""
    device = trainer.strategy.root_device.type
    threads = f"{count(torch.get_num_threads(), 'thread')} for the model, " if device == "cpu" else ""
    workers = count(trainer.datamodule.num_workers, "data worker")
    ranks = f" in each of {trainer.world_size} processes" if trainer.world_size > 1 else ""
    return f"{device.upper()}: {threads}{workers} (data.num_workers){ranks}"


def schedule(trainer: Any) -> str:
    """The steps of a run, its samples and epochs where a step has a fixed number of samples, and its validations."""
    data, batches = trainer.datamodule, trainer.accumulate_grad_batches
    line = count(trainer.max_steps, "step")
    if data.batching == "samples" and not data.packing and not trainer.overfit_batches:
        samples = data.batch_size * batches * trainer.world_size
        epochs = trainer.max_steps * samples / len(data.splits["train"])
        shown = f"{epochs:,.1f}" if epochs >= 1 else f"{epochs:.2f}" if epochs >= 0.01 else "under 0.01"
        line += f" of {count(samples, 'sample')} ({shown} epochs)"
    if trainer.global_step:
        line += f", resumed after step {trainer.global_step}"
    every, rest = divmod(trainer.val_check_interval, batches)
    if not trainer.enable_validation:
        return f"{line}, no validation"
    if rest:
        return f"{line}, validation every {trainer.val_check_interval} batches and at the end"
    return f"{line}, validation {f'{_every(every)} and ' if every < trainer.max_steps else ''}at the end"


def _every(number: int) -> str:
    return "every step" if number == 1 else f"every {number} steps"
