"""Which parameters of every connector, and of an LLM, are spared weight decay, by their exact names."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from tests.helpers.connectors import OPTIONS, build_connector
from tests.helpers.parts import ADAPTER, LORA, Parts, tiny_llm
from vlm.training.optim import parameter_groups, set_trainable


def norms(*names: str) -> set[str]:
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


def resampler(blocks: int) -> set[str]:
    inside = {
        f"resampler.blocks.{block}.{name}_norm" for block in range(blocks) for name in ("features", "latents", "ff")
    }
    return {"resampler.queries", "resampler.position", "project.bias"} | norms("resampler.norm", *inside)


def regnet(stage: str, depth: int) -> set[str]:
    blocks = [f"{stage}.b{number}" for number in range(1, depth + 1)]
    found = norms(*(f"{block}.conv{number}.bn" for block in blocks for number in (1, 2, 3)))
    return found | {f"{block}.se.fc{number}.bias" for block in blocks for number in (1, 2)}


PERCEPTRON = {"position", "layers.0.bias", "layers.1.bias"} | norms("norm")
GATED = ("attention_gate", "ff_gate", *norms("attention_norm", "ff_norm"))
QFORMER_MATRICES = {
    "attention": ("query", "key", "value", "out"),
    "cross": ("query", "key", "value", "out"),
    "query_feed": ("up", "down"),
}
SPARED: dict[str, set[str]] = {
    "average_pool": PERCEPTRON,
    "c_abstractor": {"position", "mlp.layers.0.bias", "mlp.layers.1.bias"}
    | norms("norm", "mlp.norm", "before.b1.downsample.bn")
    | regnet("before", 3)
    | regnet("after", 3),
    "cross_attention": {
        "places",
        *(f"resampler.{name}" for name in resampler(2)),
        *(f"blocks.{block}.{name}" for block in (0, 1) for name in GATED),
    },
    "flamingo": {
        *(resampler(6) - {"resampler.position", "project.bias"}),  # it has neither
        *(f"blocks.{block}.{name}" for block in range(4) for name in GATED),
    },
    "linear": {"position", "layers.0.bias"} | norms("norm"),
    "mlp": PERCEPTRON,
    "pixel_shuffle": PERCEPTRON,
    "qformer": {"queries", "position", "words.weight", "word_positions.weight", "project.bias"}
    | norms("feature_norm", "norm")
    | {
        name
        for block in range(4)
        for half, matrices in (*QFORMER_MATRICES.items(), ("text_feed", ("up", "down")))
        if half != "cross" or block % 2 == 0
        for name in (
            *norms(f"blocks.{block}.{half}.norm"),
            *(f"blocks.{block}.{half}.{matrix}.bias" for matrix in matrices),
        )
    },
    "resampler": resampler(2),
}


def spared(model: nn.Module, part: str) -> tuple[set[str], set[str]]:
    """Names without weight decay and with it."""
    name_of = {id(parameter): name for name, parameter in getattr(model, part).named_parameters()}
    groups = parameter_groups(model, lr={part: 1.0}, weight_decay=0.1)
    found = {g["name"]: {name_of[id(p)] for p in g["params"]} for g in groups}
    assert {g["name"]: g["weight_decay"] for g in groups} == {f"{part}/decay": 0.1, f"{part}/no_decay": 0.0}
    return found[f"{part}/no_decay"], found[f"{part}/decay"]


def model_of(**parts: nn.Module) -> nn.Module:
    return Parts(**parts)


@pytest.mark.parametrize("option", OPTIONS)
def test_what_decays_in_a_connector(option: str) -> None:
    changes: dict[str, Any] = {"depth": 4, "width": 16, "num_heads": 2, "text": True} if option == "qformer" else {}
    connector = build_connector(option, **changes)
    if option in ("cross_attention", "flamingo"):
        connector.attach([nn.Identity() for _ in range(4)])  # type: ignore[operator]
    without, decayed = spared(model_of(connector=connector), "connector")
    assert without == SPARED[option]
    assert all(connector.get_parameter(name).ndim in (2, 4) for name in decayed)
    assert without | decayed == {name for name, _ in connector.named_parameters()}


def test_every_connector_is_listed() -> None:
    assert sorted(SPARED) == OPTIONS


@pytest.mark.parametrize("tied", [True, False])
def test_the_table_of_an_llm_does_not_decay(tied: bool) -> None:
    """Nor does an output matrix that is the same tensor; one of its own is a layer like others."""
    llm = tiny_llm(tie_word_embeddings=tied)
    without, decayed = spared(model_of(llm=llm), "llm")
    ends = {f"layers.{layer}.{norm}_layernorm" for layer in (0, 1) for norm in ("input", "post_attention")}
    assert without == {f"model.model.{name}.weight" for name in ("embed_tokens", "norm", *ends)}
    assert ("model.lm_head.weight" in decayed) != tied
    assert len(decayed) == 2 * 7 + (not tied)


def test_the_matrices_of_an_adapter_decay() -> None:
    model = model_of(llm=tiny_llm())
    set_trainable(model, {"encoder": "frozen", "connector": "frozen", "llm": "lora"}, LORA)
    (group,) = parameter_groups(model, lr={"llm": 1.0}, weight_decay=0.1)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (group["name"], {name_of[id(p)] for p in group["params"]}) == ("llm/decay", ADAPTER)
