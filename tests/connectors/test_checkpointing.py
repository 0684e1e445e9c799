"""Every connector learns the same whether the LLM keeps what its layers computed or computes it again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.connectors import OPTIONS, connect, settings
from tests.helpers.llms import small_llm
from tests.helpers.parts import IMAGE, LORA, STATES, make_batch, tiny_encoder
from vlm.models.composed import Composed
from vlm.objectives.language_modeling import LanguageModeling
from vlm.training.optim import set_trainable

SMALL = {"depth": 2, "width": 16, "hidden_width": 16, "num_heads": 2, "head_dim": 8, "num_queries": 4}
ROWS = (([11, IMAGE, 12], [21, 22]), ([14, 15], [23]), ([16, IMAGE, IMAGE], [24, 25, 26]))


def model_with(option: str, *, checkpointing: bool, state: str) -> Composed:
    """A model of tiny parts; no gate of the connector and no matrix of the adapter is closed."""
    encoder, llm = tiny_encoder(), small_llm("vicuna_7b", gradient_checkpointing=checkpointing)
    small = {key: SMALL[key] for key, value in settings(option).items() if key in SMALL and value is not None}
    torch.manual_seed(0)
    model = Composed(encoder=encoder, connector=connect(option, encoder, llm, **small), llm=llm)
    set_trainable(model, {**STATES, "llm": state}, LORA)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def gradients(model: Composed) -> dict[str, Tensor]:
    batch = make_batch(*ROWS, num_tokens=model.visual_spec().num_tokens)
    output = LanguageModeling()(model, batch)
    (output.sums["lm_loss"] / output.counts["lm_loss"]).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def calls(module: nn.Module) -> list[int]:
    """Filled with an item at every call of the module from now on."""
    made: list[int] = []
    module.register_forward_hook(lambda *_: made.append(1))
    return made


@pytest.mark.parametrize("state", ["frozen", "lora"])
@pytest.mark.parametrize("option", OPTIONS)
def test_gradients_are_equal_with_checkpointing(option: str, state: str) -> None:
    kept, recomputed = (model_with(option, checkpointing=on, state=state) for on in (False, True))
    once, twice = (calls(model.llm.layers()[1].self_attn) for model in (kept, recomputed))
    expected, found = gradients(kept), gradients(recomputed)
    assert (len(once), len(twice)) == (1, 2)
    assert found.keys() == expected.keys() == {name for name, p in kept.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in found) == (state == "lora")
    assert [name for name, gradient in expected.items() if not gradient.any()] == []
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
