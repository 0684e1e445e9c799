"""Image preprocessing for an encoder: resize to its image size and normalize."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional

FILTERS = ("bilinear", "bicubic")
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # see `pixels_of`


@dataclass(frozen=True)
class Transform:
    """PIL image -> [3, H, W], deterministic and picklable.

    An image of another shape than `size` is fitted in one of three ways:

    - `squash`: both sides are scaled to `size`, as in SigLIP and BLIP-2; the aspect ratio changes.
    - `pad`: the image is scaled to fit in and padded with the mean color, as in LLaVA-1.5 (arXiv 2310.03744).
    - `crop`: the image is scaled to fill and center-cropped, as in CLIP; a caption may describe what is cropped.

    Resizing is antialiased, as in the pretraining of the encoders. PyTorch's filters equal Pillow's up to rounding (at
    most 2 of 255 levels on photographs) and take a third of the time.

    Args:
        size: height, width in pixels.
        mean, std: per channel (R, G, B), of pixels in [0, 1].
        interpolation: one of `FILTERS`.
        resize: how an image of another shape is fitted.
    """

    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str
    resize: Literal["squash", "pad", "crop"] = "squash"

    def __post_init__(self) -> None:
        if self.interpolation not in FILTERS:
            raise ValueError(f"encoder.interpolation={self.interpolation!r} must be one of {', '.join(FILTERS)}")
        if (len(self.mean), len(self.std)) != (3, 3):
            raise ValueError(
                f"encoder.mean has {len(self.mean)} and encoder.std {len(self.std)} numbers; give 3 each, for R, G, B"
            )

        if not all(math.isfinite(value) for value in self.mean) or not all(0 < value < math.inf for value in self.std):
            raise ValueError(
                f"encoder.mean={list(self.mean)} and encoder.std={list(self.std)}: pixels are divided by std, so give "
                "finite numbers, for std above 0"
            )

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 h w"]:
        pixels = pixels_of(image)  # 3 h w
        if self.resize == "pad":
            return centered(self.normalized(self.fitted(pixels, self.size)), self.size)  # 3 H W: 0 is the mean color
        if self.resize == "crop":
            return self.normalized(self._center_cropped(pixels))  # 3 H W
        return self.normalized(self.resampled(pixels, self.size))  # 3 H W

    def resampled(self, pixels: UInt8[Tensor, "3 h w"], size: tuple[int, int]) -> UInt8[Tensor, "3 rows cols"]:
        """The image with both sides scaled to `size`, height and width in pixels."""
        if pixels.shape[1:] == size:
            return pixels
        # PyTorch does not infer channels last from the strides of one image. This view declares it: a quarter faster.
        image = pixels.permute(1, 2, 0)[None].permute(0, 3, 1, 2)  # 1 3 h w
        return functional.interpolate(image, size, mode=self.interpolation, antialias=True)[0]

    def fitted(self, pixels: UInt8[Tensor, "3 h w"], size: tuple[int, int]) -> UInt8[Tensor, "3 rows cols"]:
        """The image scaled to the largest size that fits into `size`, with its aspect ratio kept."""
        height, width = pixels.shape[1:]
        scale = min(size[0] / height, size[1] / width)
        return self.resampled(pixels, (min(math.ceil(height * scale), size[0]), min(math.ceil(width * scale), size[1])))

    def normalized(self, pixels: UInt8[Tensor, "3 h w"]) -> Float[Tensor, "3 h w"]:
        """(pixels - mean) / std. Channels stay last in memory, as in Pillow, so nothing is moved."""
        lines = pixels.permute(1, 2, 0).flatten(1).float()  # h w·3
        mean, std = (value.repeat(pixels.shape[2]) for value in self._moments)  # w·3
        return lines.sub_(mean).div_(std).unflatten(1, (-1, 3)).permute(2, 0, 1)

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of pixels in [0, 255]."""
        return 255 * torch.tensor(self.mean), 255 * torch.tensor(self.std)

    def _center_cropped(self, pixels: UInt8[Tensor, "3 h w"]) -> UInt8[Tensor, "3 rows cols"]:
        """The image scaled to fill `size`, then cropped to its center."""
        rows, cols = self.size
        # A strip is cropped before it is scaled: 60,000 by 1 pixels would take gigabytes.
        height, width = pixels.shape[1:]
        height, width = min(height, 16 * -(-width * rows // cols)), min(width, 16 * -(-height * cols // rows))
        pixels = centered(pixels, (height, width))
        size = (height * cols // width, cols) if height * cols > width * rows else (rows, width * rows // height)
        kept = [_crop_before_scaling(*sides) for sides in zip((height, width), size, self.size, strict=True)]
        pixels = centered(pixels, (kept[0][0], kept[1][0]))
        return centered(self.resampled(pixels, (kept[0][1], kept[1][1])), self.size)


def pixels_of(image: Image.Image) -> UInt8[Tensor, "3 h w"]:
    """The RGB values of an image, read-only: a writable copy would cost a tenth of a resize."""
    return torch.from_numpy(np.asarray(image if image.mode == "RGB" else image.convert("RGB"))).permute(2, 0, 1)


def _crop_before_scaling(side: int, scaled: int, size: int) -> tuple[int, int]:
    """The cropped length of a side and of its scaled length that give the same central `size` pixels.

    Both ends lose a whole number of pixels before and after scaling; the filter reaches less than 3 pixels.
    """
    common = math.gcd(side, scaled)
    margin = 3 * max(1, -(-scaled // side))
    cut = max(0, ((scaled - size) // 2 - margin) // (scaled // common))
    return side - 2 * cut * (side // common), scaled - 2 * cut * (scaled // common)


def centered(pixels: Shaped[Tensor, "3 h w"], size: tuple[int, int]) -> Shaped[Tensor, "3 rows cols"]:
    """The image center-cropped or zero-padded to `size`, height and width."""
    rows, cols = size[0] - pixels.shape[1], size[1] - pixels.shape[2]
    top, left = int(rows / 2), int(cols / 2)  # rounded toward zero, as LLaVA pads and CLIP crops
    if max(rows, cols) <= 0:  # a view; `pad` would copy
        return pixels[:, -top : size[0] - top, -left : size[1] - left]
    return functional.pad(pixels, (left, cols - left, top, rows - top))
