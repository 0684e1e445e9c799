"""Pictures a little different each epoch: a part of them, and other light. What a caption says of them stays true."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageEnhance

from vlm.ranges import RatioAboveZero, RatioBelowOne


@dataclass(frozen=True)
class Augment:
    """PIL image -> PIL image of the same size; the same seed gives the same picture.

    Nothing is mirrored or turned: captions say left and right, and pictures hold text.

    Args:
        crop: the least share of the area that is kept, at a random place, the proportions as they were; 1 keeps all.
        color: the most by which brightness, contrast and saturation change, each by a factor of its own within
            [1 - color, 1 + color]; 0 changes none.

    Raises ValueError for a share outside (0, 1] or a change outside [0, 1).
    """

    crop: RatioAboveZero = 0.8
    color: RatioBelowOne = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise ValueError(f"data.augment.crop={self.crop} is no share of a picture; choose a number from 0 to 1")
        if not 0 <= self.color < 1:
            raise ValueError(f"data.augment.color={self.color} is no change of light; choose 0 or more, below 1")

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
