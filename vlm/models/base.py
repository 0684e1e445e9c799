"""Base class of the models and the protocols that objectives and evaluators need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlm.identity import identity
from vlm.options import bind
from vlm.schema import Batch, VisualSpec

State = Literal["frozen", "full", "lora", "last_n", "only"]


class Model(nn.Module, ABC):
    """A model owns named parts and a forward pass.

    Trainable states, learning rates, parameter groups, the printed table, the plan, sharding and the identity of an
    artifact use the attributes below, so a model with other parts needs no change anywhere else. Every parameter
    belongs to exactly one part. A model declares its capabilities by inheriting from the protocols at the end of this
    file.

    Attributes:
        parts: attribute names of the parts, each with the states that a stage may give it. `full` trains the whole
            part, `lora` an adapter (`add_lora`), `last_n` the last N blocks, `only` some of its modules. A part that
            can be swapped has a config group of the same name.
        pretrained: the parts with pretrained weights. An artifact names them and does not load on others.
        layer_decay_part: the part to which `stage.layer_decay` applies, if any.
        feature_part: the encoder (`grid`, `width`, `image_size`) whose features can be cached, if any; those of an
            image depend on this image alone.
        changeable: fields of the identity, or of the artifact's manifest, that a later stage may change, because they
            change no tensor; each with the option that the user must give for that.
        feature_cache: gives the features in place of that part, for batches with `image_keys`; None without a cache.
        root_methods: methods besides `forward` that use several parts; sharding needs their names.
        tokenizer: of the LLM or text encoder.
        chat_template: name of a built-in template of vlm/text/templates.py; None is the tokenizer's own.
        max_answers: largest number of answers in a row; None is no limit.
        num_positions: largest number of tokens of a row, with its answer; None is no limit.
        speed_choices: what is printed as `perf:` at the start of a run, such as the implementation of attention.
        quantization: of the frozen weights, `none` or an option of `llm.quantization`.
    """

    parts: ClassVar[Mapping[str, tuple[State, ...]]]
    pretrained: ClassVar[tuple[str, ...]] = ()
    layer_decay_part: ClassVar[str | None] = None
    feature_part: ClassVar[str | None] = None
    root_methods: ClassVar[tuple[str, ...]] = ()
    changeable: ClassVar[Mapping[str, str]] = {}

    tokenizer: Any
    chat_template: str | None = None
    max_answers: int | None = None
    num_positions: int | None = None
    quantization: str = "none"
    feature_cache: Callable[[Tensor, Sequence[bytes]], Tensor] | None = None

    @property
    def speed_choices(self) -> Mapping[str, str]:
        return {}

    @classmethod
    def check(cls, cfg: Mapping[str, Any]) -> None:
        """Raise ValueError, before anything is loaded, if the options of a part do not fit its class."""
        for part in cls.groups(cfg):
            bind(part, cfg[part])

    @classmethod
    def build(cls, cfg: Mapping[str, Any], *, bf16: bool) -> Model:
        """The model from its config, with pretrained weights.

        Random numbers come from `cfg["seed"]`. With `bf16` the caller casts frozen parameters to bfloat16 afterwards; a
        large frozen part should be loaded in bfloat16.
        """
        return bind("model", cfg["model"], {part: bind(part, cfg[part])() for part in cls.groups(cfg)})()

    @classmethod
    def groups(cls, cfg: Mapping[str, Any]) -> list[str]:
        """The parts that have a config group in `cfg`; the model creates the others itself.

        Raises ValueError if a required group is missing.
        """
        return [part for part in cls.parts if part in cfg]

    @staticmethod
    def required(groups: Iterable[str], cfg: Mapping[str, Any]) -> list[str]:
        """These groups. Raises ValueError if `cfg` lacks one of them."""
        if missing := [group for group in groups if group not in cfg]:
            raise ValueError(f"the config has no {missing[0]}; choose one of the options in conf/{missing[0]}")
        return list(groups)

    @abstractmethod
    def visual_spec(self) -> VisualSpec:
        """How an image becomes `pixel_values`, and its number of placeholders in a row."""

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens per image, or per tile, wherever they enter the model."""
        return self.visual_spec().num_tokens

    def features(self, batch: Batch) -> Float[Tensor, "u p dv"]:
        """The features of `pixel_values` by `feature_part`, from the feature cache if there is one."""
        assert self.feature_part is not None
        if self.feature_cache is None or batch.image_keys is None:
            return getattr(self, self.feature_part)(batch.pixel_values)  # U P Dv
        return self.feature_cache(batch.pixel_values, batch.image_keys)  # U P Dv

    def blocks(self, part: str) -> list[nn.Module]:
        """The blocks of a part in the order of computation; empty if it has no blocks."""
        return []

    def check_rows(self, *, max_length: int, packing: bool) -> None:
        """Raise ValueError if the model does not support rows of `max_length` tokens, or packed rows."""
        if packing:
            raise ValueError(f"{type(self).__name__} takes one sample per row; set data.packing=false")

    def diagnostics(self, batch: Batch) -> dict[str, float]:
        """Metrics of a validation batch for debugging; logged as `val/<name>`."""
        return {}

    def identity(self, cfg: Mapping[str, Any]) -> dict[str, Any]:
        """The identity that an artifact stores: `parts`, options of new parts, and `bases`, the pretrained parts."""
        own = {part: dict(cfg[part]) for part in self.groups(cfg) if part not in self.pretrained}
        bases = {part: identity(getattr(self, part), cfg[part]) for part in self.pretrained}
        return {"parts": {"model": dict(cfg["model"]), **own}, "bases": bases}

    @classmethod
    def weights_are_here(cls, cfg: Mapping[str, Any]) -> bool:
        """Whether `build` needs neither a download nor a conversion."""
        return True

    @classmethod
    def depth(cls, cfg: Mapping[str, Any]) -> int | None:
        """The number of blocks of the largest part, if `with_depth` can change it."""
        return None

    @classmethod
    def with_depth(cls, cfg: Mapping[str, Any], depth: int) -> dict[str, Any]:
        """The config with another number of blocks in the largest part, for the probe of `plan=true`.

        A model whose `depth` is a number overrides it; of others it is not called.
        """
        raise NotImplementedError

    def use_local_tokenizer(self, cfg: Mapping[str, Any]) -> str:
        """Use the tokenizer on this machine if the model was built without weights; return its description."""
        return "the model's own tokenizer"

    def load_tokenizer(self, cfg: Mapping[str, Any]) -> None:
        """Load the pretrained tokenizer if the model was built without weights."""

    @classmethod
    def lora_part(cls) -> str | None:
        """The part that supports a LoRA adapter, if any."""
        return next((part for part, states in cls.parts.items() if "lora" in states), None)

    def check_parts(self) -> None:
        """Raise ValueError if a parameter belongs to no part or to several; its learning rate would be undefined."""
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

    def logits_of_answers(self, batch: Batch) -> Float[Tensor, "m v"]:
        """As `forward`, without gradients, for rows with one beginning, such as several answers to one question.

        A model that can compute the beginning once overrides it.
        """
        return self(batch)  # type: ignore[operator]


