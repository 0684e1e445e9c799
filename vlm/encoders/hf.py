"""Vision towers of Transformers that cut the image into patches: CLIP (arXiv 2103.00020), SigLIP (arXiv 2303.15343), …

Axes: N images, P patches per image, Dv encoder width; L tokens of the tower: P and its class and register tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

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


class HFEncoder(nn.Module):
    """pixel_values [N,3,H,W] -> features [N,P,Dv], with no class or register token, and no layer that they do not need.

        pixel_values ──► tower ──► hidden_states[layer] [N,L,·] each ──► first tokens dropped, joined ──► features

    Args:
        pretrained: hub id or local folder of the weights (safetensors).
        config: architecture facts of the vision tower (Transformers' names, with `model_type`), enough to build it with
            no network; pretrained weights that say otherwise are refused. None reads them at `pretrained`.
        weights: `pretrained` reads them, `random` draws them, `meta` allocates none.
        layer: index into Transformers' `hidden_states`: n is the output of block n, from 1; -1 is the last block, -2
            the one before (LLaVA's choice, arXiv 2304.08485). A list joins several on the feature axis.
        image_size: side in pixels; None is the tower's own. Position embeddings are interpolated.
        drop_tokens: how many tokens come before the patches (class and registers): CLIP 1, SigLIP 0; None counts them.
        mean, std, interpolation: what the weights were trained with; None reads them at `pretrained`.
        resize: what becomes of a picture of another shape, as in Transform.
        gradient_checkpointing: recompute blocks in the backward pass instead of keeping what they made.
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
        if size % patch and size != architecture.image_size:  # SigLIP reads 27·14 of its own 384 pixels
            raise ValueError(
                f"encoder.image_size={size} is no multiple of the patch size {patch}; "
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
        # Towers that interpolate unasked, or have no positions to interpolate, have no such argument.
        asks = "interpolate_pos_encoding" in inspect.signature(skeleton.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if asks and size != architecture.image_size else {}
        self._drop = self._tokens_to_drop(skeleton, drop_tokens)
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
        """Training mode, which drops nothing out: the tower's modules stay in evaluation mode.

        Transformers recomputes a block where the block itself, its submodules aside, is in training mode.
        """
        super().train(mode)
        self.tower.eval()
        for block in self.blocks():
            block.training = mode and self.gradient_checkpointing
        return self

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks that are run, in order."""
        return list(self.tower.get_submodule(self._blocks_name).children())

    def published_size(self) -> int:
        """Parameters of the whole tower, those that features do not need among them."""
        return self._published_size

    def forward(self, pixel_values: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n p dv"]:
        if len(pixel_values) == 0:  # no image in this batch: one blank keeps every parameter in the graph, then goes
            return self(pixel_values.new_zeros(1, 3, *self.image_size))[:0]  # 0 P Dv
        states = self._hidden_states(self.tower, pixel_values.to(self.tower.dtype))  # each N L ·
        return torch.cat([states[layer] for layer in self._layers], dim=-1)[:, self._drop :]  # N P Dv

    def _hidden_states(self, tower: PreTrainedModel, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return tower(pixel_values=pixel_values, output_hidden_states=True, **self._options).hidden_states

    def _tokens_to_drop(self, skeleton: PreTrainedModel, asked: int | None) -> int:
        """All but one token a patch. Raises where `asked` is another number."""
        tokens = self._hidden_states(skeleton, torch.empty(1, 3, *self.image_size, device="meta"))[-1].shape[1]
        patches = self.grid[0] * self.grid[1]
        if tokens < patches:
            raise ValueError(
                f"the encoder makes {tokens} tokens of {patches} patches, so it has no grid; choose another encoder"
            )
        if asked is not None and tokens - asked != patches:
            raise ValueError(
                f"encoder.drop_tokens={asked} leaves {tokens - asked} of {tokens} tokens, but the grid has "
                f"{patches} patches; set encoder.drop_tokens={tokens - patches}"
            )
        return tokens - patches


@contextmanager
def _reading(pretrained: str, what: str, instead: str) -> Iterator[None]:
    """Around the reading of files at `pretrained`: where there are none, one error says what was looked for."""
    try:
        look_up(pretrained)
        yield
    except OSError as error:
        raise ValueError(
            f"no {what} for the encoder: looked for the folder or hub id {pretrained!r} ({first_line(error)}); "
            f"download it and set encoder.pretrained=<folder>, or {instead}"
        ) from error


def _architecture(pretrained: str, config: dict[str, Any] | None) -> Any:
    """The vision tower's facts, as given or as its files have them."""
    if config is None:
        with _reading(pretrained, "config.json", "encoder.config.model_type=<Transformers' name> and its facts"):
            architecture = _vision_config(pretrained)
    else:
        architecture = from_facts(config, option="encoder.config")
    for fact in ("hidden_size", "num_hidden_layers", "image_size", "patch_size"):
        value = getattr(architecture, fact, None)
        if not isinstance(value, int):
            raise ValueError(
                f"encoder.config of a {architecture.model_type!r} has {fact}={value}, but a whole number is needed; "
                "choose a tower of square patches, or encoder=timm"
            )
    return architecture


def _vision_config(pretrained: str) -> PretrainedConfig:
    """A whole CLIP holds its vision tower as one part."""
    whole = config_of(pretrained)
    return getattr(whole, "vision_config", whole)


def _transform(
    pretrained: str,
    size: tuple[int, int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    interpolation: str | None,
    resize: Literal["squash", "pad", "crop"],
) -> Transform:
    """The transform as given; what is None is as the image processor's file has it."""
    if mean is None or std is None or interpolation is None:
        with _reading(pretrained, "preprocessor_config.json", "encoder.mean=, encoder.std= and encoder.interpolation="):
            facts, _ = ImageProcessingMixin.get_image_processor_dict(pretrained)
        mean, std = mean or facts["image_mean"], std or facts["image_std"]
        interpolation = interpolation or Image.Resampling(facts["resample"]).name.lower()
    return Transform(size=size, mean=mean, std=std, interpolation=interpolation, resize=resize)


def _pretrained(tower: type[PreTrainedModel], pretrained: str, config: dict[str, Any] | None) -> PreTrainedModel:
    """The tower with the weights of a folder or hub id."""
    with (
        _reading(pretrained, "weights (safetensors)", "encoder.weights=random"),
        readable_weights(pretrained, "encoder"),
    ):
        architecture = _vision_config(pretrained)
        _check_facts(architecture, config or {}, pretrained)
        loaded: Any = tower.from_pretrained(
            pretrained, config=architecture, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    model, report = loaded
    check_match(model, pretrained, "encoder", missing=report["missing_keys"], unused=report["unexpected_keys"])
    return model


def _check_facts(architecture: PretrainedConfig, config: dict[str, Any], pretrained: str) -> None:
    for key, ours in config.items():
        theirs = getattr(architecture, key, None)
        if theirs != ours:
            raise ValueError(
                f"encoder.config.{key}={ours!r}, but the weights of {pretrained!r} have {theirs!r}; "
                f"set encoder.config.{key}={theirs} or choose other weights"
            )


def _truncate(tower: PreTrainedModel, *, depth: int, keep: int) -> str:
    """Drop the blocks after `keep` and all that follows the blocks (last norm, pooler); the name of the list of blocks.

    None of it can reach the features: kept, it would cost time and hold parameters that never get a gradient.
    """
    lists = [(name, module) for name, module in tower.named_modules() if isinstance(module, nn.ModuleList)]
    name, blocks = next((name, module) for name, module in lists if len(module) == depth)
    del blocks[keep:]
    children = [child for child, _ in tower.named_children()]
    for child in children[children.index(name.partition(".")[0]) + 1 :]:
        setattr(tower, child, nn.Identity())
    for module in tower.modules():
        if getattr(module, "mask_token", None) is not None:  # of a pretraining by masks
            module.mask_token = None  # type: ignore[assignment]
    return name
