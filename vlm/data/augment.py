"""Image augmentation: random crops and color changes that keep captions true."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageEnhance

from vlm.ranges import RatioAboveZero, RatioBelowOne


@dataclass(frozen=True)
class Augment:
    """PIL image -> PIL image of the same size; the same seed gives the same image.

    Images are never flipped or rotated, because captions say left and right and images contain text.

    Args:
        crop: minimum ratio of the area that a crop keeps. A crop has a random position and the aspect ratio of the
            image; 1 crops nothing.
        color: maximum change of brightness, contrast and saturation, each multiplied by its own factor in
            [1 - color, 1 + color]; 0 changes nothing.

    Raises ValueError for a crop outside (0, 1] or a color outside [0, 1).
    """

    crop: RatioAboveZero = 0.8
    color: RatioBelowOne = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise ValueError(
                f"data.augment.crop={self.crop} must be in (0, 1]; set data.augment.crop=1 to keep whole images"
            )
        if not 0 <= self.color < 1:
            raise ValueError(
                f"data.augment.color={self.color} must be in [0, 1); set data.augment.color=0 to keep colors"
            )

    def __call__(self, image: Image.Image, seed: str) -> Image.Image:
        rng = random.Random(seed)
        side = rng.uniform(self.crop, 1) ** 0.5
        width, height = image.width * side, image.height * side
        left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
        if side < 1:
            box = (left, top, left + width, top + height)
            image = image.resize(image.size, Image.Resampling.BICUBIC, box=box)
        for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color) if self.color else ():
            image = change(image).enhance(rng.uniform(1 - self.color, 1 + self.color))
        return image
