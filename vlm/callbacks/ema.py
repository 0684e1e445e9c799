"""Exponential moving average of the trainable parameters (Polyak & Juditsky, 1992), validated and saved instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from vlm.ranges import Decay


class EMA(pl.Callback):
    """After optimizer step t: average ← d·average + (1 - d)·weights, with d = min(ema_decay, (1 + t) / (10 + t)).

    The growing d is TensorFlow's (tf.train.ExponentialMovingAverage): with a constant d of 0.999 the average after 340
    steps would still consist of 71 % initial weights.

    Averages are float32 and exist for trainable parameters only; Lightning's WeightAveraging would also copy the frozen
    ones. Validation, artifacts and the model after the fit use the averages; a checkpoint holds averages and weights.

    Args:
        ema_decay: d; None disables the average.
    """

    order: ClassVar[int] = 1  # before Save, so that the saved average includes the step

    def __init__(self, *, ema_decay: Decay | None = None) -> None:
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ValueError(f"stage.ema_decay={ema_decay} must be in (0, 1), such as 0.999")
        self.ema_decay = ema_decay
        self._averages: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}  # while the model holds the averages
        self._step = 0

    def setup(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        module.weights_to_save = partial(self._with_averages, module)

    @torch.no_grad()
    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.ema_decay is None:
            return
        restored, self._step = self._averages, trainer.global_step  # not empty in a resumed run
        self._averages = {
            name: restored.get(name, parameter.detach()).to(parameter.device, torch.float32, copy=True)
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.ema_decay is None or trainer.global_step == self._step:
            return  # accumulates gradients
        self._step = trainer.global_step
        decay = min(self.ema_decay, (1 + self._step) / (10 + self._step))
        for name, average in self._averages.items():
            average.lerp_(module.get_parameter(name).detach().float(), 1 - decay)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._use_averages(module)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._use_weights(module)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._use_weights(module)  # the exception may come from a validation

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._use_averages(module)
        self._averages, self._weights = {}, {}

    def state_dict(self) -> dict[str, Any]:
        return {"averages": self._averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._averages = state_dict["averages"]

    @torch.inference_mode(False)  # validation runs in inference mode, whose tensors cannot be trained
    def _use_averages(self, module: pl.LightningModule) -> None:
        for name, average in self._averages.items():
            parameter = module.get_parameter(name)
            self._weights[name] = parameter.data
            parameter.data = average.to(parameter.device, parameter.dtype)

    def _use_weights(self, module: pl.LightningModule) -> None:
        """Restore the same tensors, not copies: the rounding of sums can depend on the memory address."""
        for name, weight in self._weights.items():
            module.get_parameter(name).data = weight
        self._weights = {}

    @contextmanager
    def _with_averages(self, module: pl.LightningModule) -> Iterator[None]:
        """Context in which the model holds the averages."""
        self._use_averages(module)
        try:
            yield
        finally:
            self._use_weights(module)
