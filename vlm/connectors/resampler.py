"""Perceiver resampler of Flamingo (Alayrac et al., arXiv 2204.14198).

Axes: N images, P patches per image, Dv encoder width, W width of the latents, K queries, H heads, C head_dim,
D LLM width.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.connectors.mlp import match_scale
from vlm.ranges import Depth, Heads, Range, Width

SHARPNESS = 1.5  # of the attention at the start; most of a query's attention is then on its patch
QUERY_NOISE = 0.3  # makes queries of the same patch differ
RESIDUAL_SCALE = 0.1  # of all residual branches after the first attention, at the start
QUERY_SCALE = 0.2  # makes the queries, which are the same for all images, smaller than the attended features


class PerceiverResampler(nn.Module):
    """features [N,P,Dv] -> latents [N,K,W], normalized; K does not depend on P.

        queries ──► latents ◄── attention to (features, latents) ◄─┐
                       └──────► + feed-forward ───────────────────►┘ `depth` times, then a norm

    Without `position` and at the encoder's width it is Idefics' resampler with larger initial weights.

    Parameters, with A = H·C (linear layers have no bias): K·W + depth·(4·W·A + 2·ff_mult·W² + 6·W) + 2·W, and 4·C per
    block for `qk_norm`, P·W for `position`, Dv·W for `width`.

    Args:
        vision_width: of the features.
        num_patches: patches per image (P).
        num_queries: number of latents (K).
        depth: number of blocks.
        num_heads, head_dim: of the attention; their product may differ from the width.
        ff_mult: hidden width of the feed-forward layer divided by `width`.
        width: of the latents; None is the encoder's. Another width adds a linear projection before the blocks.
        qk_norm: layer norm on each head's queries and keys.
        gelu: GELU in place of ReLU.
        position: add a learned position embedding per patch to the keys, not to the values, as in DETR (arXiv
            2005.12872): the features of a ConvNet hold little of the position. The features get a norm without
            parameters first, and each query starts with attention to one patch.
    """

    def __init__(
        self,
        *,
        vision_width: int,
        num_patches: int,
        num_queries: int,
        depth: int,
        num_heads: int,
        head_dim: int,
        ff_mult: int = 4,
        width: int | None = None,
        qk_norm: bool = False,
        gelu: bool = False,
        position: bool = True,
    ) -> None:
        super().__init__()
        for name, number in (("num_queries", num_queries), ("depth", depth)):
            if number < 1:
                raise ValueError(f"connector.{name}={number} must be at least 1")
        self.width = vision_width if width is None else width
        self.queries = nn.Parameter(torch.randn(num_queries, self.width))
        self.widen = nn.Identity() if width is None else nn.Linear(vision_width, width, bias=False)
        self.position = nn.Parameter(torch.randn(num_patches, self.width)) if position else None
        sizes = {"num_heads": num_heads, "head_dim": head_dim, "ff_mult": ff_mult}
        blocks = [ResamplerBlock(width=self.width, qk_norm=qk_norm, gelu=gelu, **sizes) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(self.width)
        if self.position is not None:
            _init_local_attention(self.queries, self.position, blocks)

    def forward(self, features: Float[Tensor, "n p dv"]) -> Float[Tensor, "n k w"]:
        features = self.widen(features.to(self.queries.dtype))  # N P W
        if self.position is not None:
            features = F.layer_norm(features, (self.width,))  # N P W
        latents = self.queries.expand(len(features), -1, -1)  # N K W
        for block in self.blocks:
            latents = block(features, latents, self.position)  # N K W
        return self.norm(latents)  # N K W


class ResamplerBlock(nn.Module):
    """The latents attend to the features and to each other; then a feed-forward layer; both with a residual."""

    def __init__(
        self, *, width: int, num_heads: int, head_dim: int, ff_mult: int, qk_norm: bool, gelu: bool = False
    ) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads, self.activation = num_heads, F.gelu if gelu else F.relu
        self.features_norm = nn.LayerNorm(width)
        self.latents_norm = nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.q_norm, self.k_norm = (nn.LayerNorm(head_dim) if qk_norm else nn.Identity() for _ in range(2))
        self.out = nn.Linear(inner, width, bias=False)
        self.ff_norm = nn.LayerNorm(width)
        self.ff_in = nn.Linear(width, ff_mult * width, bias=False)
        self.ff_out = nn.Linear(ff_mult * width, width, bias=False)
        for layer in (self.q, self.k, self.v, self.out, self.ff_in):
            match_scale([layer], 1.0)  # PyTorch's default is √3 smaller, too small for the image to matter
        nn.init.normal_(self.ff_out.weight, std=math.sqrt(2 / self.ff_out.in_features))  # E[relu(z)²] = ½

    def forward(
        self,
        features: Float[Tensor, "n p w"],
        latents: Float[Tensor, "n k w"],
        position: Float[Tensor, "p w"] | None = None,
    ) -> Float[Tensor, "n k w"]:
        normed = self.latents_norm(latents)  # N K W
        values = torch.cat([self.features_norm(features), normed], dim=1)  # N P+K W
        keys = values if position is None else torch.cat([self.features_norm(features + position), normed], dim=1)
        q = self.q_norm(self._heads(self.q(normed)))  # N H K C
        k = self.k_norm(self._heads(self.k(keys)))  # N H P+K C
        attended = F.scaled_dot_product_attention(q, k, self._heads(self.v(values)))  # N H K C
        latents = latents + self.out(attended.transpose(1, 2).flatten(2))  # N K W
        return latents + self.ff_out(self.activation(self.ff_in(self.ff_norm(latents))))  # N K W

    def _heads(self, vectors: Float[Tensor, "n s a"]) -> Float[Tensor, "n h s c"]:
        return vectors.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


@torch.no_grad()
def _init_local_attention(queries: nn.Parameter, position: nn.Parameter, blocks: list[ResamplerBlock]) -> None:
    """Let each query start with attention to a different patch; random weights would attend to all patches equally.

    A query starts as its patch's position embedding, and the query projection as the key projection, so their logit is
    high. The channels of both are rolled by one; otherwise a query, which is also a key, would attend to itself. All
    branches after the first attention start small.
    """
    patches = torch.linspace(0, len(position) - 1, len(queries), device=position.device).round().long()
    queries.mul_(QUERY_NOISE).add_(position[patches].roll(1, dims=1)).mul_(QUERY_SCALE)
    for block in blocks:
        block.q.weight.copy_(block.k.weight.roll(1, dims=1) * SHARPNESS)
        block.ff_out.weight.mul_(RESIDUAL_SCALE)
        if block is not blocks[0]:
            block.out.weight.mul_(RESIDUAL_SCALE)


class Resampler(nn.Module):
    """features [N,P,Dv] -> visual [N,K,D]: a Perceiver resampler and a linear projection to the LLM's width.

    The visual tokens start with the root mean square of the LLM's input embeddings.

    Parameters: PerceiverResampler's, and W·D + D for the projection. Arguments as in PerceiverResampler; the builder
    passes vision_width, llm_width, grid and output_rms.
    """

    fusion: ClassVar[str] = "tokens"

    def __init__(
        self,
        *,
        vision_width: int,
        llm_width: int,
        grid: tuple[int, int],
        output_rms: float,
        num_queries: Width = 64,
        depth: Depth = 2,
        num_heads: Heads = 8,
        head_dim: Width = 64,
        ff_mult: Annotated[int, Range(1, 64)] = 4,
        width: Width | None = None,
        qk_norm: bool = False,
        position: bool = True,
    ) -> None:
        super().__init__()
        self.num_tokens = num_queries
        self.resampler = PerceiverResampler(
            vision_width=vision_width,
            num_patches=grid[0] * grid[1],
            num_queries=num_queries,
            depth=depth,
            num_heads=num_heads,
            head_dim=head_dim,
            ff_mult=ff_mult,
            width=width,
            qk_norm=qk_norm,
            position=position,
        )
        self.project = nn.Linear(self.resampler.width, llm_width)
        match_scale([self.project], output_rms)

    def forward(self, features: Float[Tensor, "n p dv"]) -> Float[Tensor, "n k d"]:
        return self.project(self.resampler(features))  # N K D
