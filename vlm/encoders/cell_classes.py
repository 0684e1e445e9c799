"""The classes that an ImageNet classifier sees in each cell of its feature map.

Axes: N images, P cells of the last feature map, R rows and S columns of it, C its channels, Y classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm.architecture import facts_of
from vlm.encoders.timm import TimmEncoder, pretrained_model
from vlm.imports import without_package
from vlm.ranges import Facts, Name

with without_package("wandb"):
    import timm

SAME = 1e-4  # largest relative difference of two ways to compute the same logits in float32


class CellClasses(nn.Module):
    """pixel_values [N,3,H,W] -> logits [N,P,Y]: the classifier of a ConvNet on each cell, in place of their mean.

        pixel_values ──► feature map [N,C,R,S] ──► classifier on each cell ──► logits

    The classifier is linear, so the mean of the cells' logits is that of the image. It takes the place of the object
    classes that a detector gives for a region.

    Args:
        name, weights, pretrained, package, model_args: of the encoder, as in TimmEncoder.

    Raises ValueError for a model whose classifier does not read the mean of a feature map.
    """

    def __init__(
        self,
        *,
        name: Name,
        weights: Literal["pretrained", "random", "meta"] = "pretrained",
        pretrained: Name | None = None,
        package: Name | None = None,
        model_args: Facts | None = None,
    ) -> None:
        super().__init__()
        options = dict(model_args or {})
        with facts_of("encoder.name with encoder.model_args"), torch.device("meta"):
            self.model: Any = timm.create_model(name, **options)
        if weights == "random":
            self.model = timm.create_model(name, **options)
        elif weights == "pretrained":
            self.model = pretrained_model(name, options, options, pretrained=pretrained, package=package)
        self.eval()
        self._check(name)
        self.num_classes: int = self.model.get_classifier().out_features

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> CellClasses:
        """The classes of an encoder, from its options."""
        names = ("name", "weights", "pretrained", "package", "model_args")
        return cls(**{name: options[name] for name in names if name in options})

    def forward(self, pixel_values: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n p y"]:
        dtype = next(self.model.parameters()).dtype
        pixel_values = pixel_values.to(dtype, memory_format=torch.channels_last)  # N 3 H W
        feature_map = self.model.forward_features(pixel_values)  # N C R S
        return self.model.get_classifier()(feature_map.flatten(2).transpose(1, 2))  # N P Y

    def train(self, mode: bool = True) -> CellClasses:
        """Always in evaluation mode: the classifier is never trained."""
        return super().train(False)

    @torch.no_grad()
    def _check(self, name: str) -> None:
        """Raise ValueError unless the image's logits are the mean of the cells' logits."""
        classifier = self.model.get_classifier()
        some = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))  # an image
        some = some.to(next(self.model.parameters()).device)
        fits = isinstance(classifier, nn.Linear)
        try:
            fits = fits and self.model.forward_features(some).ndim == 4
            if fits:
                whole, mean = self.model(some), self(some).mean(1)  # 1 Y
                fits = whole.is_meta or bool((whole - mean).abs().max() <= SAME * whole.abs().max().clamp(min=1))
        except (RuntimeError, AssertionError):  # a size that the model does not take
            fits = False
        if not fits:
            raise ValueError(
                f"encoder.name={name} does not classify by the mean of a feature map, which this model needs for the "
                "classes of the cells; choose encoder=efficientnet_lite0 or a ResNet of timm"
            )


def check_classes(options: Mapping[str, Any], encoder: Any) -> None:
    """Raise ValueError, without loading weights, if the encoder in a config cannot have `CellClasses`."""
    if not issubclass(encoder, TimmEncoder):
        raise ValueError(
            f"encoder {encoder.__name__} has no classifier of image cells; choose encoder=efficientnet_lite0 or "
            "encoder=timm with a ResNet"
        )
    _check_skeleton(options.get("name"), json.dumps(options.get("model_args") or {}, default=str))


@cache
def _check_skeleton(name: Any, model_args: str) -> None:
    CellClasses(name=name, weights="meta", model_args=json.loads(model_args))
