"""The resampler is Idefics' at the options that make them the same; what it adds does what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from vlm.connectors.resampler import PerceiverResampler, Resampler

SIZES: dict[str, Any] = {"num_queries": 5, "depth": 2, "num_heads": 3, "head_dim": 8}
FACTS: dict[str, Any] = {"vision_width": 24, "llm_width": 40, "grid": (3, 4), "output_rms": 0.7}


def idefics(*, qk_norm: bool) -> IdeficsPerceiverResampler:
    config = IdeficsConfig(
        vision_config={"embed_dim": 24}, perceiver_config={"qk_layer_norms_perceiver": qk_norm, "use_resampler": True}
    )
    return IdeficsPerceiverResampler(config, embed_dim=24, depth=2, n_heads=3, head_dim=8, n_latents=5)


def renamed(key: str) -> str:
    """Idefics' name of a tensor -> ours."""
    if key == "latents":
        return "queries"
    for theirs, ours in (
        (".0.context_layer_norm", ".features_norm"),
        (".0.latents_layer_norm", ".latents_norm"),
        (".0.output_proj", ".out"),
        (".0.q_layer_norm", ".q_norm"),
        (".0.k_layer_norm", ".k_norm"),
        (".0.q_proj", ".q"),
        (".0.k_proj", ".k"),
        (".0.v_proj", ".v"),
        (".1.ln", ".ff_norm"),
        (".1.fc", ".ff_in"),
        (".1.c_proj", ".ff_out"),
        ("layer_norm", "norm"),
    ):
        key = key.replace(theirs, ours)
    return key


@pytest.mark.parametrize("qk_norm", [False, True])
def test_without_position_it_is_idefics_resampler(qk_norm: bool) -> None:
    torch.manual_seed(0)
    reference = idefics(qk_norm=qk_norm)
    for parameter in reference.parameters():  # norms that do something
        nn.init.normal_(parameter, std=0.5)
    ours = PerceiverResampler(vision_width=24, num_patches=7, position=False, qk_norm=qk_norm, **SIZES)
    ours.load_state_dict({renamed(key): tensor for key, tensor in reference.state_dict().items()})
    features = torch.randn(2, 7, 24) * 3 + 1
    torch.testing.assert_close(ours(features), reference(features), atol=1e-5, rtol=0)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("width", [None, 16])
@pytest.mark.parametrize("position", [False, True])
def test_parameter_count(qk_norm: bool, width: int | None, position: bool) -> None:
    connector = Resampler(**FACTS, **SIZES, ff_mult=3, qk_norm=qk_norm, width=width, position=position)
    p, dv, d = 12, 24, 40
    w, k, depth, a, c = width or dv, 5, 2, 3 * 8, 8
    blocks = depth * (4 * w * a + 2 * 3 * w**2 + 6 * w + 4 * c * qk_norm)
    core = k * w + blocks + 2 * w + p * w * position + (dv * w if width else 0)
    assert sum(x.numel() for x in connector.parameters()) == core + w * d + d


def test_the_place_of_a_patch_matters_only_through_position() -> None:
    torch.manual_seed(0)
    features, order = torch.randn(2, 12, 24), torch.randperm(12)
    blind = Resampler(**FACTS, **SIZES, position=False)
    torch.testing.assert_close(blind(features[:, order]), blind(features), atol=1e-5, rtol=0)
    sighted = Resampler(**FACTS, **SIZES)
    assert (sighted(features[:, order]) - sighted(features)).abs().max() > 0.05


def test_each_query_starts_at_a_patch_of_its_own() -> None:
    torch.manual_seed(0)
    sizes = {"num_queries": 6, "depth": 1, "num_heads": 2, "head_dim": 64}
    resampler = PerceiverResampler(vision_width=128, num_patches=12, **sizes)
    features = torch.randn(1, 12, 128)
    changed = torch.stack([features[0].index_fill(0, torch.tensor(patch), 0.0) for patch in range(12)])
    change = (resampler(changed) - resampler(features)).square().sum(2)  # P K
    assert change.argmax(0).tolist() == [0, 2, 4, 7, 9, 11]


def test_more_queries_than_patches_differ_at_the_start() -> None:
    queries = PerceiverResampler(vision_width=24, num_patches=2, **SIZES).queries
    assert torch.pdist(queries.detach()).min() > 0.3


def test_position_weighs_as_much_as_features_of_any_scale() -> None:
    torch.manual_seed(0)
    connector = Resampler(**FACTS, **SIZES)
    features = torch.randn(2, 12, 24)
    torch.testing.assert_close(connector(features * 1000), connector(features), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("option", "number"), [("num_queries", 0), ("depth", -1)])
def test_nothing_to_attend_with_is_refused(option: str, number: int) -> None:
    with pytest.raises(ValueError, match=rf"connector.{option}={number} must be at least 1"):
        Resampler(**FACTS, **{**SIZES, option: number})
