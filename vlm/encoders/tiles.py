"""Any-resolution tiling: an image as a thumbnail and a grid of tiles, for detail that one input size would lose.

As LLaVA-1.5-HD (Liu et al., arXiv 2310.03744, section 4) and LLaVA-NeXT choose the grid. To the encoder and the
connector every tile is an image, so that any of them will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vlm.encoders.transform import Transform, centered, pixels_of
from vlm.ranges import Grid


@dataclass(frozen=True)
class Tiles:
    """The options `encoder.tiles`, for any encoder.

    Args:
        grids: (rows, columns) to choose from, LLaVA-NeXT's being (1,2), (2,1), (2,2), (1,3), (3,1); none: no tiles.
        row_separator: a line break in the text after the thumbnail and after each row of tiles but the last.
    """

    grids: Sequence[Grid] = ()
    row_separator: bool = False

    def __post_init__(self) -> None:
        for grid in self.grids:
            if len(grid) != 2 or min(grid) < 1:
                raise ValueError(f"encoder.tiles.grids holds {list(grid)}; give pairs of rows and columns, 1 or more")

    @property
    def most(self) -> int:
        """Tiles of an image in the largest grid, the thumbnail among them."""
        return max((sum(_rows(grid)) for grid in self.grids), default=1)

    def around(self, whole: Transform) -> TiledTransform:
        """The transform of an encoder, made to cut tiles."""
        return TiledTransform(whole=whole, grids=self.grids)


@dataclass(frozen=True)
class TiledTransform:
    """PIL image -> [tiles, 3, H, W]: the whole picture as a thumbnail, then the grid's tiles row by row.

    The picture is scaled to fit into the grid that suits it best, its shape kept and black around it. A grid of one
    tile would show the thumbnail again, so it is the thumbnail alone. LLaVA-NeXT squashes the thumbnail, which is
    `encoder.resize=squash`.
    """

    whole: Transform
    grids: Sequence[Sequence[int]]

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tiles for a picture of width and height `size`.

        That is the grid in which most of the picture's pixels survive; of equal ones the one with least black, and of
        those the first.
        """
        width, height = size

        def fitness(grid: Sequence[int]) -> tuple[int, int]:
            rows, cols = self._pixels(grid)
            scale = min(cols / width, rows / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - rows * cols

        rows, cols = max(self.grids, key=fitness)
        return rows, cols

    def rows(self, size: tuple[int, int]) -> list[int]:
        """How many tiles stand in each row for a picture of width and height `size`; the thumbnail is the first row."""
        return _rows(self.grid(size))

    def __call__(self, image: Image.Image) -> Float[Tensor, "tiles 3 h w"]:
        thumbnail = self.whole(image)[None]  # 1 3 H W
        rows, cols = self.grid(image.size)
        if rows * cols == 1:
            return thumbnail
        height, width = self._pixels((rows, cols))
        fitted = self.whole.fitted(pixels_of(image), (height, width))  # 3 h w
        canvas = self.whole.normalized(centered(fitted, (height, width)))  # 3 rows·H cols·W
        tiles = canvas.unflatten(1, (rows, -1)).unflatten(3, (cols, -1))  # 3 rows H cols W
        return torch.cat([thumbnail, tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)])  # tiles 3 H W

    def _pixels(self, grid: Sequence[int]) -> tuple[int, int]:
        return grid[0] * self.whole.size[0], grid[1] * self.whole.size[1]


def _rows(grid: Sequence[int]) -> list[int]:
    """Tiles in each row; the thumbnail is the first."""
    rows, cols = grid
    return [1] if rows * cols == 1 else [1, *[cols] * rows]
