"""ViLBERT: a stream for the text and one for the image, which attend to each other (Lu et al., arXiv 1908.02265).

Axes: B pairs, T tokens, P cells, Dv encoder width, V vocabulary, M predicted positions; widths: W of the text, C of the
image, E of co-attention.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.connectors.bert_layers import NORM_EPS, Attention, FeedForward
from vlm.encoders.cell_classes import CellClasses
from vlm.models.base import Fused
from vlm.models.bert import Block, ClassHead, TextStream, WordHead, initialize
from vlm.models.pair_model import PairModel, boxes, check_heads
from vlm.ranges import Depth, Heads, Name, RatioBelowOne, Width


class DualStream(PairModel):
    """Two transformers joined by layers of co-attention.

        input_ids ──► text.embed ──► blocks ──► co-attention ──► block ──► … ──► words [B,T,W] ──► heads.words
                                                    ▲ ▼
        features ───► image.embed ────────────► co-attention ──► block ──► … ──► cells [B,P,C] ──► heads.classes

        first of words × first of cells ──► pair [B,E] ──► heads.match

    The text stream is a BERT. Its first blocks run alone; each of its others, and each block of the image, follows a
    layer of co-attention, in which the words attend to the cells and the cells to the words. The first position of the
    image is its mean.

    Args:
        encoder, classes: as in PairModel.
        init: weights of the text stream: those of a BERT, or random.
        init_from: folder or hub id of the BERT (safetensors), also of its tokenizer.
        package: a Python package that contains both; if it is installed, no network is needed.
        depth, width, num_heads: of the text stream.
        image_depth: blocks of the image stream, and layers of co-attention; at most `depth`.
        image_width, image_heads: of the image stream.
        image_feed_width: inner width of its feed-forward layers.
        co_width, co_heads: of co-attention; `co_width` is also that of the pair.
        dropout: of the embeddings, the attention weights, the output of each layer, and the pair.
    """

    parts = {  # noqa: RUF012
        "encoder": ("frozen",),
        "classes": ("frozen",),
        "text": ("frozen", "full", "last_n"),
        "image": ("frozen", "full"),
        "co_attention": ("frozen", "full"),
        "heads": ("frozen", "full"),
    }

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
        image_depth: Depth = 6,
        image_width: Width = 1024,
        image_heads: Heads = 8,
        image_feed_width: Width = 1024,
        co_width: Width = 1024,
        co_heads: Heads = 8,
        dropout: RatioBelowOne = 0.1,
    ) -> None:
        super().__init__(encoder=encoder, classes=classes)
        if image_depth > depth:
            raise ValueError(
                f"model.image_depth={image_depth} is more than model.depth={depth}, and each block of the image goes "
                f"with one of the text; set model.image_depth={depth} or less"
            )
        check_heads("width", width, "num_heads", num_heads)
        check_heads("image_width", image_width, "image_heads", image_heads)
        check_heads("co_width", co_width, "co_heads", co_heads)
        self.text = TextStream(width, depth=depth, num_heads=num_heads, dropout=dropout)
        self.image = ImageStream(
            image_width,
            vision_width=self.encoder.width,
            grid=self.encoder.grid,
            depth=image_depth,
            num_heads=image_heads,
            feed_width=image_feed_width,
            dropout=dropout,
        )
        self.co_attention = nn.ModuleList(
            CoAttention(
                width,
                image_width,
                inner_width=co_width,
                num_heads=co_heads,
                image_feed_width=image_feed_width,
                dropout=dropout,
            )
            for _ in range(image_depth)
        )
        self.heads = DualHeads(width, image_width, co_width, num_classes=classes.num_classes, dropout=dropout)
        for part in (self.text, self.image, self.co_attention, self.heads):
            initialize(part)
        self._start(self.text, init=init, init_from=init_from, package=package, num_heads=num_heads)

    def fuse(self, features: Float[Tensor, "b p dv"], ids: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Fused:
        words = self.text.embed(ids)  # B T W
        cells = self.image.embed(features)  # B 1+P C
        alone = len(self.text.blocks) - len(self.co_attention)
        for block in self.text.blocks[:alone]:
            words = block(words, mask)  # B T W
        joined = zip(self.co_attention, self.text.blocks[alone:], self.image.blocks, strict=True)
        for co_attention, text_block, image_block in joined:
            words, cells = co_attention(words, cells, mask)  # B T W, B 1+P C
            words, cells = text_block(words, mask), image_block(cells)  # B T W, B 1+P C
        return Fused(words=words, cells=cells[:, 1:], pair=self.heads.pool(words[:, 0], cells[:, 0]))

    def predict_words(self, states: Float[Tensor, "m w"]) -> Float[Tensor, "m v"]:
        return self.heads.words.predict(states, self.text.words.weight)  # M V

    def blocks(self, part: str) -> list[nn.Module]:
        if part == "encoder":
            return list(self.encoder.blocks())
        if part == "co_attention":
            return list(self.co_attention)
        return list(getattr(self, part).blocks) if part in ("text", "image") else []


class ImageStream(nn.Module):
    """The embeddings of an image's mean and cells, each with its box, and blocks."""

    locations: Tensor

    def __init__(
        self,
        width: int,
        *,
        vision_width: int,
        grid: tuple[int, int],
        depth: int,
        num_heads: int,
        feed_width: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.feature, self.location = nn.Linear(vision_width, width), nn.Linear(5, width)
        self.norm, self.dropout = nn.LayerNorm(width, eps=NORM_EPS), nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(width, num_heads=num_heads, dropout=dropout, feed_width=feed_width) for _ in range(depth)
        )
        corners = torch.cat([torch.tensor([[0.0, 0.0, 1.0, 1.0]]), boxes(grid)])  # 1+P 4, the whole image first
        sides = corners[:, 2:] - corners[:, :2]  # 1+P 2
        self.register_buffer("locations", torch.cat([corners, sides.prod(1, keepdim=True)], 1), persistent=False)

    def embed(self, features: Float[Tensor, "b p dv"]) -> Float[Tensor, "b s c"]:
        features = torch.cat([features.mean(1, keepdim=True), features], dim=1)  # B 1+P Dv
        return self.dropout(self.norm(self.feature(features) + self.location(self.locations)))  # B 1+P C


