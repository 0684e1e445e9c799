"""Several encoders side by side, as Prismatic joins DINOv2 and SigLIP (Karamcheti et al., arXiv 2402.07865).

Axes: N images, P patches per image, Dv sum of the encoders' widths.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm.encoders.timm import TimmEncoder
from vlm.ranges import Facts, ImageSize, Layers, Length, Name


class JoinedEncoder(nn.Module):
    """pixel_values [N,3,H,W] -> features [N,P,Dv]: the features of all encoders, concatenated on the feature axis.

    An image is one tensor, normalized with the mean and standard deviation of the first encoder. For the other encoders
    it is renormalized by an affine map per channel.

    Args:
        name: timm's name of each encoder.
        pretrained: hub id or local folder of the weights of each; None is timm's default.
        weights: `pretrained` loads them, `random` initializes them, `meta` allocates no memory.
        image_size: side in pixels, the same for all; None is the size of the pretrained models.
        layer: as in TimmEncoder, of each.
        resize: how an image of another shape is fitted, as in Transform.
        gradient_checkpointing: recompute blocks in the backward pass instead of storing their activations.
        model_args: more arguments of `timm.create_model` for each.

    Raises ValueError if the encoders differ in grid, image size or interpolation.
    """

    def __init__(
        self,
        *,
        name: Annotated[list[Name], Length(1)],
        pretrained: Annotated[list[Name | None], Length(1)],
        weights: Literal["pretrained", "random", "meta"] = "pretrained",
        image_size: ImageSize | None = None,
        layer: Layers = -2,
        resize: Literal["squash", "pad", "crop"] = "squash",
        gradient_checkpointing: bool = False,
        model_args: Annotated[list[Facts], Length(1)],
    ) -> None:
        super().__init__()
        if not len(name) == len(pretrained) == len(model_args) > 0:
            raise ValueError(
                f"encoder.name has {len(name)}, encoder.pretrained {len(pretrained)} and encoder.model_args "
                f"{len(model_args)} entries; give one for each encoder"
            )
        encoders = [
            TimmEncoder(
                name=one,
                pretrained=source,
                weights=weights,
                image_size=image_size,
                layer=layer,
                resize=resize,
                gradient_checkpointing=gradient_checkpointing,
                model_args=arguments,
            )
            for one, source, arguments in zip(name, pretrained, model_args, strict=True)
        ]
        self.encoders = nn.ModuleList(encoders)
        first, *others = encoders
        for other, label in zip(others, name[1:], strict=True):
            for what, first_value, other_value in (
                ("grid", first.grid, other.grid),
                ("image size", first.image_size, other.image_size),
                ("interpolation", first.transform.interpolation, other.transform.interpolation),
            ):
                if first_value != other_value:
                    raise ValueError(
                        f"encoder.name joins {name[0]} with {what} {first_value} and {label} with {what} "
                        f"{other_value}; choose encoders of one patch size and set encoder.image_size"
                    )
        self.grid, self.image_size, self.transform = first.grid, first.image_size, first.transform
        self.width = first.width + sum(other.width for other in others)

    def blocks(self) -> list[nn.Module]:
        """The last block of every encoder together, the last but one together, and so on, in order."""
        columns = [reversed(encoder.blocks()) for encoder in self.encoders]  # type: ignore[operator]
        levels = [[block for block in level if block is not None] for level in zip_longest(*columns)]
        return [nn.ModuleList(level) for level in reversed(levels)]

    def published_size(self) -> int:
        """Number of parameters of all published models."""
        return sum(encoder.published_size() for encoder in self.encoders)  # type: ignore[operator]

    def forward(self, pixel_values: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n p dv"]:
        features = [each(self._renormalized(pixel_values, each.transform)) for each in self.encoders]  # each N P ·
        return torch.cat(features, dim=-1)  # N P Dv

    def _renormalized(self, pixel_values: Tensor, transform: Any) -> Tensor:
        """The pixels normalized with the mean and standard deviation of `transform`."""
        if transform == self.transform:
            return pixel_values
        triples = (self.transform.mean, self.transform.std, transform.mean, transform.std)
        mean, std, new_mean, new_std = (pixel_values.new_tensor(list(triple)).view(3, 1, 1) for triple in triples)
        return (pixel_values * std + mean - new_mean) / new_std  # N 3 H W
