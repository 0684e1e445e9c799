"""A resumed run uses the learning rates of its config, which may have changed, not those of the checkpoint."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl


class ConfiguredRates(pl.Callback):
    """Restores the optimizer's options and the peak learning rates of the config after a checkpoint is loaded.

    Without changes they are the same numbers.
    """

    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:  # before the optimizers' states are restored
        schedules: list[Any] = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._peaks = [list(schedule.base_lrs) for schedule in schedules]
        self._options = [
            [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ]

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        for optimizer, options in zip(trainer.optimizers, self._options, strict=True):
            for group, configured in zip(optimizer.param_groups, options, strict=True):
                group.update(configured)
        for config, peaks in zip(trainer.lr_scheduler_configs, self._peaks, strict=True):
            schedule: Any = config.scheduler
            schedule.base_lrs = peaks
            for group, peak, factor in zip(schedule.optimizer.param_groups, peaks, schedule.lr_lambdas, strict=True):
                group["lr"] = peak * factor(schedule.last_epoch)
