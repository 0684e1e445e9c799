"""From a picture to the tensor that an encoder takes: squash, scale, normalise; the same for every encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Transform:
    """PIL image -> [3, H, W], deterministic and picklable.

    The whole picture is squashed to `size`: a crop would hide what a caption speaks of. Pillow's filters widen with the
    scale, which is the antialiasing that the pretrained encoders saw.

    Args:
        size: height, width in pixels.
        mean, std: per channel, of pixels in [0, 1].
        interpolation: a name of `PIL.Image.Resampling`, in lower case.
    """

    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str

    def __post_init__(self) -> None:
        choices = [filter.name.lower() for filter in Image.Resampling]
        if self.interpolation not in choices:
            raise ValueError(f"encoder.interpolation={self.interpolation!r} is none of {', '.join(choices)}")
        if (len(self.mean), len(self.std)) != (3, 3):
            raise ValueError(
                f"encoder.mean has {len(self.mean)} and encoder.std {len(self.std)} numbers; give 3 each, for R, G, B"
            )

    @property
    def filter(self) -> Image.Resampling:
        return Image.Resampling[self.interpolation.upper()]

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 h w"]:
        height, width = self.size
        if image.mode != "RGB":
            image = image.convert("RGB")
        if image.size != (width, height):
            image = image.resize((width, height), self.filter)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # 3 H W
        pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)  # 3 H W
        mean, std = (255 * torch.tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        return pixels.sub_(mean).div_(std)  # 3 H W
