"""The options at full size on the meta device: the published towers, less what no patch feature needs."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from transformers import AutoConfig, AutoModel

from tests.helpers.encoders import OPTIONS, PUBLISHED, build_encoder, settings

# What follows the blocks: the last norm, pooler and head.
TAIL = ("post_layernorm", "head", "norm", "fc_norm", "attn_pool", "conv_head", "bn2")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a network call"))


def reference(config: dict[str, Any]) -> torch.nn.Module:
    """The whole tower as its library builds it."""
    with torch.device("meta"):
        if "config" in config:
            facts = dict(config["config"])
            return AutoModel.from_config(AutoConfig.for_model(facts.pop("model_type"), **facts))
        return timm.create_model(config["name"], num_classes=0, **config["model_args"])


def test_every_option_is_in_the_table() -> None:
    assert set(OPTIONS) == PUBLISHED.keys() | {"tiny", "timm", "hf", "dino_siglip"}


@pytest.mark.parametrize(
    "option",
    [
        pytest.param(option, marks=() if option in ("clip_vit_b32_224", "vit_b16_224") else pytest.mark.slow)
        for option in PUBLISHED
    ],
)
def test_the_tower_is_the_published_one_less_what_features_do_not_need(option: str) -> None:
    published, width, grid, num_blocks = PUBLISHED[option]
    encoder, config = build_encoder(option, small=False, weights="meta"), settings(option, small=False)
    assert config["pretrained"]
    whole = {name: p.shape for name, p in reference(config).named_parameters()}
    ours = {name.partition(".")[2]: p.shape for name, p in encoder.named_parameters()}
    assert sum(shape.numel() for shape in whole.values()) == published == encoder.published_size()
    assert ours.items() <= whole.items()
    after = f".{num_blocks}."  # blocks count from 0, so the first that is not run bears this number
    dropped = [name for name in whole.keys() - ours.keys() if name.split(".")[0] not in TAIL]
    assert [name for name in dropped if after not in name] == []
    assert (encoder.width, encoder.grid, len(encoder.blocks())) == (width, grid, num_blocks)


def test_the_joined_tower_is_the_sum_of_both() -> None:
    encoder = build_encoder("dino_siglip", small=False, weights="meta")
    dino, siglip = (sum(p.numel() for p in one.parameters()) for one in encoder.encoders)
    positions = (37 * 37 - 27 * 27) * 1024  # DINOv2 was trained at 518 pixels
    block, norm = 12_598_272, 2 * 1024
    assert dino == 304_370_688 - positions - block - norm
    alone = build_encoder("siglip_so400m14_384", small=False, weights="meta")
    assert siglip == sum(p.numel() for p in alone.parameters())
    assert (encoder.width, encoder.grid, encoder.image_size) == (1024 + 1152, (27, 27), (378, 378))
    assert [len(one.blocks()) for one in encoder.encoders] == [23, 26]
    assert encoder.published_size() == 304_370_688 + PUBLISHED["siglip_so400m14_384"][0]


def test_tiny_is_tiny() -> None:
    encoder = build_encoder("tiny", small=False)
    assert (encoder.width, encoder.grid, sum(p.numel() for p in encoder.parameters())) == (64, (8, 8), 116_544)
