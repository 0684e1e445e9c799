"""The visual tokens of a tiled image as LLaVA-NeXT packs them: none of padding, and a learned one after each row.

    visual [n,K,D] of an image ──► thumbnail, K tokens, then the tiles as one grid of patches, row by row:
                                   (patches of a row, newline), without rows or columns that are padding

Axes: N tiles of all images, P = rows · cols patches per tile, K = P visual tokens per tile, D LLM width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Size = tuple[int, int]


@dataclass(frozen=True)
class Unpad:
    """What is left of an image, from its width and height.

    Args:
        grid: (width, height) -> rows and columns of its tiles; of one tile, the thumbnail is the whole image.
        patches: rows and columns of the patches of a tile.
    """

    grid: Callable[[Size], Size]
    patches: Size

    def kept(self, size: Size) -> Size:
        """Rows and columns of patches that are not padding; as many are cut off at both ends.

        A thumbnail alone has one row without patches, so that it ends with one newline.
        """
        width, height = size
        tiles = self.grid(size)
        if tiles == (1, 1):
            return 1, 0
        rows, cols = tiles[0] * self.patches[0], tiles[1] * self.patches[1]
        if width / height > cols / rows:
            inside = int(round(height * (cols / width), 7))  # rounded first, as in Transformers
            return rows - (rows - inside) // 2 * 2, cols
        inside = int(round(width * (rows / height), 7))
        return rows, cols - (cols - inside) // 2 * 2

    def number(self, size: Size) -> int:
        """The number of visual tokens of an image, with the newlines."""
        rows, cols = self.kept(size)
        return self.patches[0] * self.patches[1] + rows * (cols + 1)


def pack(
    visual: Float[Tensor, "n k d"],
    newline: Float[Tensor, " d"],
    *,
    layouts: Sequence[tuple[int, ...]],
    kept: Sequence[Size],
    patches: Size,
) -> Float[Tensor, "s d"]:
    """The visual tokens of all images, one after the other.

    Of each image, `layouts` has the number of tiles in each row, the thumbnail first, and `kept` the patches that are
    not padding, as `Unpad.kept`. `patches` are those of a tile.
    """
    newline = newline.to(visual.dtype)
    packed = [newline[None][:0]]  # keeps the parameter in the graph of a batch without images
    start = 0
    for layout, (rows, cols) in zip(layouts, kept, strict=True):
        thumbnail, tiles = visual[start], visual[start + 1 : start + sum(layout)]
        start += sum(layout)
        lines = visual.new_zeros(rows, cols, visual.shape[2])
        if len(tiles):
            grid = tiles.unflatten(0, (len(layout) - 1, -1)).unflatten(2, patches)  # rows and cols of tiles, patches
            grid = grid.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # rows, cols, D
            top, left = (grid.shape[0] - rows) // 2, (grid.shape[1] - cols) // 2
            lines = grid[top : top + rows, left : left + cols]
        ends = newline.expand(len(lines), 1, -1)
        packed += [thumbnail, torch.cat([lines, ends], 1).flatten(0, 1)]
    return torch.cat(packed)
