"""Average pooling of the patches, then an MLP projector: the baseline of DeCo (Yao et al., arXiv 2405.20985).

Axes: N images, P patches per image, Dv encoder width, K visual tokens, D LLM width; R rows and S columns of patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vlm.connectors.mlp import MLP
from vlm.ranges import Depth, Grid, Width


class AveragePool(MLP):
    """features [N,P,Dv] -> visual [N,K,D]: average pooling to a smaller grid, then an MLP per token.

    Parameters: MLP's with K for P, so at depth 2 and hidden width D: Dv·D + D² + 2·D, and 2·Dv for the norm, K·D for
    the position embeddings. Arguments as in MLP, and:

    Args:
        output_grid: rows and columns of the pooled grid (K is their product); None halves both, rounded up.
    """

    def __init__(
        self,
        *,
        vision_width: int,
        llm_width: int,
        grid: tuple[int, int],
        output_rms: float,
        output_grid: Grid | None = None,
        depth: Depth = 2,
        hidden_width: Width | None = None,
        activation: Literal["gelu", "relu", "silu"] = "gelu",
        norm: bool = True,
        position: bool = True,
    ) -> None:
        rows, cols = smaller_grid(grid, output_grid)
        super().__init__(
            vision_width=vision_width,
            llm_width=llm_width,
            grid=(rows, cols),
            output_rms=output_rms,
            depth=depth,
            hidden_width=hidden_width,
            activation=activation,
            norm=norm,
            position=position,
        )
        self.grid, self.output_grid = grid, (rows, cols)

    def forward(self, features: Float[Tensor, "n p dv"]) -> Float[Tensor, "n k d"]:
        maps = features.transpose(1, 2).unflatten(2, self.grid)  # N Dv R S
        pooled = F.adaptive_avg_pool2d(maps, self.output_grid)  # N Dv · ·
        return super().forward(pooled.flatten(2).transpose(1, 2))  # N K D


def smaller_grid(grid: tuple[int, int], asked: Sequence[int] | None) -> tuple[int, int]:
    """The grid `asked`; None halves rows and columns. Raises ValueError if it does not fit into `grid`."""
    if asked is None:
        return (grid[0] + 1) // 2, (grid[1] + 1) // 2
    if len(asked) != 2 or not all(1 <= new <= old for new, old in zip(asked, grid, strict=True)):
        raise ValueError(
            f"connector.output_grid={list(asked)} does not fit into the encoder's {grid[0]}×{grid[1]} grid; "
            f"give its rows and columns, at most [{grid[0]}, {grid[1]}]"
        )
    return asked[0], asked[1]
