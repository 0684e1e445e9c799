"""Samples that share a row: each is answered as if it stood alone, for every connector and LLM that allows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.connectors import OPTIONS, connect
from tests.helpers.llms import FAMILIES, t5
from tests.helpers.parts import IMAGE, SPEC, make_rows, tiny_encoder, tiny_llm
from vlm.connectors.cross_attention import GATE_SCALE
from vlm.data.collate import collate, join
from vlm.models.composed import Composed
from vlm.objectives.language_modeling import SummedCrossEntropy
from vlm.schema import Batch

# Two images, none, an image after some text, one image at the start; text before an image must not see another's.
PROMPTS: list[tuple[list[int | None], list[int]]] = [
    ([11, IMAGE, 12, 13, IMAGE, 14], [21, 22]),
    ([15, 16], [23, 24]),
    ([17, 18, IMAGE, 19], [25]),
    ([IMAGE, 30, 31], [26, 27, 28]),
]


def model_with(option: str, **llm: Any) -> Composed:
    """Random parts of one size, whose gates, if any, stand open."""
    encoder, language = tiny_encoder(), tiny_llm(**llm)
    small = {"depth": 2, "width": 32, "num_heads": 4} if option == "qformer" else {}
    torch.manual_seed(3)
    connector = connect(option, encoder, language, **small)
    model = Composed(encoder=encoder, connector=connector, llm=language)
    for name, parameter in connector.named_parameters():
        if name.endswith("_gate"):
            nn.init.constant_(parameter, 0.5 / GATE_SCALE)
    return model.eval()


def batches(model: Composed) -> tuple[Batch, Batch]:
    """The same samples: one a row, and in two rows of different length."""
    num_tokens = model.connector.num_tokens if model.connector.fusion == "tokens" else 0
    rows = make_rows(*PROMPTS, num_tokens=num_tokens)
    options: dict[str, Any] = {"spec": SPEC, "pad_id": 0}
    return collate(rows, **options), collate([join(rows[:3]), join(rows[3:])], **options)


def losses(model: Composed, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The loss of each sample, and the connector's gradients."""
    model.zero_grad()
    total, each = SummedCrossEntropy.apply(model(batch), batch.targets)
    total.backward()
    owner = batch.sample_index[batch.logits_mask]
    by_sample = {name: each[owner == number] for number, name in enumerate(batch.ids)}
    return by_sample, {n: p.grad.clone() for n, p in model.connector.named_parameters() if p.grad is not None}


def assert_equal(model: Composed) -> None:
    alone, packed = batches(model)
    assert packed.input_ids.shape[0] == 2 < alone.input_ids.shape[0]
    expected, expected_gradients = losses(model, alone)
    found, gradients = losses(model, packed)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_connector(option: str) -> None:
    assert_equal(model_with(option))


def test_all_previous_images_are_those_of_the_sample() -> None:
    model = model_with("cross_attention")
    model.connector.all_previous_images = True
    assert_equal(model)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_of_llms(family: str) -> None:
    model = model_with("mlp", model_type=family, **FAMILIES[family])
    model.llm.check_packing()
    assert_equal(model)


def test_a_sliding_window_counts_from_the_sample() -> None:
    window = {"sliding_window": 3, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
    model = model_with("mlp", model_type="gemma3_text", **window)
    model.llm.check_packing()
    assert_equal(model)


def test_an_llm_that_looks_across_samples_is_refused() -> None:
    facts = {"word_embed_proj_dim": 32, "ffn_dim": 64, "do_layer_norm_before": True, "init_std": 0.2}
    with pytest.raises(ValueError, match=r"llm opt attends across samples of one row; set data.packing=false"):
        tiny_llm("opt", **facts).check_packing()


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes one sample per row; set data.packing=false"):
        t5().check_packing()
