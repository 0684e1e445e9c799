"""What training starts from and runs in: exact values of what trains, and neither dropout nor recomputing elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.helpers.connectors import connect
from tests.helpers.encoders import CLIP, CLIP_SIZES, NORMALIZED
from tests.helpers.llms import saved, settings
from tests.helpers.parts import LORA, STATES, WHOLE, loader, make_module, make_trainer, tiny_llm
from vlm import build
from vlm.encoders.hf import HFEncoder
from vlm.models.composed import Composed
from vlm.module import VLMModule
from vlm.objectives.language_modeling import LanguageModeling
from vlm.training.optim import set_trainable

TOWERS = {
    "clip": (CLIPVisionModel, CLIPVisionConfig),
    "siglip": (SiglipVisionModel, SiglipVisionConfig),
    "dinov2": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig),
}


def tower(kind: str, folder: Path) -> str:
    """A folder with pretrained weights, which are no round numbers."""
    model, config = TOWERS[kind]
    torch.manual_seed(0)
    dropout = {"attention_dropout": 0.5} if kind == "clip" else {}
    model(config(**CLIP_SIZES, **dropout)).save_pretrained(folder)
    return str(folder)


def composed(encoder: Any, llm: Any) -> Composed:
    torch.manual_seed(2)
    return Composed(encoder=encoder, connector=connect("mlp", encoder, llm), llm=llm)


# --- recomputing -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["pretrained", "random"])
@pytest.mark.parametrize("kind", TOWERS)
def test_blocks_of_a_tower_run_twice_a_step_in_a_fit(kind: str, weights: Any, tmp_path: Path) -> None:
    """Once forward and once in the backward pass; a validation between the steps runs them once a condition."""
    folder = tower(kind, tmp_path / "tower")
    ran: dict[bool, list[int]] = {}
    for on in (False, True):
        encoder = HFEncoder(pretrained=folder, weights=weights, gradient_checkpointing=on, **NORMALIZED)
        counts = [0] * len(encoder.blocks())
        for place, block in enumerate(encoder.blocks()):

            def count(*_: Any, place: int = place, counts: list[int] = counts) -> None:
                counts[place] += torch.is_grad_enabled()

            next(m for m in block.modules() if isinstance(m, nn.LayerNorm)).register_forward_hook(count)
        module = make_module(composed(encoder, tiny_llm()), states={"encoder": "full"})
        every = {"val_check_interval": 1, "check_val_every_n_epoch": None}
        make_trainer(tmp_path, max_steps=3, **every).fit(module, loader([WHOLE] * 3), loader([WHOLE]))
        ran[on] = counts
    assert ran == {False: [3, 3], True: [6, 6]}


# --- dropout ---------------------------------------------------------------------------------------------------------


class Twice(LanguageModeling):
    """The objective on each batch twice, and how far apart the two losses are, with gradients and without."""

    def __init__(self) -> None:
        super().__init__()
        self.apart: dict[bool, list[float]] = {True: [], False: []}

    def forward(self, model: Any, batch: Any) -> Any:
        first, second = (super(Twice, self).forward(model, batch) for _ in range(2))
        difference = abs(first.sums["lm_loss"].item() - second.sums["lm_loss"].item())
        self.apart[torch.is_grad_enabled()].append(difference)
        return second


def adapted_llm() -> Any:
    """An LLM with the adapter of an earlier stage, which says something and drops out."""
    llm = tiny_llm()
    llm.add_lora(**{**LORA, "dropout": 0.5})
    torch.manual_seed(3)
    for name, parameter in llm.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return llm


@pytest.mark.parametrize(
    ("states", "drops"),
    [
        ({"llm": "frozen"}, False),
        ({"llm": "frozen", "encoder": {"last_n": 1}}, False),
        ({"llm": "lora"}, True),
        ({"llm": "full"}, True),
    ],
    ids=str,
)
def test_an_adapter_drops_out_where_it_trains_alone(states: Any, drops: bool, tmp_path: Path) -> None:
    """In the steps of a real fit, after a validation as before it, and never in the validation."""
    encoder = HFEncoder(pretrained=tower("clip", tmp_path / "tower"), **NORMALIZED)
    objective = Twice()
    module = make_module(composed(encoder, adapted_llm()), states=states, objective=objective)
    every = {"val_check_interval": 1, "check_val_every_n_epoch": None}
    make_trainer(tmp_path, max_steps=3, **every).fit(module, loader([WHOLE] * 3), loader([WHOLE]))
    assert [apart > 0 for apart in objective.apart[True]] == [drops] * 3
    assert max(objective.apart[False]) == 0.0


def test_only_the_layers_whose_adapter_trains_drop_out() -> None:
    llm = adapted_llm()
    module = make_module(composed(HFEncoder(pretrained="x", config=CLIP, weights="random", **NORMALIZED), llm),
                         states={"llm": {"last_n": 1}})  # fmt: skip
    dropouts = {name: m.training for name, m in module.model.llm.named_modules() if isinstance(m, nn.Dropout)}
    assert {".layers.1." in name for name, on in dropouts.items() if on} == {True}
    assert {".layers.0." in name for name, on in dropouts.items() if not on} == {True}
    module.eval()
    assert not any(m.training for m in module.modules())


# --- exact values ----------------------------------------------------------------------------------------------------


def built(*words: str, precision: str) -> nn.Module:
    cfg = settings(*words, f"trainer.precision={precision}", "stage=full")
    model, _ = build.build_model(cfg)
    return build.build_module(cfg, model, build.build_objective(cfg)).model


def tensors(part: Any) -> dict[str, Tensor]:
    """Parameters and floating-point buffers."""
    every = {**dict(part.named_parameters()), **dict(part.named_buffers())}
    return {name: tensor.detach() for name, tensor in every.items() if tensor.is_floating_point()}


NORMED = ("encoder=timm", "encoder.name=test_resnet", "encoder.weights=random", "encoder.image_size=64")


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["clip", "siglip", "dinov2", "batch norm"])
@pytest.mark.parametrize("state", ["full", "{last_n: 1}", "frozen"])
def test_an_encoder_that_trains_starts_from_the_values_of_its_file(encoder: str, state: str, tmp_path: Path) -> None:
    words = NORMED
    if encoder != "batch norm":
        folder = tower(encoder, tmp_path)
        words = ("encoder=hf", f"encoder.pretrained={folder}")
        words += ("encoder.mean=[0.5,0.5,0.5]", "encoder.std=[0.5,0.5,0.5]", "encoder.interpolation=bicubic")
    words += (f"stage.encoder={state}", "llm=tiny")
    exact, mixed = (built(*words, precision=kind).encoder for kind in ("32-true", "bf16-mixed"))
    blocks = {"full": [mixed], "frozen": []}.get(state, mixed.blocks()[-1:])
    inside = {t.data_ptr() for block in blocks for t in tensors(block).values()}
    seen = {True: 0, False: 0}
    for name, value in tensors(mixed).items():
        trains, reference = value.data_ptr() in inside, tensors(exact)[name]
        seen[trains] += 1
        assert value.dtype == (torch.float32 if trains else torch.bfloat16), name
        assert torch.equal(value, reference if trains else reference.bfloat16()), name
    assert (seen[True] > 0, seen[False] > 0) == (state != "frozen", state != "full")
    weights = torch.cat([t.flatten() for t in tensors(exact).values()])
    assert (weights.bfloat16().float() != weights).float().mean() > 0.5  # or rounding would not show


@pytest.mark.parametrize("weights", ["pretrained", "random"])
@pytest.mark.parametrize("state", ["full", "{last_n: 1}", "lora", "frozen"])
def test_an_llm_that_trains_starts_from_the_values_of_its_file(state: str, weights: str, tmp_path: Path) -> None:
    words = ("llm=tiny", "encoder.weights=random", f"stage.llm={state}")
    if weights == "pretrained":
        words = ("llm=hf", f"llm.pretrained={saved(tiny_llm(), tmp_path)}", *words[1:], "data.max_length=256")
    exact, mixed = (built(*words, precision=kind).llm for kind in ("32-true", "bf16-mixed"))
    trained = {name for name, p in mixed.named_parameters() if p.requires_grad and "lora" not in name}
    assert bool(trained) == (state not in ("lora", "frozen"))
    for name, value in mixed.named_parameters():
        if "lora" not in name:
            reference = exact.get_parameter(name)
            assert value.dtype == (torch.float32 if name in trained else torch.bfloat16), name
            assert torch.equal(value, reference if name in trained else reference.bfloat16()), name
    for name, value in tensors(mixed).items():
        if "inv_freq" in name:
            assert torch.equal(value, tensors(exact)[name])


def test_what_an_earlier_stage_trained_is_not_rounded_by_a_later_one() -> None:
    """Its tensors come after the bases have been rounded, and stay in float32 where the stage freezes them."""
    cfg = settings("llm=tiny", "encoder.weights=random", "trainer.precision=bf16-mixed", "stage=instruct")
    model, _ = build.build_model(cfg)
    block = model.encoder.blocks()[-1]
    value = torch.randn(block.norm1.weight.shape)
    block.norm1.weight.data = value.clone()
    module = build.build_module(cfg, model, build.build_objective(cfg))
    found = module.model.encoder.blocks()[-1].norm1.weight
    assert not found.requires_grad
    assert torch.equal(found, value)


def test_training_mode_is_that_of_a_fresh_module() -> None:
    """A part that is frozen is in evaluation mode, and stays in it whoever asks."""
    model = composed(HFEncoder(pretrained="x", config=CLIP, weights="random", **NORMALIZED), tiny_llm())
    set_trainable(model, {**STATES}, LORA)
    module = VLMModule(model=model, objective=LanguageModeling(), lr={"connector": 1e-3})
    for _ in range(2):
        assert [part.training for part in (model.encoder, model.connector, model.llm)] == [False, True, False]
        module.train()
