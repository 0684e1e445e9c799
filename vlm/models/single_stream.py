"""UNITER: one transformer over the words of a text and the cells of its image (Chen et al., arXiv 1909.11740).

Axes: B pairs, T tokens, P cells, Dv encoder width, W width, V vocabulary, M predicted positions.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.connectors.bert_layers import NORM_EPS
from vlm.encoders.cell_classes import CellClasses
from vlm.models.base import Fused, PredictsFeatures
from vlm.models.bert import ClassHead, TextStream, Transform, WordHead, initialize
from vlm.models.pair_model import PairModel, boxes, check_heads
from vlm.ranges import Depth, Heads, Name, RatioBelowOne, Width


class SingleStream(PairModel, PredictsFeatures):
    """A BERT whose input is a text, then the cells of an image.

        input_ids ──► stream.embed ──┐
                                     ├──► stream.blocks ──► words [B,T,W], cells [B,P,W] ──► heads
        features ───► cells.embed ───┘

        first word ──► pair [B,W] ──► heads.match

    A cell is embedded as the norm of its feature plus that of its box, with an embedding of its own for the image. A
    masked cell's feature is a learned one.

    Args:
        encoder, classes: as in PairModel.
        init: weights of the transformer: those of a BERT, or random.
        init_from: folder or hub id of the BERT (safetensors), also of its tokenizer.
        package: a Python package that contains both; if it is installed, no network is needed.
        depth, width, num_heads: of the transformer.
        dropout: of the embeddings, the attention weights and the output of each layer.
    """

    parts = {  # noqa: RUF012
        "encoder": ("frozen",),
        "classes": ("frozen",),
        "stream": ("frozen", "full", "last_n"),
        "cells": ("frozen", "full"),
        "heads": ("frozen", "full"),
    }
    root_methods = (*PairModel.root_methods, "predict_features")

    def __init__(
        self,
        *,
        encoder: nn.Module,
        classes: CellClasses,
        init_from: Name,
        init: Literal["bert", "random"] = "bert",
        package: Name | None = None,
        depth: Depth = 12,
        width: Width = 768,
        num_heads: Heads = 12,
        dropout: RatioBelowOne = 0.1,
    ) -> None:
        super().__init__(encoder=encoder, classes=classes)
        check_heads("width", width, "num_heads", num_heads)
        self.stream = TextStream(width, depth=depth, num_heads=num_heads, dropout=dropout)
        self.cells = Cells(width, vision_width=self.encoder.width, grid=self.encoder.grid, dropout=dropout)
        self.heads = SingleHeads(width, vision_width=self.encoder.width, num_classes=classes.num_classes)
        for part in (self.stream, self.cells, self.heads):
            initialize(part)
        self._start(self.stream, init=init, init_from=init_from, package=package, num_heads=num_heads)

    def masked_features(
        self, pixel_values: Float[Tensor, "n 3 h w"], hidden: Bool[Tensor, "n p"] | None
    ) -> Float[Tensor, "n p dv"]:
        features = super().masked_features(pixel_values, hidden)  # N P Dv
        return features if hidden is None else features + hidden[..., None] * self.cells.masked  # N P Dv

    def fuse(self, features: Float[Tensor, "b p dv"], ids: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Fused:
        states = torch.cat([self.stream.embed(ids), self.cells.embed(features)], dim=1)  # B T+P W
        seen = F.pad(mask, (0, features.shape[1]), value=True)  # B T+P
        for block in self.stream.blocks:
            states = block(states, seen)  # B T+P W
        words, cells = states.split([ids.shape[1], features.shape[1]], dim=1)  # B T W, B P W
        pair = self.heads.pool(words[:, 0])  # B W
        return Fused(words=words, cells=cells, pair=pair + self._unused())

    def predict_words(self, states: Float[Tensor, "m w"]) -> Float[Tensor, "m v"]:
        return self.heads.words.predict(states, self.stream.words.weight)  # M V

    def predict_features(self, states: Float[Tensor, "m w"]) -> Float[Tensor, "m dv"]:
        return self.heads.features(states) @ self.cells.feature.weight + self.heads.feature_bias  # M Dv

    def _unused(self) -> Float[Tensor, ""]:
        """Zero that depends on all parameters that a step with a single task may not use, as DDP needs."""
        return 0 * torch.stack([each.sum() for each in (*self.heads.parameters(), self.cells.masked)]).sum()

    def blocks(self, part: str) -> list[nn.Module]:
        return list(self.stream.blocks) if part == "stream" else []


class Cells(nn.Module):
    """The embeddings of an image's cells: of their features and boxes."""

    locations: Tensor

    def __init__(self, width: int, *, vision_width: int, grid: tuple[int, int], dropout: float) -> None:
        super().__init__()
        self.masked = nn.Parameter(0.02 * torch.randn(vision_width))
        self.feature, self.location = nn.Linear(vision_width, width), nn.Linear(7, width)
        self.feature_norm, self.location_norm, self.norm = (nn.LayerNorm(width, eps=NORM_EPS) for _ in range(3))
        self.kind = nn.Parameter(0.02 * torch.randn(width))  # a cell, not a word
        self.dropout = nn.Dropout(dropout)
        corners = boxes(grid)  # P 4
        sides = corners[:, 2:] - corners[:, :2]  # P 2
        locations = torch.cat([corners, sides, sides.prod(1, keepdim=True)], 1)  # P 7
        self.register_buffer("locations", locations, persistent=False)

    def embed(self, features: Float[Tensor, "b p dv"]) -> Float[Tensor, "b p w"]:
        feature = self.feature_norm(self.feature(features))  # B P W
        location = self.location_norm(self.location(self.locations))  # P W
        return self.dropout(self.norm(feature + location + self.kind))  # B P W


class SingleHeads(nn.Module):
    """What is predicted: words, classes and features of cells, and whether text and image belong together.

    Features are predicted by the transposed matrix that embeds them.
    """

    def __init__(self, width: int, *, vision_width: int, num_classes: int) -> None:
        super().__init__()
        self.words, self.classes, self.features = WordHead(width), ClassHead(width, num_classes), Transform(width)
        self.feature_bias = nn.Parameter(torch.zeros(vision_width))
        self.pool_first, self.match = nn.Linear(width, width), nn.Linear(width, 2)

    def pool(self, first: Float[Tensor, "b w"]) -> Float[Tensor, "b w"]:
        return self.pool_first(first).tanh()  # B W
