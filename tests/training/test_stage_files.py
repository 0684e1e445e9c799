"""Every file of conf/stage: the exact names that it trains, the groups that learn, and the table that says so."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from tests.helpers.parts import CONNECTOR, trained
from vlm import build, config
from vlm.launch.entry import CONF
from vlm.models.composed import Composed
from vlm.module import VLMModule
from vlm.options import parameters
from vlm.training import run

# The others bring a model of their own, see test_pretraining.py and test_fusion.py.
OWN_MODEL = ("pretrain", "dual_stream", "single_stream")
STAGES = sorted({path.stem for path in (Path(CONF) / "stage").glob("[!_]*.yaml")} - {*OWN_MODEL})
MATRICES = [f"self_attn.{matrix}_proj" for matrix in "qkvo"] + [
    f"mlp.{matrix}_proj" for matrix in ("gate", "up", "down")
]
ADAPTER = {
    f"llm.model.model.layers.{layer}.{matrix}.lora_{side}.default.weight"
    for layer in (0, 1)
    for matrix in MATRICES
    for side in "AB"
}
BLOCKS = {
    f"encoder.model.blocks.{block}.{layer}.{kind}"
    for block in (0, 1)
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
}
STEM = {
    f"encoder.model.{name}" for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")
}
LLM = {
    "llm.model.model.embed_tokens.weight",
    "llm.model.model.norm.weight",
    *(
        f"llm.model.model.layers.{layer}.{name}.weight"
        for layer in (0, 1)
        for name in (*MATRICES, "input_layernorm", "post_attention_layernorm")
    ),
}
TRAINED = {
    "align": CONNECTOR,
    "instruct": CONNECTOR | ADAPTER,
    "vision_tune": CONNECTOR | BLOCKS,
    "full": CONNECTOR | BLOCKS | STEM | LLM,
}
GROUPS = {  # peak learning rate and weight decay
    "align": {"connector/decay": (3e-3, 0.0), "connector/no_decay": (3e-3, 0.0)},
    "instruct": {"connector/decay": (2e-4, 0.0), "connector/no_decay": (2e-4, 0.0), "llm/decay": (2e-4, 0.0)},
    "vision_tune": {
        "encoder/block_0/decay": (0.8e-5, 0.05),
        "encoder/block_0/no_decay": (0.8e-5, 0.0),
        "encoder/block_1/decay": (1e-5, 0.05),
        "encoder/block_1/no_decay": (1e-5, 0.0),
        "connector/decay": (1e-4, 0.05),
        "connector/no_decay": (1e-4, 0.0),
    },
    "full": {
        f"{part}/{kind}": (rate, 0.0)
        for part, rate in (("encoder", 2e-6), ("connector", 2e-5), ("llm", 2e-5))
        for kind in ("decay", "no_decay")
    },
}
TABLE = {  # state and learning rate of encoder, connector, LLM
    "align": [("frozen", "-"), ("full", "0.003"), ("frozen", "-")],
    "instruct": [("frozen", "-"), ("full", "0.0002"), ("lora", "0.0002")],
    "vision_tune": [("last 2", "1e-05, × 0.8 per block"), ("full", "0.0001"), ("frozen", "-")],
    "full": [("full", "2e-06"), ("full", "2e-05"), ("full", "2e-05")],
}


def settings(*overrides: str) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        return config.plain(compose("train", ["llm=tiny", "encoder=tiny", "trainer=cpu", "run_dir=x", *overrides]))


def test_every_file_is_listed() -> None:
    assert STAGES == sorted(TRAINED) == sorted(GROUPS) == sorted(TABLE)


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_stage_trains(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = settings(f"stage={stage}")
    model, _ = build.build_model(cfg)
    module = build.build_module(cfg, model, build.build_objective(cfg))
    assert trained(model) == TRAINED[stage]
    module.trainer = SimpleNamespace(estimated_stepping_batches=100)  # 3 of them warm-up
    groups = module.configure_optimizers()["optimizer"].param_groups
    found = {group["name"]: (group["initial_lr"], group["weight_decay"]) for group in groups}
    assert found == {name: pytest.approx(values) for name, values in GROUPS[stage].items()}
    assert [group["lr"] for group in groups] == pytest.approx([group["initial_lr"] / 3 for group in groups])

    counts = run.count_parameters(model)
    options = {"encoder": "tiny", "connector": "mlp", "llm": "tiny"}
    run.print_parts(counts, options, cfg["stage"], decayed=model.layer_decay_part)
    printed = capsys.readouterr().out
    assert f"Trainable parameters in stage {stage}" in printed
    rows = [[cell.strip() for cell in line.strip("│\n").split("│")] for line in printed.splitlines() if line[:1] == "│"]
    sizes = {
        part: (sum(model.get_parameter(n).numel() for n in TRAINED[stage] if n.startswith(part)), counts[part]["total"])
        for part in options
    }
    assert rows == [
        [part, option, *said, *(f"{size:,}" for size in sizes[part])]
        for (part, option), said in zip(options.items(), TABLE[stage], strict=True)
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_a_file_says_all_that_a_stage_is(stage: str) -> None:
    """Nothing is left to a default in the code, which a reader of the file would not see."""
    keys = {*config.STAGE, *Composed.parts, *parameters(VLMModule)} - {"model", "objective", "evaluators"}
    assert set(settings(f"stage={stage}")["stage"]) == keys


def test_a_stage_may_clip_otherwise_and_the_command_line_has_the_last_word() -> None:
    assert settings()["trainer"]["gradient_clip_val"] == 1.0
    assert settings("stage.gradient_clip_val=0.3")["trainer"]["gradient_clip_val"] == 0.3
    assert settings("stage.gradient_clip_val=null")["trainer"]["gradient_clip_val"] is None
    assert settings("stage.gradient_clip_val=0.3", "trainer.gradient_clip_val=2.0")["trainer"]["gradient_clip_val"] == 2
    with initialize_config_dir(CONF, version_base="1.3"):
        assert compose("eval", ["ckpt=x"]).trainer.gradient_clip_val == 1.0


@pytest.mark.parametrize(
    ("override", "text"),
    [
        (
            "stage.schedule=cosin",
            "stage.schedule='cosin' must be one of cosine, linear, constant",
        ),
        ("stage.layer_decay=much", "stage.layer_decay='much' must be a number above 0 and at most 1 or null"),
        ("stage.layer_decay=1.5", "stage.layer_decay=1.5 must be a number above 0 and at most 1"),
        ("stage.ema_decay=often", "stage.ema_decay='often' must be a number above 0 and below 1"),
        ("stage.ema_decay=1.0", "stage.ema_decay=1.0 must be a number above 0 and below 1"),
        ("stage.gradient_clip_val=hard", "stage.gradient_clip_val='hard' must be a number from 0 to 1,000,000"),
        ("stage.llm=full", "the stage trains the llm but it has no learning rate; set stage.lr.llm"),
    ],
)
def test_a_slip_is_told_before_anything_is_built(override: str, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        config.check(settings(override))


def test_an_adapter_and_layers_of_the_llm_beside_the_encoder() -> None:
    """vision_tune with what its file leaves frozen."""
    cfg = settings("stage=vision_tune", "stage.llm={last_n:1}", "stage.lr.llm=1e-5", "stage.encoder.last_n=1")
    model, _ = build.build_model(cfg)
    build.build_module(cfg, model, build.build_objective(cfg))
    names = trained(model)
    assert names == CONNECTOR | {n for n in BLOCKS if "blocks.1" in n} | {n for n in LLM if "layers.1" in n}
    assert {str(model.get_parameter(name).dtype) for name in names} == {str(torch.float32)}
