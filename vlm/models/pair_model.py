"""Models that read an image and a text together: an encoder's grid cells take the place of detected regions.

Axes: B pairs, T tokens, P cells, Dv encoder width, Y classes, M predicted positions; W, C and E widths of the model.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.connectors.bert_tokenizer import load_tokenizer
from vlm.connectors.qformer_weights import start_from_bert, start_head_from_bert
from vlm.encoders.cell_classes import CellClasses, check_classes
from vlm.hub import download_checkpoint, local_checkpoint
from vlm.identity import identity as identity_of
from vlm.llms.bytes import byte_tokenizer
from vlm.models.base import Fused, FusesPairs, MatchesPairs, Model
from vlm.models.bert import MAX_TEXT_LENGTH
from vlm.models.composed import (
    OF_ENCODER,
    RANDOM_WEIGHTS_SEED,
    check_contract,
    identity_of_encoder,
    split_tiles,
)
from vlm.options import bind, find_class
from vlm.schema import Batch, VisualSpec


class PairModel(Model, FusesPairs, MatchesPairs):
    """What the models of pairs share: features of (masked) images, the classes of their cells, and BERT's tokenizer.

        pixel_values ── blank the masked cells ── encoder ── norm ── zero the masked cells ──► features [B,P,Dv]
        pixel_values ── classes ──► logits [B,P,Y], the targets of masked cells

    The pixels of a masked cell are blank before the encoder sees them, because a ConvNet's features of a cell also hold
    its neighbors. A subclass has `heads` and defines `fuse`; it calls `_start` at the end of its constructor.

    Attributes:
        classes: frozen; the classifier that belongs to the encoder.
        num_cells: cells of an image (P).
    """

    pretrained = ("encoder",)
    root_methods: ClassVar[tuple[str, ...]] = (
        *("features", "masked_features", "cell_classes", "fuse"),
        *("match", "match_pair", "predict_words", "predict_classes"),
    )
    chat_template = "plain"  # pairs have none
    num_positions = MAX_TEXT_LENGTH

    encoder: Any
    classes: CellClasses
    heads: Any

    def __init__(self, *, encoder: nn.Module, classes: CellClasses) -> None:
        super().__init__()
        self.encoder, self.classes = encoder, classes
        rows, columns = self.encoder.grid
        self.num_cells: int = rows * columns
        blank = torch.zeros(1, 3, *self.encoder.image_size, device=next(classes.parameters()).device)
        with torch.no_grad():
            num_classified = classes(blank).shape[1]
        if num_classified != self.num_cells:
            raise ValueError(
                f"the encoder has {rows}×{columns} = {self.num_cells} cells, but its classifier {num_classified}; "
                "set encoder.layer=-1, or a list that ends with -1"
            )

    def features(self, batch: Batch) -> Float[Tensor, "n p dv"]:
        return self.masked_features(batch.pixel_values, None)  # N P Dv

    def masked_features(
        self, pixel_values: Float[Tensor, "n 3 h w"], hidden: Bool[Tensor, "n p"] | None
    ) -> Float[Tensor, "n p dv"]:
        if hidden is None:
            features = self.encoder(pixel_values)  # N P Dv
            return F.layer_norm(features, features.shape[-1:])  # N P Dv
        features = self.encoder(blank_cells(pixel_values, hidden, self.encoder.grid))  # N P Dv
        features = F.layer_norm(features, features.shape[-1:])  # N P Dv
        return features.masked_fill(hidden[..., None], 0)  # N P Dv

    def cell_classes(self, pixel_values: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n p y"]:
        return self.classes(pixel_values)  # N P Y

    @abstractmethod
    def fuse(self, features: Float[Tensor, "b p dv"], ids: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Fused: ...

    def match(
        self, features: Float[Tensor, "b p dv"], ids: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"]
    ) -> Float[Tensor, "b 2"]:
        # Log-probabilities, because that of "yes" orders pairs: the logits are learned up to a constant.
        return self.match_pair(self.fuse(features, ids, mask).pair).float().log_softmax(1)  # B 2

    def match_pair(self, pair: Float[Tensor, "b e"]) -> Float[Tensor, "b 2"]:
        return self.heads.match(pair)  # B 2

    def predict_classes(self, states: Float[Tensor, "m c"]) -> Float[Tensor, "m y"]:
        return self.heads.classes(states)  # M Y

    def _start(
        self, text: nn.Module, *, init: Literal["bert", "random"], init_from: str, package: str | None, num_heads: int
    ) -> None:
        """Load the tokenizer and, with `init=bert`, the weights of `text` and of the head that predicts words."""
        self.check_parts()
        if next(text.parameters()).is_meta:  # plan=true
            self.tokenizer = byte_tokenizer()
            return
        self.tokenizer = load_tokenizer(init_from, package, option="model.init_from")
        if init == "bert":
            option = "model.init_from"
            folder = local_checkpoint(init_from, package) or download_checkpoint(init_from, package, option=option)
            start_from_bert(text.state_dict(), folder, num_heads=num_heads, part="model")
            start_head_from_bert(self.heads.words.state_dict(), folder)

    @property
    def num_visual_tokens(self) -> int:
        return self.num_cells

    def visual_spec(self) -> VisualSpec:
        return VisualSpec(num_tokens=0, image_size=self.encoder.image_size, transform=self.encoder.transform)

    def check_rows(self, *, max_length: int, packing: bool) -> None:
        super().check_rows(max_length=max_length, packing=packing)
        if max_length > MAX_TEXT_LENGTH:
            raise ValueError(
                f"data.max_length={max_length} is more than the {MAX_TEXT_LENGTH} tokens that BERT's positions take; "
                f"set data.max_length={MAX_TEXT_LENGTH} or less"
            )

    @classmethod
    def groups(cls, cfg: Mapping[str, Any]) -> list[str]:
        return cls.required(["encoder"], cfg)

    @classmethod
    def check(cls, cfg: Mapping[str, Any]) -> None:
        options, tiles = split_tiles(cfg["encoder"])
        bind("encoder", options)
        if tiles.grids:
            raise ValueError(
                f"{cls.__name__} takes an image as a whole, but encoder.tiles.grids={tiles.grids}; set it to []"
            )
        if options.get("keep_tokens"):
            raise ValueError(f"{cls.__name__} takes the cells of an image alone; set encoder.keep_tokens=false")
        check_classes(options, find_class("encoder", options.get("_target_")))
        bind("model", cfg["model"], derived=dict.fromkeys(("encoder", "classes")))

    @classmethod
    def build(cls, cfg: Mapping[str, Any], *, bf16: bool) -> Model:
        """As `Model.build`; the classifier of the cells belongs to the encoder."""
        options = split_tiles(cfg["encoder"])[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_WEIGHTS_SEED)
            encoder: Any = bind("encoder", options)().requires_grad_(False)
            classes = CellClasses.of(options).requires_grad_(False)
        check_contract("encoder", encoder, OF_ENCODER)
        torch.manual_seed(cfg["seed"])
        model: Model = bind("model", cfg["model"], {"encoder": encoder, "classes": classes})()
        return model

    def identity(self, cfg: Mapping[str, Any]) -> dict[str, Any]:
        """As `Model.identity`, with the layer and transform of the encoder, and its classifier."""
        identity = super().identity(cfg)
        identity["parts"]["encoder"] = identity_of_encoder(self.encoder, cfg["encoder"])
        identity["bases"]["classes"] = identity_of(self.classes, cfg["encoder"])
        return identity

    def use_local_tokenizer(self, cfg: Mapping[str, Any]) -> str:
        options = cfg["model"]
        if local_checkpoint(options["init_from"], options.get("package")) is None:
            return "a byte tokenizer"
        self.load_tokenizer(cfg)
        return "the tokenizer of its BERT"

    def load_tokenizer(self, cfg: Mapping[str, Any]) -> None:
        options = cfg["model"]
        self.tokenizer = load_tokenizer(options["init_from"], options.get("package"), option="model.init_from")


def blank_cells(
    pixel_values: Float[Tensor, "n 3 h w"], hidden: Bool[Tensor, "n p"], grid: tuple[int, int]
) -> Float[Tensor, "n 3 h w"]:
    """The images with zeros, the mean color, in the hidden cells of a grid."""
    size = pixel_values.shape[-2:]
    cells = hidden.view(-1, 1, *grid).to(pixel_values.dtype)  # N 1 R S
    return pixel_values.masked_fill(F.interpolate(cells, size=size, mode="nearest").bool(), 0)  # N 3 H W


def boxes(grid: tuple[int, int]) -> Float[Tensor, "p 4"]:
    """x1, y1, x2, y2 of each cell of a grid, as fractions of the image's sides."""
    rows, columns = grid
    y, x = torch.meshgrid(torch.arange(rows) / rows, torch.arange(columns) / columns, indexing="ij")
    corners = torch.stack([x, y, x + 1 / columns, y + 1 / rows], dim=-1)  # R S 4
    return corners.flatten(0, 1)  # P 4


def check_heads(option: str, width: int, heads_option: str, num_heads: int) -> None:
    """Raise ValueError unless the width is a multiple of the number of heads."""
    if width % num_heads:
        raise ValueError(
            f"model.{option}={width} must be a multiple of model.{heads_option}={num_heads}; "
            f"try model.{option}={width // num_heads * num_heads or num_heads}"
        )
