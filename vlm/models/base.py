"""What every model promises: named parts, the blocks of each, and what a stage may train of them."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import nn

from vlm.schema import Batch

State = Literal["frozen", "full", "lora", "last_n"]


class Model(nn.Module, ABC):
    """A model owns named parts and a forward pass.

    What treats the parts one by one (trainable states, learning rates, parameter groups, the printed table, the plan,
    sharding, the identity of an artifact) asks the attributes below, so that a model with other parts needs no change
    anywhere else. Every parameter of a model belongs to exactly one part.

    Attributes:
        parts: attribute names of the parts, each with a config group of the same name and the states that a stage may
            give it. `full` trains all of the part, `lora` an adapter beside its linear layers (`add_lora`), `last_n`
            its last N blocks.
        pretrained: the parts that come with weights. An artifact names them and is refused on others.
        layer_decay_part: the part whose blocks learn at the decaying rates of `stage.layer_decay`, if there is one.
        root_methods: methods beside `forward` that use several parts, which sharding has to know.
    """

    parts: ClassVar[Mapping[str, tuple[State, ...]]]
    pretrained: ClassVar[tuple[str, ...]] = ()
    layer_decay_part: ClassVar[str | None] = None
    root_methods: ClassVar[tuple[str, ...]] = ()

    def blocks(self, part: str) -> list[nn.Module]:
        """The blocks of a part in the order of computation; none where it is not made of blocks."""
        return []

    def diagnostics(self, batch: Batch) -> dict[str, float]:
        """Figures of the model on a validation batch that help to see what is wrong; logged as `val/<name>`."""
        return {}

    @classmethod
    def lora_part(cls) -> str | None:
        """The part that takes an adapter, if there is one."""
        return next((part for part, states in cls.parts.items() if "lora" in states), None)

    def check_parts(self) -> None:
        """Raise ValueError where a parameter belongs to no part or to two: no learning rate would be its own."""
        owners: dict[int, list[str]] = {id(parameter): [] for parameter in self.parameters()}
        for part in self.parts:
            for parameter in getattr(self, part).parameters():
                owners[id(parameter)].append(part)
        for name, parameter in self.named_parameters():
            if len(parts := owners[id(parameter)]) != 1:
                found = f"belongs to the parts {' and '.join(parts)}" if parts else "belongs to no part"
                raise ValueError(
                    f"parameter {name} of {type(self).__name__} {found}; put it into exactly one of the modules named "
                    f"in `parts` ({', '.join(self.parts)})"
                )
