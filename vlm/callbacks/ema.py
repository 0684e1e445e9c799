"""A moving average of what trains, which is validated and saved in the weights' place (Polyak & Juditsky, 1992)."""

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

    The growing d is TensorFlow's (tf.train.ExponentialMovingAverage): the weights that a run began with are forgotten
    early, where a d of 0.999 from the start would still hold 71 % of them after 340 steps.

    Averages are float32 and of the trained tensors alone; Lightning's WeightAveraging would copy the frozen model too.
    The model holds them in validation, in an artifact and once the fit is over; a checkpoint holds both.

    Args:
        ema_decay: d; None keeps no average.
    """

    order: ClassVar[int] = 1  # before Save, so that a step is in the average before it is saved

    def __init__(self, *, ema_decay: Decay | None = None) -> None:
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ValueError(f"stage.ema_decay={ema_decay} must be above 0 and below 1, such as 0.999")
        self.ema_decay = ema_decay
        self._averages: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}  # while the model holds the averages
        self._step = 0

    def setup(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        module.weights_to_save = partial(self._averaged, module)

    @torch.no_grad()
    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.ema_decay is None:
            return
        known, self._step = self._averages, trainer.global_step  # known where a run goes on
        self._averages = {
            name: known.get(name, parameter.detach()).to(parameter.device, torch.float32, copy=True)
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.ema_decay is None or trainer.global_step == self._step:
            return  # a step of several batches is not over
        self._step = trainer.global_step
        decay = min(self.ema_decay, (1 + self._step) / (10 + self._step))
        for name, average in self._averages.items():
            average.lerp_(module.get_parameter(name).detach().float(), 1 - decay)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._put_in(module)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._take_out(module)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._take_out(module)  # it may have come in a validation

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._put_in(module)
        self._averages, self._weights = {}, {}

    def state_dict(self) -> dict[str, Any]:
        return {"averages": self._averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._averages = state_dict["averages"]

    @torch.inference_mode(False)  # in which validation runs; what it makes could not be trained on
    def _put_in(self, module: pl.LightningModule) -> None:
        for name, average in self._averages.items():
            parameter = module.get_parameter(name)
            self._weights[name] = parameter.data
            parameter.data = average.to(parameter.device, parameter.dtype)

    def _take_out(self, module: pl.LightningModule) -> None:
        """Each weight goes back to where it lay: its address may decide how a sum is rounded."""
        for name, weight in self._weights.items():
            module.get_parameter(name).data = weight
        self._weights = {}

    @contextmanager
    def _averaged(self, module: pl.LightningModule) -> Iterator[None]:
        """Within it the model holds the averages."""
        self._put_in(module)
        try:
            yield
        finally:
            self._take_out(module)