class Generates(Protocol):
    """Generates answers to prompts."""

    def generate(self, batch: Batch, *, stop_ids: list[int], **options: Any) -> Int[Tensor, "b s"]:
        """Ids of the answers to a batch of left-padded prompts; `options` are those of Transformers' `generate`."""
        ...


class AnswersText(Protocol):
    """Has an LLM that can answer text alone."""

    def without_images(self, batch: Batch) -> Float[Tensor, "m v"]:
        """Logits of the LLM alone at the positions before supervised tokens, for rows without images."""
        ...

    def text_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the LLM."""
        ...

    def without_adapter(self) -> AbstractContextManager[None]:
        """Context in which the LLM computes without its adapter."""
        ...


class EmbedsPairs(Protocol):
    """Embeds images and texts in one space. A row has one image and one text."""

    def features(self, batch: Batch) -> Float[Tensor, "n p dv"]:
        """The features of the images."""
        ...

    def embed_images(self, features: Float[Tensor, "n p dv"]) -> Float[Tensor, "n k e"]:
        """Unit vectors, several per image."""
        ...

    def embed_texts(self, ids: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, "b e"]:
        """Unit vectors of texts, right-padded where `mask` is False."""
        ...


class MatchesPairs(Protocol):
    """Tells whether an image and a text belong together."""

    def match(
        self, features: Float[Tensor, "b p dv"], ids: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"]
    ) -> Float[Tensor, "b 2"]:
        """Logits of "no" and "yes" for each row."""
        ...


class DescribesImages(Protocol):
    """Predicts the text of an image."""

    def describe(
        self, features: Float[Tensor, "b p dv"], batch: Batch
    ) -> tuple[Float[Tensor, "b k e"], Float[Tensor, "m v"]]:
        """The embeddings of the images, and logits at the positions before supervised tokens, in one pass."""
        ...


class Fused(NamedTuple):
    """What a model of pairs makes of its rows; the widths are the model's."""

    words: Float[Tensor, "b t w"]  # states of the tokens
    cells: Float[Tensor, "b p c"]  # states of the image's cells
    pair: Float[Tensor, "b e"]  # of the whole


class FusesPairs(Protocol):
    """Reads an image and a text together, with words or cells of them masked. A row has one image and one text."""

    num_cells: int

    def masked_features(
        self, pixel_values: Float[Tensor, "n 3 h w"], hidden: Bool[Tensor, "n p"] | None
    ) -> Float[Tensor, "n p dv"]:
        """The features of images without their hidden cells; no feature depends on the pixels of these."""
        ...

    def cell_classes(self, pixel_values: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n p y"]:
        """Logits of the classes in each cell, from a frozen classifier."""
        ...

    def fuse(self, features: Float[Tensor, "b p dv"], ids: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Fused:
        """The states of tokens and cells after both have seen each other; `mask` is False at padding."""
        ...

    def predict_words(self, states: Float[Tensor, "m w"]) -> Float[Tensor, "m v"]:
        """Logits of the words at masked tokens."""
        ...

    def predict_classes(self, states: Float[Tensor, "m c"]) -> Float[Tensor, "m y"]:
        """Logits of the classes of masked cells."""
        ...

    def match_pair(self, pair: Float[Tensor, "b e"]) -> Float[Tensor, "b 2"]:
        """Logits of "no" and "yes" to whether image and text belong together."""
        ...


class PredictsFeatures(Protocol):
    """Predicts the features of masked cells."""

    def predict_features(self, states: Float[Tensor, "m c"]) -> Float[Tensor, "m dv"]:
        """The features that `masked_features` gives where nothing is hidden."""
        ...


def check_capabilities(name: str, needs: tuple[type, ...], model: type[Model]) -> None:
    """Raise ValueError if a model lacks a protocol that `name`, an objective or evaluator, needs."""
    for protocol in needs:
        if protocol not in model.__mro__:
            what = str(protocol.__doc__).partition("\n")[0].partition(":")[0].rstrip(".").lower()
            raise ValueError(
                f"{name} needs a model that {what} (vlm.models.base.{protocol.__name__}), and {model.__name__} does "
                "not; choose another model, or another objective with its evaluators"
            )
