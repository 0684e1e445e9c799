"""Parts of BERT that models of pairs are made of (Devlin et al., arXiv 1810.04805).

Axes: B rows, T tokens, W width, V vocabulary, M positions of which words are predicted.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.connectors.bert_layers import NORM_EPS, Attention, FeedForward
from vlm.connectors.qformer_weights import TEXT_VOCABULARY

MAX_TEXT_LENGTH = 512


class Block(nn.Module):
    """A transformer layer with full attention; `mask` is False at padding."""

    def __init__(self, width: int, *, num_heads: int, dropout: float, feed_width: int | None = None) -> None:
        super().__init__()
        self.attention = Attention(width, source_width=width, num_heads=num_heads, dropout=dropout)
        self.feed = FeedForward(width, dropout=dropout, inner_width=feed_width)

    def forward(
        self, states: Float[Tensor, "b s w"], mask: Bool[Tensor, "b s"] | None = None
    ) -> Float[Tensor, "b s w"]:
        mask = None if mask is None else mask[:, None]  # B 1 S
        return self.feed(self.attention(states, states, mask=mask))  # B S W


class TextStream(nn.Module):
    """BERT's embeddings of words and positions, and its blocks; its tensors have the names of the Q-Former's."""

    def __init__(self, width: int, *, depth: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.words = nn.Embedding(TEXT_VOCABULARY, width)
        self.word_positions = nn.Embedding(MAX_TEXT_LENGTH, width)
        self.norm, self.dropout = nn.LayerNorm(width, eps=NORM_EPS), nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, num_heads=num_heads, dropout=dropout) for _ in range(depth))

    def embed(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t w"]:
        return self.dropout(self.norm(self.words(ids) + self.word_positions.weight[: ids.shape[1]]))  # B T W


class Transform(nn.Module):
    """The layer before a prediction: norm(gelu(linear))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.transform, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, states: Float[Tensor, "m w"]) -> Float[Tensor, "m w"]:
        return self.norm(F.gelu(self.transform(states)))  # M W


class WordHead(Transform):
    """Logits of words, with the word embeddings as the last matrix."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.word_bias = nn.Parameter(torch.zeros(TEXT_VOCABULARY))

    def predict(self, states: Float[Tensor, "m w"], words: Float[Tensor, "v w"]) -> Float[Tensor, "m v"]:
        return F.linear(self(states), words, self.word_bias)  # M V


class ClassHead(nn.Module):
    """Logits of the classes of a cell."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.hidden, self.classes = Transform(width), nn.Linear(width, num_classes)

    def forward(self, states: Float[Tensor, "m w"]) -> Float[Tensor, "m y"]:
        return self.classes(self.hidden(states))  # M Y


def initialize(module: nn.Module) -> None:
    """As BERT; layers that are added to one then change little of what it says at the start."""
    for each in module.modules():
        if isinstance(each, nn.Linear | nn.Embedding):
            nn.init.normal_(each.weight, std=0.02)
        if isinstance(each, nn.Linear):
            nn.init.zeros_(each.bias)
