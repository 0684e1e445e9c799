"""Every connector option keeps the contract, and starts at the scale of the LLM's own embeddings."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from tests.helpers.connectors import GRIDS, OPTIONS, SIZES, build_connector
from vlm.connectors.linear import Linear
from vlm.connectors.mlp import ACTIVATIONS, MLP, moments

# Flamingo's visual tokens have the encoder's width, and start as the queries, which are the same for all images.
AS_PUBLISHED = ["flamingo"]
SCALED = [option for option in OPTIONS if option not in AS_PUBLISHED]


def width_of(option: str) -> int:
    return SIZES["vision_width" if option in AS_PUBLISHED else "llm_width"]


def features_for(option: str, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    rows, cols = GRIDS.get(option, SIZES["grid"])
    return torch.randn(n, rows * cols, 48, dtype=dtype)


def features_like_a_convnets(n: int, patches: int, width: int) -> Tensor:
    """Channels of different mean and scale, and patches that look like each other."""
    generator = torch.Generator().manual_seed(0)
    scale, shift = torch.rand(2, width, generator=generator) * 5
    image = torch.randn(n, 1, width, generator=generator)
    return (image + torch.randn(n, patches, width, generator=generator)) * scale + shift


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def small(option: str) -> Any:
    """A Q-Former as published has 100 million parameters."""
    return build_connector(option, **({"depth": 2, "width": 96, "num_heads": 4} if option == "qformer" else {}))


@pytest.mark.parametrize("option", OPTIONS)
def test_contract(option: str) -> None:
    connector = small(option)
    visual = connector(features_for(option, 2))
    assert connector.fusion in ("tokens", "layers")
    assert visual.shape == (2, connector.num_tokens, width_of(option))


@pytest.mark.parametrize("option", OPTIONS)
def test_gradients_reach_every_parameter(option: str) -> None:
    connector = small(option)
    connector(features_for(option, 2)).square().sum().backward()
    assert [name for name, p in connector.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("option", OPTIONS)
def test_a_batch_without_images_gives_no_tokens_and_zero_gradients(option: str) -> None:
    connector = small(option)
    visual = connector(features_for(option, 0))
    assert visual.shape == (0, connector.num_tokens, width_of(option))
    visual.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in connector.parameters())


@pytest.mark.parametrize("option", SCALED)
@pytest.mark.parametrize("output_rms", [1.03, 0.05])
def test_visual_tokens_start_at_the_scale_of_the_embeddings(option: str, output_rms: float) -> None:
    torch.manual_seed(0)
    connector = build_connector(option, vision_width=320, llm_width=256, grid=(6, 6), output_rms=output_rms)
    visual = connector(features_like_a_convnets(8, 36, 320))
    assert visual.square().mean().sqrt().item() == pytest.approx(output_rms, rel=0.15)


@pytest.mark.parametrize("option", SCALED)
def test_visual_tokens_start_with_the_picture_in_them(option: str) -> None:
    """Where most of their energy was the same for all pictures, connectors hardly learned (docs/log.md)."""
    torch.manual_seed(0)
    connector = build_connector(option, vision_width=320, llm_width=256, grid=(6, 6))
    visual = connector(features_like_a_convnets(8, 36, 320))
    share = (visual - visual.mean(0)).square().mean() / visual.square().mean()
    assert share > 0.5


@pytest.mark.parametrize("option", OPTIONS)
def test_features_of_a_narrower_type_are_taken(option: str) -> None:
    assert small(option)(features_for(option, 2, torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(
    ("activation", "mean", "second"),
    [  # of relu by symmetry; of gelu with E[z·f(z)] = E[f'(z)] (Stein)
        ("relu", 1 / math.sqrt(2 * math.pi), 1 / 2),
        ("gelu", 1 / (2 * math.sqrt(math.pi)), 1 / 3 + 1 / (2 * math.pi * math.sqrt(3))),
    ],
)
def test_moments_of_an_activation(activation: str, mean: float, second: float) -> None:
    assert moments(ACTIVATIONS[activation]) == pytest.approx((mean, second - mean**2))


@pytest.mark.parametrize(("depth", "activation"), [(1, "gelu"), (2, "gelu"), (3, "silu"), (4, "gelu"), (3, "relu")])
def test_scale_holds_at_any_depth(depth: int, activation: Literal["gelu", "relu", "silu"]) -> None:
    torch.manual_seed(0)
    connector = MLP(
        **{**SIZES, "vision_width": 320, "llm_width": 256, "grid": (7, 7), "output_rms": 0.7},
        depth=depth,
        hidden_width=512,
        activation=activation,
    )
    assert connector(features_like_a_convnets(8, 49, 320)).square().mean().sqrt().item() == pytest.approx(0.7, rel=0.15)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_unrelated_patches_start_with_nothing_in_common(activation: str) -> None:
    """A third to a half of the tokens' energy would be their mean if the activation kept its own."""
    torch.manual_seed(0)
    visual = build_connector("mlp", vision_width=320, llm_width=256, activation=activation)(torch.randn(40, 12, 320))
    assert (visual.mean((0, 1)).square().sum() / visual.square().mean((0, 1)).sum()).item() < 0.02


def test_parameter_counts() -> None:
    # Written out for Dv=48, D=40, P=12: matrices and biases, the norm's 2·Dv, the positions' P·D.
    assert count(build_connector("linear")) == 48 * 40 + 40 + 2 * 48 + 12 * 40
    assert count(build_connector("linear", norm=False, position=False)) == 48 * 40 + 40
    assert count(build_connector("mlp")) == 48 * 40 + 40 * 40 + 2 * 40 + 2 * 48 + 12 * 40
    assert count(build_connector("mlp", norm=False, position=False)) == 48 * 40 + 40 * 40 + 2 * 40
    narrow = build_connector("mlp", depth=3, hidden_width=7, norm=False, position=False)
    assert count(narrow) == 48 * 7 + 7 * 7 + 7 * 40 + 7 + 7 + 40


def test_position_is_added_per_visual_token() -> None:
    connector = build_connector("mlp")
    features = torch.randn(2, 12, 48)
    before = connector(features)
    with torch.no_grad():
        connector.position.copy_(torch.arange(12.0)[:, None].expand(12, 40))
    torch.testing.assert_close(connector(features) - before, torch.arange(12.0)[None, :, None].expand(2, 12, 40))


def test_mlp_without_additions_is_llavas_projector() -> None:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=48, num_attention_heads=4),
        text_config=LlamaConfig(hidden_size=40, num_attention_heads=4),
    )
    reference = LlavaMultiModalProjector(config)
    connector = build_connector("mlp", norm=False, position=False)
    renamed = {
        key.replace("linear_1", "layers.0").replace("linear_2", "layers.1"): v
        for key, v in reference.state_dict().items()
    }
    connector.load_state_dict(renamed)
    features = torch.randn(2, 12, 48)
    torch.testing.assert_close(connector(features), reference(features), atol=1e-6, rtol=0)


def test_linear_without_additions_is_one_matrix_with_pytorchs_initialisation() -> None:
    torch.manual_seed(5)
    connector = Linear(**SIZES, norm=False, position=False)
    torch.manual_seed(5)
    reference = nn.Linear(48, 40)
    features = torch.randn(2, 12, 48)
    assert torch.equal(connector(features), reference(features))


def test_mlp_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"connector.depth=0 must be at least 1"):
        MLP(**SIZES, depth=0)
