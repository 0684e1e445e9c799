"""Small random versions of every encoder option: the YAML's own facts, but narrow and shallow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from vlm.options import bind

torch.set_num_threads(1)  # tiny matrices: threads would only wait for each other

CONF = Path(__file__).parents[1] / "conf" / "encoder"
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
    "eva": {"image_size": 48, "model_args": VIT},
    "dinov2": {"image_size": 48, "model_args": VIT},
    "dino_siglip": {"image_size": 48, "model_args": [VIT, VIT]},
    "convnext": {"image_size": 96, "model_args": {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]}},
    "efficientnet": {"image_size": 96},  # its widths are fixed
    "tiny": {},
    "timm": {"name": "test_resnet", "image_size": 96},
    "hf": {"pretrained": "none", "config": {"model_type": "dinov2_with_registers", **TOWER}, **NORMAL},
}


def settings(option: str, *, small: bool = True, **changes: Any) -> dict[str, Any]:
    """The options of a config file with random weights, narrow where it is big."""
    config = OmegaConf.load(CONF / f"{option}.yaml")
    del config.defaults  # the tiling, which is not the encoder's business
    family = max((name for name in SHRINK if option.startswith(name)), key=len)
    shrunk = SHRINK[family] if small else {}
    merged = OmegaConf.merge(config, {"weights": "random"}, shrunk, changes)
    plain: Any = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    return plain


def build(option: str, *, small: bool = True, **changes: Any) -> Any:
    """The encoder of a config file, in evaluation mode, from one seed."""
    torch.manual_seed(0)
    return bind("encoder", settings(option, small=small, **changes))().eval()


def pixels_for(encoder: Any, n: int = 2) -> Tensor:
    return torch.randn(n, 3, *encoder.image_size, generator=torch.Generator().manual_seed(0))


def members(block: nn.Module) -> list[nn.Module]:
    """The blocks of several encoders that stand as one in `JoinedEncoder.blocks()`."""
    return list(block) if type(block) is nn.ModuleList else [block]
