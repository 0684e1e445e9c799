"""Vision transformers of Transformers: CLIP (arXiv 2103.00020), SigLIP (arXiv 2303.15343), …

Axes: N images, P patches per image, Dv encoder width; L tokens of the model: P patches, class and register tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Annotated, Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModel, ImageProcessingMixin, PretrainedConfig, PreTrainedModel

from vlm.architecture import facts_of, from_facts
from vlm.encoders.layers import resolve_layers
from vlm.encoders.transform import Transform
from vlm.hub import check_match, config_of, first_line, look_up, readable_weights
from vlm.ranges import Facts, ImageSize, Interpolation, Layers, Mean, Name, Range, Std


class Tower(NamedTuple):
    """A vision model, the hidden states that are its features, from the end, and its tokens that are no patches."""

    model: PreTrainedModel
    layers: list[int]
    num_dropped: int


class HFEncoder(nn.Module):
    """pixel_values [N,3,H,W] -> features [N,P,Dv], without class and register tokens and without unused layers.

        pixel_values ──► vision model ──► hidden_states[layer], each [N,L,·] ──► drop tokens, concatenate ──► features

    Args:
        pretrained: hub id or local folder of the weights (safetensors).
        config: architecture of the vision model in Transformers' names, with `model_type`, so that it is built without
            network; pretrained weights of another architecture are refused. None reads it from `pretrained`.
        weights: `pretrained` loads them, `random` initializes them, `meta` allocates no memory.
        layer: index into Transformers' `hidden_states`: n is the output of block n, from 1; -1 is the last block, -2
            the one before it (LLaVA, arXiv 2304.08485). A list concatenates several on the feature axis.
        image_size: side in pixels; None is the size of the pretrained model. Position embeddings are interpolated.
        drop_tokens: number of class and register tokens before the patches: CLIP 1, SigLIP 0; None counts them.
        mean, std, interpolation: as in pretraining; None reads them from `pretrained`.
        resize: how an image of another shape is fitted, as in Transform.
        gradient_checkpointing: recompute blocks in the backward pass instead of storing their activations.
    """

    def __init__(
        self,
        *,
        pretrained: Name,
        config: Facts | None = None,
        weights: Literal["pretrained", "random", "meta"] = "pretrained",
        layer: Layers = -2,
        image_size: ImageSize | None = None,
        drop_tokens: Annotated[int, Range(0, 1_000)] | None = None,
        mean: Mean | None = None,
        std: Std | None = None,
        interpolation: Interpolation | None = "bicubic",
        resize: Literal["squash", "pad", "crop"] = "squash",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        architecture = _architecture(pretrained, config)
        size, patch = image_size or architecture.image_size, architecture.patch_size
        if size % patch and size != architecture.image_size:  # SigLIP uses 27·14 of its 384 pixels
            raise ValueError(
                f"encoder.image_size={size} must be a multiple of the patch size {patch}; "
                f"try {max(1, size // patch) * patch}"
            )
        self.image_size = (size, size)
        self.grid = (size // patch, size // patch)
        self.transform = _transform(pretrained, self.image_size, mean, std, interpolation, resize)
        self._layers = resolve_layers(layer, first=1, last=architecture.num_hidden_layers)
        self.width = architecture.hidden_size * len(self._layers)

        with torch.device("meta"), facts_of("encoder.config"):
            skeleton = AutoModel.from_config(architecture)
        self._published_size = sum(p.numel() for p in skeleton.parameters())
        # Models that always interpolate, or have no position embeddings, lack this argument.
        interpolates = "interpolate_pos_encoding" in inspect.signature(skeleton.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if interpolates and size != architecture.image_size else {}
        self.num_dropped = self._num_tokens_to_drop(skeleton, drop_tokens)
        if weights == "meta":
            self.tower = skeleton
        elif weights == "random":
            self.tower = AutoModel.from_config(architecture)
        else:
            self.tower = _pretrained(type(skeleton), pretrained, config)
        self._blocks_name = _truncate(self.tower, depth=architecture.num_hidden_layers, keep=max(self._layers))
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            self.tower.gradient_checkpointing_enable({"use_reentrant": False})
        self.train()

    def train(self, mode: bool = True) -> HFEncoder:
        """Set the mode; the vision model stays in evaluation mode, without dropout.

        Transformers checkpoints a block only if the block itself is in training mode; its submodules may differ.
        """
        super().train(mode)
        self.tower.eval()
        for block in self.blocks():
            block.training = mode and self.gradient_checkpointing
        return self

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks in use, in order."""
        return list(self.tower.get_submodule(self._blocks_name).children())

    def published_size(self) -> int:
        """Number of parameters of the published model, with the layers that are unused here."""
        return self._published_size

    def published_tower(self) -> Tower:
        """The vision model with Transformers' own modules, for a checkpoint of another model that contains it.

        One block follows the last that is used. No feature depends on it, nor on the modules after it: it is a copy of
        the last one, so that the features are an inner hidden state, which no model passes through its last norm.
        Position embeddings for another image size are interpolated once. Raises ValueError where they cannot be.
        """
        config, depth = deepcopy(self.tower.config), max(self._layers)
        config.num_hidden_layers = depth + 1
        if hasattr(config, "vision_use_head"):  # of SigLIP
            config.vision_use_head = False
        ours = dict(self.tower.state_dict())
        if self._options:
            embeddings: Any = getattr(self.tower, "embeddings", None)
            if getattr(embeddings, "position_embedding", None) is None:
                raise ValueError(
                    f"encoder.image_size={self.image_size[0]} needs position embeddings that are interpolated in every "
                    f"step for a {config.model_type}; train with encoder.image_size={config.image_size}"
                )
            name, config.image_size = "embeddings.position_embedding.weight", self.image_size[0]
            with torch.no_grad():
                num = self.grid[0] * self.grid[1] + self.num_dropped
                blank = ours[name].new_zeros(1, num, ours[name].shape[1])  # 1 L ·
                ours[name] = embeddings.interpolate_pos_encoding(blank, *self.image_size)[0]  # L ·
        last, copied = f"{self._blocks_name}.{depth - 1}.", f"{self._blocks_name}.{depth}."
        ours |= {name.replace(last, copied): tensor for name, tensor in ours.items() if name.startswith(last)}
        model = AutoModel.from_config(config)
        model.load_state_dict({**model.state_dict(), **ours})
        layers = [layer - depth - 2 for layer in self._layers]  # -2 is the last that is used
        return Tower(model.eval(), layers, self.num_dropped)

    def forward(self, pixel_values: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n p dv"]:
        if len(pixel_values) == 0:  # no image in the batch: one blank image keeps all parameters in the graph
            return self(pixel_values.new_zeros(1, 3, *self.image_size))[:0]  # 0 P Dv
        states = self._hidden_states(self.tower, pixel_values.to(self.tower.dtype))  # each N L ·
        return torch.cat([states[layer] for layer in self._layers], dim=-1)[:, self.num_dropped :]  # N P Dv

    def _hidden_states(self, model: PreTrainedModel, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return model(pixel_values=pixel_values, output_hidden_states=True, **self._options).hidden_states

    def _num_tokens_to_drop(self, skeleton: PreTrainedModel, asked: int | None) -> int:
        """Number of tokens that are not patches. Raises ValueError if `asked` is another number."""
        tokens = self._hidden_states(skeleton, torch.empty(1, 3, *self.image_size, device="meta"))[-1].shape[1]
        patches = self.grid[0] * self.grid[1]
        if tokens < patches:
            raise ValueError(
                f"the encoder gives {tokens} tokens for {patches} patches, so they form no grid; choose another encoder"
            )
        if asked is not None and tokens - asked != patches:
            raise ValueError(
                f"encoder.drop_tokens={asked} leaves {tokens - asked} of {tokens} tokens, but the grid has "
                f"{patches} patches; set encoder.drop_tokens={tokens - patches}"
            )
        return tokens - patches


@contextmanager
def _reading(pretrained: str, what: str, instead: str) -> Iterator[None]:
    """Context for reading files of `pretrained`; if they are missing, raises ValueError with what was searched."""
    try:
        look_up(pretrained)
        yield
    except OSError as error:
        raise ValueError(
            f"no {what} for the encoder: looked for the folder or hub id {pretrained!r} ({first_line(error)}); "
            f"download it and set encoder.pretrained=<folder>, or {instead}"
        ) from error


def _architecture(pretrained: str, config: dict[str, Any] | None) -> Any:
    """The configuration of the vision model, from `config` or from the files of `pretrained`."""
    if config is None:
        with _reading(pretrained, "config.json", "encoder.config.model_type=<Transformers' name> and its facts"):
            architecture = _vision_config(pretrained)
    else:
        architecture = from_facts(config, option="encoder.config")
    for fact in ("hidden_size", "num_hidden_layers", "image_size", "patch_size"):
        value = getattr(architecture, fact, None)
        if not isinstance(value, int):
            raise ValueError(
                f"encoder.config of a {architecture.model_type!r} has {fact}={value}, but must have a whole number; "
                "choose a model with square patches, or encoder=timm"
            )
    return architecture


def _vision_config(pretrained: str) -> PretrainedConfig:
    """The config of the vision model; in CLIP it is one part of the whole config."""
    config = config_of(pretrained)
    return getattr(config, "vision_config", config)


def _transform(
    pretrained: str,
    size: tuple[int, int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    interpolation: str | None,
    resize: Literal["squash", "pad", "crop"],
) -> Transform:
    """The transform; options that are None are read from the image processor's config."""
    if mean is None or std is None or interpolation is None:
        with _reading(pretrained, "preprocessor_config.json", "encoder.mean=, encoder.std= and encoder.interpolation="):
            facts, _ = ImageProcessingMixin.get_image_processor_dict(pretrained)
        mean, std = mean or facts["image_mean"], std or facts["image_std"]
        interpolation = interpolation or Image.Resampling(facts["resample"]).name.lower()
    return Transform(size=size, mean=mean, std=std, interpolation=interpolation, resize=resize)


def _pretrained(model_class: type[PreTrainedModel], pretrained: str, config: dict[str, Any] | None) -> PreTrainedModel:
    """The vision model with the weights of a folder or hub id."""
    with (
        _reading(pretrained, "weights (safetensors)", "encoder.weights=random"),
        readable_weights(pretrained, "encoder"),
    ):
        architecture = _vision_config(pretrained)
        _check_facts(architecture, config or {}, pretrained)
        loaded: Any = model_class.from_pretrained(
            pretrained, config=architecture, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    model, report = loaded
    check_match(model, pretrained, "encoder", missing=report["missing_keys"], unused=report["unexpected_keys"])
    return model


def _check_facts(architecture: PretrainedConfig, config: dict[str, Any], pretrained: str) -> None:
    for key, value in config.items():
        pretrained_value = getattr(architecture, key, None)
        if pretrained_value != value:
            raise ValueError(
                f"encoder.config.{key}={value!r}, but the weights of {pretrained!r} have {pretrained_value!r}; "
                f"set encoder.config.{key}={pretrained_value} or choose other weights"
            )


def _truncate(model: PreTrainedModel, *, depth: int, keep: int) -> str:
    """Remove the blocks after `keep` and the modules after the blocks (last norm, pooler); return the blocks' name.

    The features do not depend on them: they would cost time, and their parameters would never get a gradient.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    name, blocks = next((name, module) for name, module in lists if len(module) == depth)
    del blocks[keep:]
    children = [child for child, _ in model.named_children()]
    for child in children[children.index(name.partition(".")[0]) + 1 :]:
        setattr(model, child, nn.Identity())
    for module in model.modules():
        if getattr(module, "mask_token", None) is not None:  # used only in masked image modeling
            module.mask_token = None  # type: ignore[assignment]
    return name
