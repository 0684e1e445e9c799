"""Shared data types: samples, batches, losses.

Axes, everywhere in this project:

    B  rows in a batch          N  images in a batch (a tile counts as an image)   P  patches per image
    T  tokens per row           K  visual tokens per image                          V  vocabulary
    D  LLM width                Dv encoder width                                    M  supervised positions in a batch
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

IGNORE = -100  # label of positions without loss; default of PyTorch's cross-entropy

Split = Literal["train", "val"]
# Form of a row: a whole conversation with supervised answers, the prompt before its last answer, or one image and the
# last answer alone, as a text of the tokenizer without a chat template.
Form = Literal["conversation", "prompt", "pair"]


class Content(TypedDict):
    """One piece of a message: text, or a placeholder of the sample's next image."""

    type: Literal["text", "image"]
    text: NotRequired[str]


class Message(TypedDict):
    """One turn, in the format of Transformers' chat templates.

    An assistant's turn with `supervised=False` has no loss.
    """

    role: Literal["system", "user", "assistant"]
    content: list[Content]
    supervised: NotRequired[bool]  # default True


@dataclass(frozen=True)
class Sample:
    """A conversation and its images, in the order of their placeholders.

    Images are RGB with 8 bits per channel; `vlm.data.sample_reader` checks this. `id` is the same in all runs and names
    the sample in errors; `meta` is for scorers (e.g. `question_type`).
    """

    id: str
    images: list[Image.Image]
    messages: list[Message]
    meta: dict[str, str] = field(default_factory=dict)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of each image."""
        return [image.size for image in self.images]

    @property
    def num_images(self) -> int:
        """Number of image placeholders in the messages, whether the images are loaded or not."""
        return sum(item["type"] == "image" for message in self.messages for item in message["content"])


BadKind = Literal["unreadable_image", "placeholder_mismatch", "empty_text", "too_long", "other_defect"]
BAD_KINDS: tuple[BadKind, ...] = get_args(BadKind)


class BadSample(ValueError):
    """A sample that cannot be used; the message names the sample, the problem and the remedy."""

    def __init__(self, message: str, kind: BadKind = "other_defect") -> None:
        super().__init__(message)
        self.kind = kind


class StoredImage(NamedTuple):
    """An image in a file. Both functions raise `OSError` or `BadSample` if it cannot be read."""

    name: str
    size: Callable[[], int]  # bytes
    read: Callable[[int, int], bytes]  # (start, number of bytes)


class Source(ABC):
    """One split of a dataset: `len(source)` samples, of which `source[index]` is one.

    A source of your own needs `__len__` and `__getitem__`; the rest has defaults.
    """

    left_out: Mapping[str, int] = MappingProxyType({})  # how many items of the data are not samples, by their kind
    names: Sequence[str] = ()  # of a mixture: the values of `Sample.meta["source"]`
    num_hashed: int = 16  # samples that `fingerprint` reads

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Raises `BadSample` where the sample cannot be read."""

    def outline(self, index: int) -> Sample:
        """The sample without its images. Override it where the text can be read without opening them."""
        return replace(self[index], images=[])

    def order(self, epoch: int, *, seed: int) -> Sequence[int] | Int[np.ndarray, " n"] | None:
        """The indices of an epoch in the order to read them; None: each sample once, shuffled by the reader."""
        return None

    def has_images(self) -> Bool[np.ndarray, " n"]:
        """Whether each sample has images; a bad sample counts as one without. Override it where that is known."""

        def has(index: int) -> bool:
            try:
                return self.outline(index).num_images > 0
            except BadSample:
                return False

        return np.fromiter(map(has, range(len(self))), dtype=bool, count=len(self))

    def stored_images(self, indices: Sequence[int] | None = None) -> Iterator[StoredImage]:
        """The stored images of these samples (None: of all samples), each once; none where images are not stored."""
        return iter(())

    def fingerprint(self) -> str:
        """A hash of the samples' text in their order, by which a resumed run notices edited annotations.

        It covers `num_hashed` samples, evenly spaced. Override it where hashing all of them is cheap.
        """
        num = min(len(self), self.num_hashed)
        return hashed(len(self), *(self.outline_text(number * len(self) // num) for number in range(num)))

    def outline_text(self, index: int) -> str:
        """The sample without its images as text, or the error of one that cannot be read."""
        try:
            return repr(self.outline(index))
        except BadSample as error:
            return str(error)


def hashed(*parts: Any) -> str:
    """A hash of texts, numbers and bytes in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


@dataclass(frozen=True)
class VisualSpec:
    """How the model takes images, for the data.

    `num_tokens` is the number of placeholders per image or tile: K if the visual tokens enter the LLM's input, 0 if the
    LLM's layers attend to them.

    With tiling, `tile_rows` maps (width, height) of an image to the number of tiles in each row. It depends on the size
    only, so that the length of a row is known before the image is decoded.

    Where visual tokens of padding are left out (vlm/models/unpad.py), `kept_patches` maps the size to the rows and
    columns of patches, of all tiles together, that are not padding.
    """

    num_tokens: int
    image_size: tuple[int, int]  # height, width in pixels
    transform: Callable[[Image.Image], Tensor]  # one PIL image -> [3, H, W], or [tiles, 3, H, W]; deterministic
    tile_rows: Callable[[tuple[int, int]], list[int]] | None = None
    max_tiles: int = 1  # per image
    row_separator: str = ""  # text between the rows of tiles
    kept_patches: Callable[[tuple[int, int]], tuple[int, int]] | None = None
    num_packed: Callable[[tuple[int, int]], int] | None = None  # number of placeholders of an image of this size
    max_packed: int = 0  # the most that an image can have
    image_token: str | None = None  # a special token of the tokenizer that marks the place of each image
    instruction: Callable[[str], list[int]] | None = None  # the ids of a question, for a connector that reads it


@dataclass(frozen=True)
class Batch:
    """Rows of text with their images, in the order of the rows, then of the placeholders.

    A row is one sample, or several packed samples that do not attend to each other.
    """

    pixel_values: Float[Tensor, "u 3 h w"]  # of distinct images
    input_ids: Int[Tensor, "b t"]
    attention_mask: Bool[Tensor, "b t"]
    position_ids: Int[Tensor, "b t"]  # within the sample
    image_mask: Bool[Tensor, "b t"]  # True where visual tokens go
    images_before: Int[Tensor, "b t"]  # number of the row's images before this token
    images_hidden: Int[Tensor, "b t"]  # number of those that belong to another sample
    labels: Int[Tensor, "b t"]  # the token id if supervised, else IGNORE
    sample_index: Int[Tensor, "b t"]  # index into `samples`, -1 for padding
    num_images: Int[Tensor, " b"]  # tiles count as images
    layouts: list[list[tuple[int, ...]]]  # per row and image, the number of tiles in each row of tiles
    ids: list[str]  # of the samples
    samples: list[Sample]  # without images
    sources: tuple[str, ...] = ()  # of a mixture, the values of meta["source"]
    kept_patches: list[list[tuple[int, int]]] = field(default_factory=list)  # per row and image, of the VisualSpec
    # For each image, its index in `pixel_values`; None if these are one for each image. Then N is their number.
    image_index: Int[Tensor, " n"] | None = None
    # The key of each image of `pixel_values` in the feature cache; None where features are not cached.
    image_keys: tuple[bytes, ...] | None = None
    # For each image, the question that it comes with, for a connector that reads it; right-padded.
    instruction_ids: Int[Tensor, "n l"] | None = None
    instruction_mask: Bool[Tensor, "n l"] | None = None

    def of_each_image(self, features: Float[Tensor, "u p dv"]) -> Float[Tensor, "n p dv"]:
        """The features of each image, from those of `pixel_values`."""
        return features if self.image_index is None else features[self.image_index]

    @property
    def logits_mask(self) -> Bool[Tensor, "b t"]:
        """Positions whose logits are needed: those before a supervised token."""
        return torch.nn.functional.pad(self.labels[:, 1:] != IGNORE, (0, 1), value=False)

    @property
    def llm_mask(self) -> Bool[Tensor, "b t"] | None:
        """`attention_mask`; None for packed rows, whose samples the LLM separates by `position_ids` that restart."""
        return None if len(self.ids) > len(self.input_ids) else self.attention_mask

    @property
    def targets(self) -> Int[Tensor, " m"]:
        """The supervised tokens, in the order of the logits at `logits_mask`."""
        return self.labels[:, 1:][self.labels[:, 1:] != IGNORE]

    @property
    def num_shared_tokens(self) -> int:
        """How many tokens at the start of right-padded rows are the same in all, with the same images among them.

        They end before the first token whose logits are needed. 0 for a single row.
        """
        num = int(self.num_images[0])
        if len(self.input_ids) < 2 or self.image_index is None or not bool((self.num_images == num).all()):
            return 0
        images = self.image_index.view(len(self.input_ids), num)  # B n
        if not bool((images == images[:1]).all()):
            return 0
        if self.instruction_ids is not None and not bool(
            (self.instruction_ids == self.instruction_ids[:num].repeat(len(images), 1)).all()
        ):
            return 0
        same = (self.input_ids == self.input_ids[:1]) & self.attention_mask & ~self.logits_mask  # B T
        return int(same.all(0).long().cumprod(0).sum())

    def in_one_row(self) -> Batch:
        """The same samples one after the other in a single row, without padding."""
        real = self.attention_mask  # B T
        earlier = (self.num_images.cumsum(0) - self.num_images)[:, None]  # B 1, images of the rows before
        flat = {name: getattr(self, name)[real][None] for name in ("input_ids", "position_ids", "image_mask", "labels")}
        return replace(
            self,
            **flat,  # each 1 T
            attention_mask=real[real][None],
            images_before=(self.images_before + earlier)[real][None],
            images_hidden=(self.images_hidden + earlier)[real][None],
            sample_index=self.sample_index[real][None],
            num_images=self.num_images.sum(0, keepdim=True),
            layouts=[[layout for row in self.layouts for layout in row]],
            kept_patches=[[kept for row in self.kept_patches for kept in row]],
        )

    def to(self, device: torch.device) -> Batch:
        """The batch with every tensor on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in moved.items()})


@dataclass(frozen=True)
class LossOutput:
    """Named sums with counts, so that accumulated batches and several ranks add up exactly.

    The total is the sum of `sums[name] / counts[name]` over the names that end in `_loss`; other names are only logged.
    """

    sums: Mapping[str, Float[Tensor, ""]]
    counts: Mapping[str, int]


def is_loss(name: str) -> bool:
    """Whether a sum of this name is part of the total; `loss/<source>` never is."""
    return name.endswith("_loss") and not name.startswith("loss/")
