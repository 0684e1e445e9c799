"""Pixel shuffle (space to depth), as in InternVL 1.5 (arXiv 2404.16821) and Idefics3 (arXiv 2408.12637).

Axes: N images, P patches per image, Dv encoder width, K visual tokens, D LLM width, f `factor`; R rows and S columns of
squares.
"""

from __future__ import annotations

from typing import Annotated, Literal

from jaxtyping import Float
from torch import Tensor

from vlm.connectors.mlp import MLP
from vlm.ranges import Depth, Range, Width


class PixelShuffle(MLP):
    """features [N,P,Dv] -> visual [N,P/f²,D]: f × f patches concatenated on the feature axis, then an MLP.

    At depth 2 without `position` it equals InternVL's projector (the last bias takes the mean of the activation). At
    depth 1 without `norm` and `position` it equals Idefics3's, except for a bias.

    Parameters: MLP's with f²·Dv for Dv and K for P, so at depth 2 and hidden width D: f²·Dv·D + D² + 2·D, and 2·f²·Dv
    for the norm, K·D for position embeddings. Arguments as in MLP, and:

    Args:
        factor: side of a square in patches; must divide the rows and columns of the encoder's grid.
    """

    def __init__(
        self,
        *,
        vision_width: int,
        llm_width: int,
        grid: tuple[int, int],
        output_rms: float,
        factor: Annotated[int, Range(1, 64)] = 2,
        depth: Depth = 2,
        hidden_width: Width | None = None,
        activation: Literal["gelu", "relu", "silu"] = "gelu",
        norm: bool = True,
        position: bool = True,
    ) -> None:
        if factor < 1 or grid[0] % factor or grid[1] % factor:
            raise ValueError(
                f"connector.factor={factor} does not divide the encoder's {grid[0]}×{grid[1]} grid; "
                "set it to a common divisor, or change encoder.image_size"
            )
        super().__init__(
            vision_width=vision_width * factor**2,
            llm_width=llm_width,
            grid=(grid[0] // factor, grid[1] // factor),
            output_rms=output_rms,
            depth=depth,
            hidden_width=hidden_width,
            activation=activation,
            norm=norm,
            position=position,
        )
        self.grid, self.factor = grid, factor

    def forward(self, features: Float[Tensor, "n p dv"]) -> Float[Tensor, "n k d"]:
        return super().forward(pixel_shuffle(features, self.grid, self.factor))  # N K D


def pixel_shuffle(features: Float[Tensor, "n p dv"], grid: tuple[int, int], factor: int) -> Float[Tensor, "n k wide"]:
    """Concatenate the features of each square: squares row by row, patches of a square row by row."""
    rows, cols = grid[0] // factor, grid[1] // factor
    squares = features.reshape(len(features), rows, factor, cols, factor, features.shape[2])  # N R f S f Dv
    return squares.transpose(2, 3).reshape(len(features), rows * cols, factor**2 * features.shape[2])  # N K f²·Dv
