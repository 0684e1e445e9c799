"""What every model promises: named parts, the blocks of each, how it is built, and what data must know about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, Protocol

from jaxtyping import Float, Int
from torch import Tensor, nn

from vlm.identity import identity
from vlm.options import bind
from vlm.schema import Batch, VisualSpec

State = Literal["frozen", "full", "lora", "last_n"]


class Model(nn.Module, ABC):
    """A model owns named parts and a forward pass.

    Whatever treats the parts one by one (trainable states, learning rates, parameter groups, the printed table, the
    plan, sharding, the identity of an artifact) asks the attributes below, so that a model with other parts needs no
    change anywhere else. Every parameter of a model belongs to exactly one part.

    What a model can do beyond that, it says by inheriting from the protocols at the end of this file.

    Attributes:
        parts: attribute names of the parts, each with the states that a stage may give it. `full` trains all of the
            part, `lora` an adapter beside its linear layers (`add_lora`), `last_n` its last N blocks. A part that can
            be swapped has a config group of the same name.
        pretrained: the parts that come with weights. An artifact names them and is refused on others.
        layer_decay_part: the part whose blocks learn at the decaying rates of `stage.layer_decay`, if there is one.
        root_methods: methods beside `forward` that use several parts, which sharding has to know.
        tokenizer: of the text that the model reads.
        chat_template: the name of a chat template of ours; None is the tokenizer's own.
        max_answers: how many answers a row may hold; None is any number.
        quantization: how the frozen weights are stored, `none` or an option of `llm.quantization`.
    """

    parts: ClassVar[Mapping[str, tuple[State, ...]]]
    pretrained: ClassVar[tuple[str, ...]] = ()
    layer_decay_part: ClassVar[str | None] = None
    root_methods: ClassVar[tuple[str, ...]] = ()

    tokenizer: Any
    chat_template: str | None = None
    max_answers: int | None = None
    quantization: str = "none"

    @classmethod
    def check(cls, cfg: Mapping[str, Any]) -> None:
        """Raise ValueError, before anything is loaded, where the options of the parts do not fit their classes."""
        for part in cls.groups(cfg):
            bind(part, cfg[part])

    @classmethod
    def build(cls, cfg: Mapping[str, Any], *, bf16: bool) -> Model:
        """The model from its config, on its pretrained weights.

        Random numbers come from `cfg["seed"]`. With `bf16` the caller rounds what stays frozen to bfloat16 afterwards;
        a part that is large and frozen is best loaded so.
        """
        return bind("model", cfg["model"], {part: bind(part, cfg[part])() for part in cls.groups(cfg)})()

    @classmethod
    def groups(cls, cfg: Mapping[str, Any]) -> list[str]:
        """The parts that have a config group in `cfg`; the model makes the others itself.

        A model that cannot do so raises ValueError where a group is missing.
        """
        return [part for part in cls.parts if part in cfg]

    @abstractmethod
    def visual_spec(self) -> VisualSpec:
        """How an image becomes pixels, and how many placeholders it takes in a row of text."""

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens of an image, or of a tile of one, wherever they enter the model."""
        return self.visual_spec().num_tokens

    def blocks(self, part: str) -> list[nn.Module]:
        """The blocks of a part in the order of computation; none where it is not made of blocks."""
        return []

    def check_rows(self, *, max_length: int, packing: bool) -> None:
        """Raise ValueError where the model cannot read rows of `max_length` tokens, or several samples in a row."""
        if packing:
            raise ValueError(f"{type(self).__name__} reads one sample a row; set data.packing=false")

    def diagnostics(self, batch: Batch) -> dict[str, float]:
        """Figures of the model on a validation batch that help to see what is wrong; logged as `val/<name>`."""
        return {}

    def identity(self, cfg: Mapping[str, Any]) -> dict[str, Any]:
        """What an artifact is compared by: `parts`, the options of what the model adds, and `bases`, its weights."""
        own = {part: dict(cfg[part]) for part in self.groups(cfg) if part not in self.pretrained}
        bases = {part: identity(getattr(self, part), cfg[part]) for part in self.pretrained}
        return {"parts": {"model": dict(cfg["model"]), **own}, "bases": bases}

    def use_local_tokenizer(self, cfg: Mapping[str, Any]) -> str:
        """Where the model was built without weights, take the tokenizer that is on this machine; say which it is."""
        return "the model's own tokenizer"

    def load_tokenizer(self, cfg: Mapping[str, Any]) -> None:
        """Where the model was built without weights, read the tokenizer that it would have with them."""

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


class PredictsTokens(Protocol):
    """Predicts the next tokens of a row: `model(batch)`."""

    def forward(self, batch: Batch) -> Float[Tensor, "m v"]:
        """Logits at the positions before supervised tokens (`batch.logits_mask`)."""
        ...


class Generates(Protocol):
    """Answers a prompt."""

    def generate(self, batch: Batch, *, stop_ids: list[int], **options: Any) -> Int[Tensor, "b s"]:
        """Ids of the answers to a batch of left-padded prompts."""
        ...


class AnswersText(Protocol):
    """Has an LLM in it that answers text alone, which training can make worse."""

    def without_images(self, batch: Batch) -> Float[Tensor, "m v"]:
        """Logits of the bare LLM at the positions before supervised tokens, for rows of text alone."""
        ...

    def text_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that answer text alone."""
        ...

    def without_adapter(self) -> AbstractContextManager[None]:
        """Within it text is answered as before an adapter was added."""
        ...


def check_capabilities(name: str, needs: tuple[type, ...], model: type[Model]) -> None:
    """Raise ValueError where a model lacks one of the protocols that `name`, an objective or evaluator, needs."""
    for protocol in needs:
        if protocol not in model.__mro__:
            what = str(protocol.__doc__).partition("\n")[0].partition(":")[0].rstrip(".").lower()
            raise ValueError(
                f"{name} needs a model that {what} (vlm.models.base.{protocol.__name__}), and {model.__name__} does "
                "not; choose another model, or another objective with its evaluators"
            )
