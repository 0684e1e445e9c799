"""What training costs the LLM: its loss on plain conversations, beside that of the LLM before training."""

from __future__ import annotations

from typing import Annotated, Any

import lightning.pytorch as pl

from vlm.evaluation.texts import text_batches, text_loss
from vlm.module import Ended
from vlm.ranges import Number, Range


class Forgotten(Ended):
    """The LLM has lost more on plain conversations than the run allows."""


class Forgetting(pl.Callback):
    """Logs `text/loss`, `text/loss_base` and their difference `text/forgetting` at every validation, in nats a token.

    The LLM reads the texts alone: no image, no connector. Its base is the LLM as the stage found it, without the
    adapter if it has one. It is measured once, before the first step, and a run that goes on remembers it.

    Nothing is measured where the stage freezes the LLM: no step can change what it says.

    Args:
        max: the forgetting above which the run stops, with its artefact saved; None stops none.
    """

    def __init__(self, *, max: Annotated[Number, Range(-1_000, 1_000)] | None = None) -> None:
        self.max = max
        self._base: float | None = None

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        model = module.model
        if self._base is None and any(parameter.requires_grad for parameter in model.text_parameters()):
            with model.without_adapter():
                self._base = self._loss(trainer, module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        if self._base is not None:
            loss = self._loss(trainer, module)
            self._forgetting = loss - self._base
            figures = {"loss": loss, "loss_base": self._base, "forgetting": self._forgetting}
            module.log_dict({f"text/{name}": value for name, value in figures.items()})

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        if self._base is not None and self.max is not None and not self._forgetting <= self.max:  # NaN included
            raise Forgotten(
                f"text/forgetting is {self._forgetting:.3f} nats a token at step {trainer.global_step}, above "
                f"callbacks.forgetting.max={self.max}; the artefact of this step is kept: lower stage.lr.llm, or raise "
                "data.text_replay"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"base": self._base}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._base = state_dict["base"]

    def _loss(self, trainer: pl.Trainer, module: Any) -> float:
        """Each rank reads all the texts, which are few, and all go by the figure of the first."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(self, "_batches"):
            self._batches = text_batches(data.text, data.spec)
        with trainer.precision_plugin.forward_context():
            return trainer.strategy.broadcast(text_loss(module.model, self._batches, device=module.device))
