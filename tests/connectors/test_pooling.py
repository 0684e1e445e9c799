"""The connectors that lower the number of tokens by their place in the picture."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector

from vlm.connectors.average_pool import AveragePool
from vlm.connectors.c_abstractor import CAbstractor
from vlm.connectors.mlp import MLP
from vlm.connectors.pixel_shuffle import PixelShuffle, pixel_shuffle

FACTS: dict[str, Any] = {"vision_width": 24, "llm_width": 40, "output_rms": 0.7}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_average_pool_is_the_mlp_on_averages() -> None:
    connector = AveragePool(**FACTS, grid=(2, 6), activation="relu")
    mlp = MLP(**FACTS, grid=(1, 3), activation="relu")
    mlp.load_state_dict(connector.state_dict())
    features = torch.randn(2, 12, 24)
    # Patches are numbered row by row: the first token sees columns 0 and 1 of both rows of six.
    averages = torch.stack([features[:, [c, c + 1, c + 6, c + 7]].mean(1) for c in (0, 2, 4)], dim=1)
    torch.testing.assert_close(connector(features), mlp(averages), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("grid", "asked", "tokens"), [((3, 5), None, 6), ((24, 24), None, 144), ((3, 5), [1, 4], 4)])
def test_average_pool_has_the_tokens_of_its_output_grid(grid: Any, asked: Any, tokens: int) -> None:
    connector = AveragePool(**FACTS, grid=grid, output_grid=asked)
    assert connector.num_tokens == tokens
    assert connector(torch.randn(1, grid[0] * grid[1], 24)).shape == (1, tokens, 40)


@pytest.mark.parametrize("asked", [[4, 2], [0, 1], [2]])
def test_an_output_grid_that_does_not_fit_is_refused(asked: list[int]) -> None:
    said = rf"connector.output_grid=\[{', '.join(map(str, asked))}\] does not fit .* 3×5 grid; .* at most \[3, 5\]"
    with pytest.raises(ValueError, match=said):
        AveragePool(**FACTS, grid=(3, 5), output_grid=asked)


@pytest.mark.parametrize("factor", [2, 3])
def test_pixel_shuffle_is_idefics3s_connector(factor: int) -> None:
    torch.manual_seed(0)
    side = SimpleNamespace
    config = side(scale_factor=factor, vision_config=side(hidden_size=24), text_config=side(hidden_size=40))
    reference = Idefics3Connector(config)
    connector = PixelShuffle(**FACTS, grid=(6, 6), factor=factor, depth=1, norm=False, position=False)
    connector.load_state_dict(
        {"layers.0.weight": reference.modality_projection.proj.weight, "layers.0.bias": torch.zeros(40)}
    )
    features = torch.randn(2, 36, 24)
    assert torch.equal(pixel_shuffle(features, (6, 6), factor), reference.pixel_shuffle(features, factor))
    torch.testing.assert_close(connector(features), reference(features), atol=1e-6, rtol=0)


def test_pixel_shuffle_is_internvls_projector() -> None:
    torch.manual_seed(0)
    config = SimpleNamespace(
        vision_config=SimpleNamespace(hidden_size=24),
        text_config=SimpleNamespace(hidden_size=40),
        downsample_ratio=0.5,
        projector_hidden_act="gelu",
    )
    reference = InternVLMultiModalProjector(config)
    connector = PixelShuffle(**FACTS, grid=(4, 4), position=False)
    names = {"layer_norm": "norm", "linear_1": "layers.0", "linear_2": "layers.1"}
    theirs = {key.rpartition("."): tensor for key, tensor in reference.state_dict().items()}
    connector.load_state_dict({f"{names[layer]}.{kind}": tensor for (layer, _, kind), tensor in theirs.items()})
    with torch.no_grad():  # ours takes the activation's mean off, which a bias makes good
        connector.layers[1].bias += connector.shift * connector.layers[1].weight.sum(1)
    features = torch.randn(2, 16, 24)
    squares = InternVLModel.pixel_shuffle(None, features.unflatten(1, (4, 4)), scale_factor=0.5).flatten(1, 2)
    torch.testing.assert_close(connector(features), reference(squares), atol=1e-5, rtol=0)


def test_pixel_shuffle_takes_a_grid_that_is_no_square() -> None:
    features = torch.arange(8.0).view(1, 8, 1)  # 2 rows of 4 patches
    assert pixel_shuffle(features, (2, 4), 2).tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7]]]


@pytest.mark.parametrize(("grid", "factor"), [((6, 7), 2), ((7, 6), 2), ((6, 6), 4), ((6, 6), 0)])
def test_a_grid_that_the_factor_does_not_divide_is_refused(grid: tuple[int, int], factor: int) -> None:
    said = rf"connector.factor={factor} does not divide .* {grid[0]}×{grid[1]} grid; .*encoder.image_size"
    with pytest.raises(ValueError, match=said):
        PixelShuffle(**FACTS, grid=grid, factor=factor)


def regnet_block(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """A bottleneck block written out: 1×1, depthwise 3×3, squeeze and excitation, 1×1, and the shortcut."""

    def conv(x: Tensor, name: str, **options: Any) -> Tensor:
        x = F.conv2d(x, weights[f"{name}.conv.weight"], **options).permute(0, 2, 3, 1)
        x = F.layer_norm(x, x.shape[-1:], weights[f"{name}.bn.weight"], weights[f"{name}.bn.bias"])
        return x.permute(0, 3, 1, 2)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"].flatten(1), weights[f"{name}.bias"])

    shortcut = conv(x, "downsample") if "downsample.conv.weight" in weights else x
    x = F.silu(conv(x, "conv1"))
    x = F.silu(conv(x, "conv2", padding=1, groups=x.shape[1]))
    gate = linear(F.silu(linear(x.mean((2, 3)), "se.fc1")), "se.fc2").sigmoid()
    return F.silu(conv(x * gate[:, :, None, None], "conv3") + shortcut)


def test_c_abstractor_is_blocks_around_a_pooling() -> None:
    torch.manual_seed(0)
    connector = CAbstractor(**FACTS, grid=(4, 4), hidden_width=12, depth=2, num_queries=4, norm=False)
    nn.init.normal_(connector.position)
    weights = connector.state_dict()

    def stage(maps: Tensor, name: str) -> Tensor:
        for block in ("b1", "b2"):
            prefix = f"{name}.{block}."
            maps = regnet_block(maps, {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
        return maps

    features = torch.randn(2, 16, 24)
    maps = stage((features + weights["position"]).transpose(1, 2).reshape(2, 24, 4, 4), "before")
    maps = stage(F.avg_pool2d(maps, 2), "after")
    hidden = F.linear(maps.flatten(2).transpose(1, 2), weights["mlp.layers.0.weight"], weights["mlp.layers.0.bias"])
    expected = F.linear(F.silu(hidden), weights["mlp.layers.1.weight"], weights["mlp.layers.1.bias"])
    torch.testing.assert_close(connector(features), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("side", "num_queries", "tokens"), [(5, None, 9), (24, None, 144), (5, 4, 4), (5, 25, 25)])
def test_c_abstractor_has_as_many_tokens_as_are_asked_for(side: int, num_queries: int | None, tokens: int) -> None:
    connector = CAbstractor(**FACTS, grid=(side, side), num_queries=num_queries, hidden_width=8, depth=1)
    assert connector.num_tokens == tokens
    assert connector(torch.randn(1, side**2, 24)).shape == (1, tokens, 40)


@pytest.mark.parametrize(("num_queries", "near"), [(10, 9), (49, 36), (0, 1), (-4, 1)])
def test_c_abstractor_refuses_tokens_that_are_no_square_or_too_many(num_queries: int, near: int) -> None:
    said = rf"connector.num_queries={num_queries} must be a square number from 1 to 36, .* for example to {near}$"
    with pytest.raises(ValueError, match=said):
        CAbstractor(**FACTS, grid=(6, 6), num_queries=num_queries)


def test_c_abstractor_refuses_a_grid_that_is_no_square_and_no_blocks() -> None:
    with pytest.raises(ValueError, match=r"connector=c_abstractor needs a square grid, .* 3×4; set encoder.image_size"):
        CAbstractor(**FACTS, grid=(3, 4))
    with pytest.raises(ValueError, match=r"connector.depth=0 must be at least 1"):
        CAbstractor(**FACTS, grid=(3, 3), depth=0)


def test_parameter_counts() -> None:
    # Written out as the docstrings say, for Dv=24, D=40.
    mlp = 24 * 40 + 40**2 + 2 * 40
    assert count(AveragePool(**FACTS, grid=(3, 4))) == mlp + 2 * 24 + 2 * 2 * 40
    wide = 4 * 24
    assert count(PixelShuffle(**FACTS, grid=(2, 6))) == wide * 40 + 40**2 + 2 * 40 + 2 * wide + 3 * 40


@pytest.mark.parametrize("hidden_width", [16, 24])
def test_parameter_count_of_the_c_abstractor(hidden_width: int) -> None:
    dv, w, d, p, depth = 24, hidden_width, 40, 16, 3

    def block(i: int) -> int:
        s = round(i / 4)
        return i * w + w**2 + 16 * w + s * (2 * w + 1) + (i * w + 2 * w if i != w else 0)

    whole = block(dv) + (2 * depth - 1) * block(w) + w * d + d**2 + 2 * d + p * dv + 2 * dv + 2 * w
    assert count(CAbstractor(**FACTS, grid=(4, 4), hidden_width=hidden_width, depth=depth)) == whole
