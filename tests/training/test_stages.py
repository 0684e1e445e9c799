"""What a stage trains, by the exact names; what it says of a state that no part has; which parameters decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.parts import ADAPTER, CONNECTOR, IMAGE, LORA, STATES, make_batch, tiny_llm, tiny_model, trained
from vlm.models.composed import Composed
from vlm.training.optim import check_rates, make_schedule, parameter_groups, set_trainable

LENGTHS = {  # of the weight vectors, which DoRA learns apart from their directions
    f"llm.model.model.layers.{layer}.self_attn.{matrix}.lora_magnitude_vector.default.weight"
    for layer in (0, 1)
    for matrix in ("q_proj", "v_proj")
}
LAST_BLOCK = {
    f"encoder.model.blocks.1.{layer}.{kind}"
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
}
CONNECTOR_LAYERS = {name for name in CONNECTOR if ".layers." in name}
LAST_LAYER = {
    f"llm.model.model.layers.1.{name}.weight"
    for name in (
        *(f"self_attn.{matrix}_proj" for matrix in "qkvo"),
        *(f"mlp.{matrix}_proj" for matrix in ("gate", "up", "down")),
        "input_layernorm",
        "post_attention_layernorm",
    )
}


@pytest.mark.parametrize(
    ("states", "names"),
    [
        pytest.param({}, CONNECTOR, id="align"),
        pytest.param({"llm": "lora"}, CONNECTOR | ADAPTER, id="instruct"),
        pytest.param({"encoder": {"last_n": 1}}, CONNECTOR | LAST_BLOCK, id="last block of the encoder"),
        pytest.param({"connector": "frozen", "llm": {"last_n": 1}}, LAST_LAYER, id="last layer of the llm"),
        pytest.param(
            {"connector": {"only": ["layers"]}},
            CONNECTOR_LAYERS,
            id="one module of the connector",
        ),
    ],
)
def test_exactly_these_train(states: dict[str, Any], names: set[str]) -> None:
    model = tiny_model()
    set_trainable(model, {**STATES, **states}, LORA)
    assert trained(model) == names


def test_dora_trains_the_lengths_too_without_decay() -> None:
    model = tiny_model()
    set_trainable(model, {**STATES, "llm": "lora"}, {**LORA, "use_dora": True})
    assert trained(model) == CONNECTOR | ADAPTER | LENGTHS
    lr = {"encoder": None, "connector": 1e-3, "llm": 1e-4}
    groups = {group["name"]: group["params"] for group in parameter_groups(model, lr=lr, weight_decay=0.1)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in groups["llm/no_decay"]} == LENGTHS
    assert {names[id(p)] for p in groups["llm/decay"]} == ADAPTER


def test_full_trains_a_whole_part() -> None:
    model = tiny_model()
    set_trainable(model, {"encoder": "full", "connector": "frozen", "llm": "frozen"}, {})
    assert trained(model) == {f"encoder.{name}" for name, _ in model.encoder.named_parameters()}


def test_a_second_stage_keeps_the_first_ones_adapter() -> None:
    model = tiny_model()
    set_trainable(model, {**STATES, "llm": "lora"}, LORA)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    set_trainable(model, {**STATES, "llm": "lora"}, {**LORA, "r": 8})
    assert trained(model) == CONNECTOR | ADAPTER
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    set_trainable(model, STATES, {})
    assert trained(model) == CONNECTOR


def test_what_trains_is_float32_on_a_bfloat16_base() -> None:
    model = tiny_model(llm=tiny_llm(dtype="bfloat16"))
    model.encoder.to(torch.bfloat16)
    set_trainable(model, {"encoder": {"last_n": 1}, "connector": "full", "llm": "lora"}, LORA)
    assert {str(p.dtype) for p in model.parameters() if p.requires_grad} == {"torch.float32"}
    assert {str(p.dtype) for p in model.parameters() if not p.requires_grad} == {"torch.bfloat16"}
    with torch.autocast("cpu", torch.bfloat16):
        model(make_batch(([11, IMAGE, 12], [13]))).float().sum().backward()
    silent = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert silent == set()


@pytest.mark.parametrize(
    ("states", "text"),
    [
        ({"llm": "half"}, "stage.llm='half' is not a state of the llm; choose frozen, full, lora, \\{last_n: N\\}"),
        ({"encoder": "lora"}, "stage.encoder='lora' is not a state of the encoder"),
        ({"encoder": {"first_n": 1}}, r"stage.encoder=\{'first_n': 1\} is not a state of the encoder"),
        ({"encoder": {"last_n": 3}}, "stage.encoder.last_n=3 but the encoder has 2 blocks; set it from 1 to 2"),
        ({"llm": {"last_n": 0}}, "stage.llm.last_n=0 but the llm has 2 blocks"),
        (
            {"connector": "frozen"},
            "every part is frozen, so the stage trains nothing; set for example stage.connector=full",
        ),
        ({"connector": {"last_n": 1}}, r"stage.connector=\{'last_n': 1\} is not a state of the connector"),
        (
            {"connector": {"only": []}},
            r"only': \[\]\} is not a state .*; choose frozen, full or \{only: \[<module>\]\}",
        ),
        (
            {"connector": {"only": ["project"]}},
            r"stage.connector.only has 'project', which is not a module of the connector; choose of norm, layers",
        ),
    ],
)
def test_a_wrong_state_is_refused(states: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        set_trainable(tiny_model(), {**STATES, **states}, LORA)


def test_only_matrices_decay() -> None:
    model = tiny_model()
    set_trainable(model, {**STATES, "encoder": {"last_n": 1}, "llm": "lora"}, LORA)
    lr = {"encoder": 1e-5, "connector": 1e-3, "llm": 1e-4}
    groups = parameter_groups(model, lr=lr, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}
    matrices = {name for name in LAST_BLOCK if name.endswith("weight") and "norm" not in name}
    decay = {"connector.layers.0.weight", "connector.layers.1.weight"}
    assert found == {
        "encoder/decay": matrices,
        "encoder/no_decay": LAST_BLOCK - matrices,
        "connector/decay": decay,
        "connector/no_decay": CONNECTOR - decay,
        "llm/decay": ADAPTER,
    }
    settings = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert settings == {
        "encoder/decay": (1e-5, 0.1),
        "encoder/no_decay": (1e-5, 0.0),
        "connector/decay": (1e-3, 0.1),
        "connector/no_decay": (1e-3, 0.0),
        "llm/decay": (1e-4, 0.1),
    }


def test_a_module_or_parameter_may_have_a_rate_of_its_own() -> None:
    model = tiny_model()
    set_trainable(model, STATES, LORA)
    lr: Any = {"connector": {"rest": 1e-4, "norm": 1e-2}}
    groups = parameter_groups(model, lr=lr, weight_decay=0.1)
    assert {group["name"]: (group["lr"], len(group["params"])) for group in groups} == {
        "connector/rest/decay": (1e-4, 2),
        "connector/rest/no_decay": (1e-4, 3),
        "connector/norm/no_decay": (1e-2, 2),
    }
    lr = {"connector": {"rest": 1e-4, "position": 1e-2}}  # a parameter of the connector itself
    names = {
        group["name"]: [p.shape for p in group["params"]] for group in parameter_groups(model, lr=lr, weight_decay=0.0)
    }
    assert names["connector/position/no_decay"] == [model.connector.position.shape]
    with pytest.raises(
        ValueError, match=r"stage.lr.connector names nrm; give a learning rate to the rest and to any of .*norm"
    ):
        parameter_groups(model, lr={"connector": {"rest": 1e-4, "nrm": 1e-2}}, weight_decay=0.0)
    with pytest.raises(
        ValueError, match=r"stage.lr.connector has no rest: {'norm': 0.01}; give a learning rate to the rest"
    ):
        parameter_groups(model, lr={"connector": {"norm": 1e-2}}, weight_decay=0.0)
    with pytest.raises(
        ValueError, match=r"stage.layer_decay=0.8 needs one learning rate, but stage.lr.encoder={'rest'"
    ):
        check_rates(STATES, Composed, lr={"connector": 1e-3, "encoder": {"rest": 1e-4}}, layer_decay=0.8)


@pytest.mark.parametrize(
    ("kind", "after"),
    [
        ("cosine", [1.0, 0.868198, 0.55, 0.231802, 0.1, 0.1]),  # of cos(0), cos(π/4), … cos(π)
        ("linear", [1.0, 0.775, 0.55, 0.325, 0.1, 0.1]),
        ("constant", [1.0] * 6),
    ],
)
def test_a_schedule_by_hand(kind: Any, after: list[float]) -> None:
    """Warm-up in 2 steps, then 4 between the peak 1 and the floor 0.1, for two groups of different peaks."""
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1], "lr": 1.0}, {"params": weights[1:], "lr": 10.0}])
    schedule = make_schedule(optimizer, kind=kind, warmup=2, steps=6, min_ratio=0.1)
    rates = []
    for _ in range(8):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    expected = [0.5, 1.0, *after]
    assert [rate for rate, _ in rates] == pytest.approx(expected, abs=1e-6)
    assert [rate for _, rate in rates] == pytest.approx([10 * rate for rate in expected], abs=1e-5)
