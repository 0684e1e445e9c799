"""Convolutional blocks before and after average pooling: Honeybee's C-Abstractor (Cha et al., arXiv 2312.06742).

Axes: N images, P patches per image, Dv encoder width, W width of the blocks, K visual tokens, D LLM width; R×R patches,
Q×Q tokens.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from jaxtyping import Float
from timm.layers import LayerNorm2d
from timm.models.regnet import RegStage
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.connectors.mlp import MLP
from vlm.ranges import Depth, Width

RESIDUAL_SCALE = 0.1  # of the residual branches at the start


class CAbstractor(nn.Module):
    """features [N,P,Dv] -> visual [N,K,D], with the locality of convolutions for any number of tokens.

        features + position ──► blocks ──► average pooling R×R → Q×Q ──► blocks ──► MLP ──► visual

    A block is RegNet's bottleneck (arXiv 2003.13678): 1×1, depthwise 3×3, squeeze and excitation, 1×1, each with a
    layer norm over the channels, and SiLU, as in the MLP. With `norm` the visual tokens start with the root mean square
    of the LLM's input embeddings, and blocks start close to the identity (as in Goyal et al., arXiv 1706.02677): six
    random blocks would keep half as much of the image. Without `norm` it is Honeybee's.

    Parameters: block(Dv) + (2·depth - 1)·block(W) + MLP(W → D) + P·Dv for position embeddings, 2·Dv + 2·W for norms,
    where block(I) = I·W + W² + 16·W + s·(2·W + 1), s = I/4 rounded, plus I·W + 2·W if I ≠ W; the MLP has
    W·D + (mlp_depth - 1)·D² + mlp_depth·D.

    Args:
        vision_width, llm_width, grid, output_rms: of the encoder and the LLM; the builder passes them.
        num_queries: visual tokens per image (K), a square number; None halves the grid's side, rounded up.
        hidden_width: width of the blocks (W).
        depth: number of blocks before the pooling, and also after it.
        mlp_depth: number of linear layers of the MLP.
        norm: layer norm on the features, and before the MLP.
        position: add a learned position embedding per patch, zero at the start.
    """

    fusion: ClassVar[str] = "tokens"

    def __init__(
        self,
        *,
        vision_width: int,
        llm_width: int,
        grid: tuple[int, int],
        output_rms: float,
        num_queries: Width | None = None,
        hidden_width: Width = 1024,
        depth: Depth = 3,
        mlp_depth: Depth = 2,
        norm: bool = True,
        position: bool = True,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"connector.depth={depth} must be at least 1")
        self.side = _side(grid, num_queries)
        self.grid, self.num_tokens = grid, self.side**2
        self.norm = nn.LayerNorm(vision_width) if norm else nn.Identity()
        self.position = nn.Parameter(torch.zeros(grid[0] * grid[1], vision_width)) if position else None
        self.before, self.after = (
            RegStage(depth, width, hidden_width, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d)
            for width in (vision_width, hidden_width)
        )
        if norm:
            for block in (*self.before.children(), *self.after.children()):
                nn.init.constant_(block.get_submodule("conv3.bn").weight, RESIDUAL_SCALE)  # type: ignore[arg-type]
        self.mlp = MLP(
            vision_width=hidden_width,
            llm_width=llm_width,
            grid=(self.side, self.side),
            output_rms=output_rms,
            depth=mlp_depth,
            activation="silu",
            norm=norm,
            position=False,
        )

    def forward(self, features: Float[Tensor, "n p dv"]) -> Float[Tensor, "n k d"]:
        features = self.norm(features.to(next(self.parameters()).dtype))  # N P Dv
        if self.position is not None:
            features = features + self.position  # N P Dv
        maps = self.before(features.transpose(1, 2).unflatten(2, self.grid))  # N W R R
        maps = self.after(F.adaptive_avg_pool2d(maps, self.side))  # N W Q Q
        return self.mlp(maps.flatten(2).transpose(1, 2))  # N K D


def _side(grid: tuple[int, int], num_queries: int | None) -> int:
    """Side of the square of tokens. Raises ValueError if `grid` or `num_queries` is not square, or K exceeds P."""
    if grid[0] != grid[1]:
        raise ValueError(
            f"connector=c_abstractor needs a square grid, but the encoder's is {grid[0]}×{grid[1]}; "
            "set encoder.image_size to a square or choose connector=average_pool"
        )
    if num_queries is None:
        return (grid[0] + 1) // 2
    side = math.isqrt(max(num_queries, 0))
    if side**2 != num_queries or not 1 <= side <= grid[0]:
        near = min(max(side, 1), grid[0]) ** 2
        raise ValueError(
            f"connector.num_queries={num_queries} must be a square number from 1 to {grid[0] * grid[1]}, the number "
            f"of patches; set it for example to {near}"
        )
    return side
