"""Base class of the objectives: named losses of a model on a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import nn

from vlm.schema import Batch, Form, LossOutput


class Objective(nn.Module, ABC):
    """A module that computes named losses of a model on a batch, as sums with counts.

    The loss that is minimized is the sum of `sums / counts` over the names that end in `_loss`. Parameters of its own,
    such as a learnable temperature, are trained at `stage.lr.objective` and saved with the model's.

    Attributes:
        needs: the protocols of `vlm.models.base` that the model must have.
        form: of the rows. Rows with the form `prompt` are left-padded, for generation.
    """

    needs: ClassVar[tuple[type, ...]] = ()
    form: ClassVar[Form] = "conversation"

    @abstractmethod
    def forward(self, model: Any, batch: Batch) -> LossOutput: ...