class CoAttention(nn.Module):
    """Each stream attends to the other one as it was before, then passes its own feed-forward layer."""

    def __init__(
        self,
        text_width: int,
        image_width: int,
        *,
        inner_width: int,
        num_heads: int,
        image_feed_width: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.text, self.image = (
            Attention(own, source_width=other, num_heads=num_heads, dropout=dropout, inner_width=inner_width)
            for own, other in ((text_width, image_width), (image_width, text_width))
        )
        self.text_feed = FeedForward(text_width, dropout=dropout)
        self.image_feed = FeedForward(image_width, dropout=dropout, inner_width=image_feed_width)

    def forward(
        self, words: Float[Tensor, "b t w"], cells: Float[Tensor, "b s c"], mask: Bool[Tensor, "b t"]
    ) -> tuple[Float[Tensor, "b t w"], Float[Tensor, "b s c"]]:
        seen_words = self.text(words, cells)  # B T W
        seen_cells = self.image(cells, words, mask=mask[:, None])  # B S C
        return self.text_feed(seen_words), self.image_feed(seen_cells)  # B T W, B S C


class DualHeads(nn.Module):
    """What is predicted: words, classes of cells, and whether text and image belong together."""

    def __init__(self, text_width: int, image_width: int, pair_width: int, *, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.words, self.classes = WordHead(text_width), ClassHead(image_width, num_classes)
        self.pool_text, self.pool_image = nn.Linear(text_width, pair_width), nn.Linear(image_width, pair_width)
        self.dropout, self.match = nn.Dropout(dropout), nn.Linear(pair_width, 2)

    def pool(self, text: Float[Tensor, "b w"], image: Float[Tensor, "b c"]) -> Float[Tensor, "b e"]:
        return self.dropout(F.relu(self.pool_text(text)) * F.relu(self.pool_image(image)))  # B E
