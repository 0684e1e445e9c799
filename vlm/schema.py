"""The words that the parts share: what a source yields, what a batch holds, what an objective returns.

Axes, everywhere in this project:

    B  rows in a batch          N  images in a batch (a tile counts as an image)   P  patches per image
    T  tokens per row           K  visual tokens per image                          V  vocabulary
    D  LLM width                Dv encoder width                                    M  supervised positions in a batch
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Literal, NamedTuple, NotRequired, Protocol, TypedDict, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

IGNORE = -100  # label of a position that is not supervised; PyTorch's cross-entropy default

Split = Literal["train", "val"]
# What a row of text holds: a whole conversation, whose answers are supervised, or what comes before its last answer.
Form = Literal["conversation", "prompt"]


class Content(TypedDict):
    """One piece of a message: some text, or the place of the sample's next image."""

    type: Literal["text", "image"]
    text: NotRequired[str]


class Message(TypedDict):
    """One turn, in the chat form that Transformers' templates take.

    An assistant's turn whose `supervised` is False is read and never learned.
    """

    role: Literal["system", "user", "assistant"]
    content: list[Content]
    supervised: NotRequired[bool]  # True where it is absent


@dataclass(frozen=True)
class Sample:
    """What every source yields: a conversation and the images it speaks of, in order of their placeholders.

    Images are RGB with 8 bits a channel; `vlm.data.judge` refuses others where a sample is taken.
    `id` is stable over runs and names the sample in every error; `meta` is what a scorer needs (e.g. `question_type`).
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
        """Images that the messages speak of, whether they are at hand or not."""
        return sum(item["type"] == "image" for message in self.messages for item in message["content"])


BadKind = Literal["unreadable_image", "placeholder_mismatch", "empty_text", "too_long", "other_defect"]
BAD_KINDS: tuple[BadKind, ...] = get_args(BadKind)


class BadSample(ValueError):
    """A sample that cannot be used; the message names the sample, what is wrong and the remedy, `kind` what it is."""

    def __init__(self, message: str, kind: BadKind = "other_defect") -> None:
        super().__init__(message)
        self.kind = kind


class StoredImage(NamedTuple):
    """Where an image lies. Both functions raise `OSError` or `BadSample` where it cannot be read."""

    name: str
    size: Callable[[], int]  # bytes
    read: Callable[[int, int], bytes]  # from a start, as many


@runtime_checkable
class Source(Protocol):
    """One split of a dataset. `source[i]` raises `BadSample` where sample i cannot be read.

    A source that can tell a sample's text without opening its images has `outline(index) -> Sample`, whose `images` are
    empty; one that does not read each sample once an epoch has `order(epoch, *, seed) -> Sequence[int]`, the indices of
    that epoch in the order to read them; one that passes over some of the data has `left_out: dict[str, int]`, how many
    of what; one whose images lie in files has `stored_images(indices) -> Iterator[StoredImage]`, those of these samples
    (None: of all), each once. None of them is required.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class VisualSpec:
    """All that data has to know about how the model takes images.

    `num_tokens` is the number of placeholders that one image, or tile of one, takes in a row of text: K where the
    visual tokens enter the LLM's input, 0 where the LLM's layers attend to them.

    Where the encoder tiles, `tile_rows` tells how many tiles stand in each row for an image of some width and height.
    It decides by the size alone, so that the length of a row of text is known before any pixel is read.
    """

    num_tokens: int
    image_size: tuple[int, int]  # height, width in pixels
    transform: Callable[[Image.Image], Tensor]  # one PIL image -> [3, H, W], or [tiles, 3, H, W]; deterministic
    tile_rows: Callable[[tuple[int, int]], list[int]] | None = None
    max_tiles: int = 1  # of an image
    row_separator: str = ""  # text between the rows of tiles


@dataclass(frozen=True)
class Batch:
    """Rows of text with their images. Images lie in the order of their rows, then of their placeholders.

    A row is one sample, or several side by side ("packed"), none of which may see another.
    """

    pixel_values: Float[Tensor, "n 3 h w"]
    input_ids: Int[Tensor, "b t"]
    attention_mask: Bool[Tensor, "b t"]
    position_ids: Int[Tensor, "b t"]  # in the token's own sample
    image_mask: Bool[Tensor, "b t"]  # True where visual tokens go
    images_before: Int[Tensor, "b t"]  # how many of the row's images start before this token
    images_hidden: Int[Tensor, "b t"]  # how many of those are another sample's
    labels: Int[Tensor, "b t"]  # the token itself where it is supervised, else IGNORE
    sample_index: Int[Tensor, "b t"]  # which of `samples` the token belongs to, -1 for padding
    num_images: Int[Tensor, " b"]  # tiles, where images are tiled
    layouts: list[list[tuple[int, ...]]]  # of each row's images, how many tiles stand in each row of tiles
    ids: list[str]  # of the samples
    samples: list[Sample]  # without their pictures
    sources: tuple[str, ...] = ()  # what samples' meta["source"] can be, in a mixture

    @property
    def logits_mask(self) -> Bool[Tensor, "b t"]:
        """Positions whose logits are needed: those before a supervised token."""
        return torch.nn.functional.pad(self.labels[:, 1:] != IGNORE, (0, 1), value=False)

    @property
    def llm_mask(self) -> Bool[Tensor, "b t"] | None:
        """`attention_mask`; None for packed rows, whose samples an LLM tells apart by positions that begin anew."""
        return None if len(self.ids) > len(self.input_ids) else self.attention_mask

    @property
    def targets(self) -> Int[Tensor, " m"]:
        """The supervised tokens, in the order of the logits at `logits_mask`."""
        return self.labels[:, 1:][self.labels[:, 1:] != IGNORE]

    def to(self, device: torch.device) -> Batch:
        """The batch with every tensor on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in moved.items()})


@dataclass(frozen=True)
class LossOutput:
    """Named sums and what each was summed over, so that accumulated batches and several ranks add up exactly.

    The total is the sum of `sums[name] / counts[name]` over the names that end in `_loss`; other names are only logged.
    """

    sums: Mapping[str, Float[Tensor, ""]]
    counts: Mapping[str, int]


def is_loss(name: str) -> bool:
    """Whether a sum of that name is part of the total; `loss/<source>` is not, whatever the source is called."""
    return name.endswith("_loss") and not name.startswith("loss/")
