"""Any-resolution tiling: an image becomes a thumbnail and a grid of tiles, which keep more detail.

The grid is chosen as in LLaVA-1.5-HD (Liu et al., arXiv 2310.03744, section 4) and LLaVA-NeXT. The encoder and the
connector treat every tile as an image, so all encoders and connectors work with tiles.
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
        grids: (rows, columns) to choose from; LLaVA-NeXT has (1,2), (2,1), (2,2), (1,3), (3,1). Empty: no tiles.
        row_separator: put a line break into the text after the thumbnail and after each row of tiles but the last.
        unpad: leave out the visual tokens of padding, and put a learned visual token after each row of patches, as
            LLaVA-NeXT (vlm/models/unpad.py). The model needs one visual token per patch.
    """

    grids: Sequence[Grid] = ()
    row_separator: bool = False
    unpad: bool = False

    def __post_init__(self) -> None:
        for grid in self.grids:
            if len(grid) != 2 or min(grid) < 1:
                raise ValueError(f"encoder.tiles.grids holds {list(grid)}; give pairs of rows and columns, at least 1")
        if self.unpad and (not self.grids or self.row_separator):
            raise ValueError(
                f"encoder.tiles.unpad=true needs grids and no row_separator, but encoder.tiles.grids={[*self.grids]} "
                f"and row_separator={str(self.row_separator).lower()}; set the grids, and row_separator=false"
            )

    @property
    def max_tiles(self) -> int:
        """Largest number of tiles of an image, with the thumbnail."""
        return max((sum(_rows(grid)) for grid in self.grids), default=1)

    def tiled(self, transform: Transform) -> TiledTransform:
        """The transform of an encoder, extended to cut tiles."""
        return TiledTransform(transform=transform, grids=self.grids)


@dataclass(frozen=True)
class TiledTransform:
    """PIL image -> [tiles, 3, H, W]: the whole image as a thumbnail, then the tiles row by row.

    The image is scaled to fit into the best grid, with its aspect ratio kept and black padding. A grid of one tile
    would repeat the thumbnail, so it gives the thumbnail alone. LLaVA-NeXT squashes the thumbnail, as
    `encoder.resize=squash` does.
    """

    transform: Transform
    grids: Sequence[Sequence[int]]

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tiles for an image of width and height `size`.

        The grid with the highest effective resolution; of equal ones the one with the least padding, then the first.
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
        """Number of tiles in each row for an image of width and height `size`; the thumbnail is the first row."""
        return _rows(self.grid(size))

    def __call__(self, image: Image.Image) -> Float[Tensor, "tiles 3 h w"]:
        thumbnail = self.transform(image)[None]  # 1 3 H W
        rows, cols = self.grid(image.size)
        if rows * cols == 1:
            return thumbnail
        height, width = self._pixels((rows, cols))
        fitted = self.transform.fitted(pixels_of(image), (height, width))  # 3 h w
        canvas = self.transform.normalized(centered(fitted, (height, width)))  # 3 rows·H cols·W
        tiles = canvas.unflatten(1, (rows, -1)).unflatten(3, (cols, -1))  # 3 rows H cols W
        return torch.cat([thumbnail, tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)])  # tiles 3 H W

    def _pixels(self, grid: Sequence[int]) -> tuple[int, int]:
        return grid[0] * self.transform.size[0], grid[1] * self.transform.size[1]


def _rows(grid: Sequence[int]) -> list[int]:
    """Number of tiles in each row; the thumbnail is the first row."""
    rows, cols = grid
    return [1] if rows * cols == 1 else [1, *[cols] * rows]
