"""BERT's two sublayers, with the norm after the sum (Devlin et al., arXiv 1810.04805).

Axes: N rows, S positions of the states, R positions of the source, W width of the states.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-12  # BERT's


class Attention(nn.Module):
    """states = norm(states + attention(states, source)), with the source's own width and an inner width.

    `position` [R,·] is added to the source for the keys only. `mask` [N,S,R] or [N,1,R] is True where a position of the
    states may attend to one of the source.
    """

    def __init__(
        self, width: int, *, source_width: int, num_heads: int, dropout: float, inner_width: int | None = None
    ) -> None:
        super().__init__()
        inner_width = inner_width or width
        self.num_heads, self.dropout = num_heads, nn.Dropout(dropout)
        self.query = nn.Linear(width, inner_width)
        self.key = nn.Linear(source_width, inner_width)
        self.value = nn.Linear(source_width, inner_width)
        self.out = nn.Linear(inner_width, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(
        self, states: Tensor, source: Tensor, position: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        located = source if position is None else source + position
        query, key, value = (
            each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # N heads · inner/heads
            for each in (self.query(states), self.key(located), self.value(source))
        )
        mask = None if mask is None else mask[:, None]  # N 1 S R
        dropout = self.dropout.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self.norm(states + self.dropout(self.out(attended.transpose(1, 2).flatten(2))))  # N S W


class FeedForward(nn.Module):
    """states = norm(states + down(gelu(up(states)))); the inner width is 4·W unless it is given."""

    def __init__(self, width: int, *, dropout: float, inner_width: int | None = None) -> None:
        super().__init__()
        inner_width = inner_width or 4 * width
        self.up = nn.Linear(width, inner_width)
        self.down = nn.Linear(inner_width, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor) -> Tensor:
        return self.norm(states + self.dropout(self.down(F.gelu(self.up(states)))))  # N S W
