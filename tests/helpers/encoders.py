"""Small random versions of every encoder option: the YAML's own facts, but narrow and shallow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from vlm.options import bind

CONF = Path(__file__).parents[2] / "conf" / "encoder"
OPTIONS = sorted(path.stem for path in CONF.glob("*.yaml") if not path.stem.startswith("_"))

VIT = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
TOWER = {
    "image_size": 48,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
NORMAL = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
# What makes a family small, by the option's first words; `timm` and `hf` take any name and get one here.
SHRINK: dict[str, dict[str, Any]] = {
    "clip_vit": {"config": TOWER},
    "siglip": {"config": TOWER},
    "vit": {"image_size": 48, "model_args": VIT},
    "eva02": {"image_size": 48, "model_args": VIT},
    "eva_g": {"image_size": 48, "model_args": VIT},
    "dinov2": {"image_size": 48, "model_args": VIT},
    "dino_siglip": {"image_size": 48, "model_args": [VIT, VIT]},
    "convnext": {"image_size": 96, "model_args": {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]}},
    "efficientnet": {"image_size": 96},  # its widths are fixed
    "tiny": {},
    "timm": {"name": "test_resnet", "image_size": 96},
    "hf": {"pretrained": "none", "config": {"model_type": "dinov2_with_registers", **TOWER}, **NORMAL},
}


def family(option: str) -> str:
    return max((name for name in SHRINK if option.startswith(name)), key=len)


FAMILIES = list({family(option): option for option in OPTIONS}.values())  # one of each; narrow, they are alike


def settings(option: str, *, small: bool = True, **changes: Any) -> dict[str, Any]:
    """The options of a config file with random weights, narrow where it is big."""
    config = OmegaConf.load(CONF / f"{option}.yaml")
    del config.defaults  # the tiling, which is not the encoder's business
    shrunk = SHRINK[family(option)] if small else {}
    merged = OmegaConf.merge(config, {"weights": "random"}, shrunk, changes)
    plain: Any = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    return plain


def build_encoder(option: str, *, small: bool = True, **changes: Any) -> Any:
    """The encoder of a config file, in evaluation mode, from one seed."""
    torch.manual_seed(0)
    return bind("encoder", settings(option, small=small, **changes))().eval()


def pixels_for(encoder: Any, n: int = 2) -> Tensor:
    return torch.randn(n, 3, *encoder.image_size, generator=torch.Generator().manual_seed(0))


def members(block: nn.Module) -> list[nn.Module]:
    """The blocks of several encoders that stand as one in `JoinedEncoder.blocks()`."""
    return list(block) if type(block) is nn.ModuleList else [block]


# Parameters of the published vision tower as Transformers (with its pooler) or timm (headless) loads it, width and grid
# of its features, and the blocks that are run. BLIP-2 keeps 39 of the 40 blocks of EVA-CLIP's ViT-g as well.
PUBLISHED: dict[str, tuple[int, int, tuple[int, int], int]] = {
    "clip_vit_b32_224": (87_456_000, 768, (7, 7), 11),
    "clip_vit_l14_224": (303_179_776, 1024, (16, 16), 23),
    "clip_vit_l14_336": (303_507_456, 1024, (24, 24), 23),
    "convnext_b_224": (87_566_464, 1024, (7, 7), 4),
    "convnext_l_clip_320": (198_591_168, 1536, (10, 10), 4),
    "dinov2_l14_518": (304_367_616, 1024, (37, 37), 23),
    "efficientnet_lite0": (3_371_008, 768, (6, 6), 7),
    "eva02_l14_336": (303_645_632, 1024, (24, 24), 23),
    "eva_g14_224": (1_011_146_112, 1408, (16, 16), 39),
    "siglip2_so400m16_384": (428_256_704, 1152, (24, 24), 26),
    "siglip_b16_224": (92_884_224, 768, (14, 14), 11),
    "siglip_so400m14_384": (428_225_600, 1152, (27, 27), 26),
    "vit_b16_224": (85_798_656, 768, (14, 14), 11),
    "vit_l16_224": (303_301_632, 1024, (14, 14), 23),
}


CLIP_SIZES = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
NORMALIZED: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.5] * 3}
CLIP = {"model_type": "clip_vision_model", **CLIP_SIZES}
