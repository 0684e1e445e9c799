"""The last blocks of every kind of encoder: their exact names, their learning rates, and bfloat16 beneath float32."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.encoders import OPTIONS, build_encoder, members, pixels_for
from tests.helpers.parts import PARTS, Parts
from vlm.training import artifact
from vlm.training.optim import parameter_groups, set_trainable
from vlm.training.sharding import gather

STATES: dict[str, Any] = {"connector": "frozen", "llm": "frozen"}


def both(*layers: str) -> list[str]:
    return [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]


VIT = both("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
ATTENTION = [f"self_attn.{matrix}_proj" for matrix in ("q", "k", "v", "out")]
CLIP = both("layer_norm1", *ATTENTION, "layer_norm2", "mlp.fc1", "mlp.fc2")
CONVNEXT = ["gamma", *both("conv_dw", "norm", "mlp.fc1", "mlp.fc2")]
DOWNSAMPLE = both("downsample.0", "downsample.1")
# Of the small versions: blocks, and the names of the last two of them.
LAST: dict[str, tuple[int, list[set[str]]]] = {
    "tiny": (2, [{f"model.blocks.{block}.{name}" for name in VIT} for block in (0, 1)]),
    "clip_vit_b32_224": (2, [{f"tower.encoder.layers.{block}.{name}" for name in CLIP} for block in (0, 1)]),
    "convnext_b_224": (
        4,
        [
            {
                f"model.stages.2.{name}"
                for name in (*DOWNSAMPLE, *(f"blocks.{b}.{n}" for b in (0, 1) for n in CONVNEXT))
            },
            {f"model.stages.3.{name}" for name in (*DOWNSAMPLE, *(f"blocks.0.{n}" for n in CONVNEXT))},
        ],
    ),
    "dino_siglip": (
        2,
        [
            {f"encoders.{encoder}.model.blocks.{block}.{name}" for encoder in (0, 1) for name in VIT}
            | {f"encoders.0.model.blocks.{block}.{scale}.gamma" for scale in ("ls1", "ls2")}
            for block in (0, 1)
        ],
    ),
}


def model_of(option: str, state: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = Parts(encoder=build_encoder(option).to(dtype))
    set_trainable(model, {**STATES, "encoder": state}, {})
    return model


def groups_of(model: nn.Module) -> dict[str, tuple[float, float, set[str]]]:
    """Learning rate, weight decay and names of each group."""
    name_of = {id(parameter): name for name, parameter in model.encoder.named_parameters()}
    groups = parameter_groups(model, lr={"encoder": 1e-3}, weight_decay=0.1, layer_decay=0.5)
    return {g["name"]: (g["lr"], g["weight_decay"], {name_of[id(p)] for p in g["params"]}) for g in groups}


@pytest.mark.parametrize("option", LAST)
def test_the_last_two_blocks_by_name_and_rate(option: str) -> None:
    """The last at 1e-3, the one before it at half of that."""
    depth, names = LAST[option]
    model = model_of(option, {"last_n": 2})
    assert {n for n, p in model.encoder.named_parameters() if p.requires_grad} == names[0] | names[1]
    expected = {}
    for block, rate, inside in ((depth - 2, 0.5e-3, names[0]), (depth - 1, 1e-3, names[1])):
        plain = {
            n for n in inside if n.endswith((".bias", "gamma")) or "norm" in n or n.endswith("downsample.0.weight")
        }
        expected[f"encoder/block_{block}/decay"] = (rate, 0.1, inside - plain)
        expected[f"encoder/block_{block}/no_decay"] = (rate, 0.0, plain)
    assert groups_of(model) == expected


def test_the_blocks_of_the_default_encoder_by_rate() -> None:
    """EfficientNet-Lite0 whole: seven stages, each at half the rate of the one after it; the stem's follows."""
    model = model_of("efficientnet_lite0", "full")
    groups = groups_of(model)
    rates = {name.split("/")[1]: rate for name, (rate, _, _) in groups.items()}
    assert rates == {"stem": 1e-3 / 2**7} | {f"block_{index}": 1e-3 / 2 ** (6 - index) for index in range(7)}
    assert groups["encoder/stem/decay"][2] == {"model.conv_stem.weight"}
    assert groups["encoder/stem/no_decay"][2] == {"model.bn1.weight", "model.bn1.bias"}
    assert groups["encoder/block_0/decay"][2] == {"model.blocks.0.0.conv_dw.weight", "model.blocks.0.0.conv_pw.weight"}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_parameter_learns_at_the_rate_of_its_block(option: str) -> None:
    encoder = build_encoder(option)
    model = model_of(option, "full")
    depth = len(encoder.blocks())
    ours = {id(p): name for name, p in encoder.named_parameters()}
    rates = {name: 1e-3 * 0.5**depth for name in ours.values()}
    for index, block in enumerate(encoder.blocks()):
        rates |= {ours[id(p)]: 1e-3 * 0.5 ** (depth - 1 - index) for p in block.parameters()}
    found = {name: rate for rate, _, names in groups_of(model).values() for name in names}
    assert found == pytest.approx(rates)
    decayed = {name for _, decay, names in groups_of(model).values() if decay for name in names}
    odd = ("bias", "norm", "gamma", "cls", "reg_token", "register", "pos", "mean", "class_embedding")
    assert {name for name in decayed if any(word in name for word in odd)} == set()
    assert decayed


@pytest.mark.slow
@pytest.mark.parametrize("state", ["full", {"last_n": 2}], ids=["full", "last 2"])
@pytest.mark.parametrize("option", OPTIONS)
def test_float32_blocks_on_a_bfloat16_encoder_train(option: str, state: Any) -> None:
    """As in bf16-mixed: frozen blocks in bfloat16, what trains in float32, and autocast around them."""
    encoder = model_of(option, state, torch.bfloat16).encoder
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder.train()(pixels_for(encoder, 1))
        features.float().square().mean().backward()
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            assert parameter.dtype == parameter.grad.dtype == torch.float32, name
            assert math.isfinite(parameter.grad.square().sum().item()), name
    trained = [p for block in encoder.blocks()[-2:] for m in members(block) for p in m.parameters()]
    assert all(parameter.requires_grad for parameter in trained)


def test_blocks_of_an_earlier_stage_run_frozen_on_a_bfloat16_encoder(tmp_path: Path) -> None:
    """Batch norm takes its statistics in the type of its weights, which come back from an artifact as float32."""
    manifest = {
        "bases": {"encoder": {"fingerprint": ""}, "llm": {"fingerprint": ""}},
        "parts": PARTS,
        "quantization": "none",
        "lora": None,
        "num_image_tokens": 1,
        "stages": [],
        "code": {"packages": {}},
    }
    earlier = model_of("efficientnet_lite0", {"last_n": 2}, torch.bfloat16)
    names = [name for name, p in earlier.named_parameters() if p.requires_grad]
    artifact.save(tmp_path / "artifact", tensors=gather(earlier, names), manifest=manifest, step=1)
    model = model_of("efficientnet_lite0", {"last_n": 1}, torch.bfloat16)
    artifact.load(tmp_path, model=model, manifest=manifest)
    block = model.encoder.blocks()[-2]
    assert {str(p.dtype) for p in block.parameters()} == {"torch.float32"}
    assert not any(p.requires_grad for p in block.parameters())
    pixels = pixels_for(model.encoder, 1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.encoder(pixels), earlier.encoder(pixels), rtol=0.05, atol=0.05)
