"""Flamingo's connector with the sizes and details of OpenFlamingo (Awadalla et al., arXiv 2308.01390).

Axes: N images, P patches per image, Dv encoder width, K visual tokens per image, D LLM width, B rows, H heads,
W head_dim, L queries of a row, S visual tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.connectors.cross_attention import AttendedLayers, AttendingBlock
from vlm.connectors.resampler import PerceiverResampler
from vlm.ranges import Depth, Heads, Name, Range, Width


class Flamingo(AttendedLayers):
    """features [N,P,Dv] -> visual [N,K,Dv], to which gated blocks before the LLM's layers attend.

        features ── resampler ──► visual ────────────────────┐
                                                             ▼
        embeds ──► layers 0, …, `every` - 2 ──► block ──► layer `every` - 1 ──► … ──► logits

    It differs from `CrossAttention` in this: a block runs before layers `every` - 1, 2·`every` - 1, …; one gate per
    layer, not per channel, at the learning rate of the rest; GELU; visual tokens of the encoder's width, with no
    position; a token without an image before it passes the feed-forward layer all the same; PyTorch's first weights.

    Parameters: the resampler's, and for each block 2·D·H·W + 2·Dv·H·W for attention, 2·ff_mult·D² for the feed-forward
    layer, 4·D for the norms and 2 for the gates.

    Args:
        vision_width, llm_width, grid, output_rms: of the encoder and the LLM; the builder passes them.
        every: distance between blocks, in layers of the LLM.
        image_token: a special token of the LLM at the place of each image, such as one of `llm.added_tokens`.
        num_queries, depth: visual tokens per image and number of blocks of the resampler.
        num_heads, head_dim, ff_mult: of attention and feed-forward in all blocks, also in the resampler's.
    """

    all_previous_images = False

    def __init__(
        self,
        *,
        vision_width: int,
        llm_width: int,
        grid: tuple[int, int],
        output_rms: float,
        every: Depth = 1,
        image_token: Name | None = None,
        num_queries: Width = 64,
        depth: Depth = 6,
        num_heads: Heads = 8,
        head_dim: Width = 64,
        ff_mult: Annotated[int, Range(1, 64)] = 4,
    ) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"num_heads": num_heads, "head_dim": head_dim, "ff_mult": ff_mult}
        self.resampler = PerceiverResampler(
            vision_width=vision_width,
            num_patches=grid[0] * grid[1],
            num_queries=num_queries,
            depth=depth,
            gelu=True,
            position=False,
            **sizes,
        )
        for module in self.resampler.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        self.num_tokens, self.image_token = num_queries, image_token
        self.every = every
        self.blocks = nn.ModuleList()  # filled by `attach`
        self.make_block = partial(FlamingoBlock, width=llm_width, visual_width=vision_width, **sizes)

    def attended(self, layers: Sequence[nn.Module]) -> Sequence[nn.Module]:
        return layers[self.every - 1 :: self.every]

    def forward(self, features: Float[Tensor, "n p dv"]) -> Float[Tensor, "n k dv"]:
        return self.resampler(features)  # N K Dv


class FlamingoBlock(AttendingBlock):
    """Attention to the visual tokens, then a feed-forward layer, each added through one tanh gate that starts at 0."""

    def __init__(self, *, width: int, visual_width: int, num_heads: int, head_dim: int, ff_mult: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * head_dim
        self.attention_norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, inner, bias=False)
        self.k = nn.Linear(visual_width, inner, bias=False)
        self.v = nn.Linear(visual_width, inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.ff_norm = nn.LayerNorm(width)
        self.ff_in = nn.Linear(width, ff_mult * width, bias=False)
        self.ff_out = nn.Linear(ff_mult * width, width, bias=False)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        hidden: Float[Tensor, "b l d"],
        keys: Float[Tensor, "b h s w"],
        values: Float[Tensor, "b h s w"],
        visible: Bool[Tensor, "b l s"],
    ) -> Float[Tensor, "b l d"]:
        attended = self.attended(hidden, keys, values, visible)  # B L H·W
        hidden = hidden + self.attention_gate.tanh() * self.out(attended)  # B L D
        return hidden + self.ff_gate.tanh() * self.ff_out(F.gelu(self.ff_in(self.ff_norm(hidden))))  # B L D
