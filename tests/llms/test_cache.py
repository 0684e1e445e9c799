"""The KV cache in buffers against Transformers' DynamicCache, alone and in generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig

from tests.helpers.llms import small_llm
from tests.helpers.parts import IMAGE, make_batch, tiny_model
from vlm.llms import cache, causal
from vlm.llms.cache import BufferedCache, BufferedLayer, BufferedSlidingLayer

WINDOW = 6
ROWS = ([11, IMAGE, 12, IMAGE, 13], [14, 15], [IMAGE, 16, 17, 18, 19, 20, 33, 34])
OPTIONS = ["gemma3_270m", "opt_2_7b", "smollm2_135m"]


def caches() -> tuple[BufferedCache, DynamicCache]:
    """Both kinds, with a sliding and a full layer."""
    config: Any = LlamaConfig(num_hidden_layers=2, sliding_window=WINDOW)
    config.layer_types = ["sliding_attention", "full_attention"]
    return BufferedCache(config=config), DynamicCache(config=config)


def states(length: int, seed: int, *, rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, length, 3, 4, generator=generator).transpose(1, 2)


@pytest.mark.parametrize("free", [0, 3, 64])
def test_keys_and_values_are_those_of_the_dynamic_cache(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "NUM_FREE", free)
    mine, theirs = caches()
    assert [type(layer) for layer in mine.layers] == [BufferedSlidingLayer, BufferedLayer]
    rows = 2
    for step, length in enumerate((4, 1, 1, 1, 5, 1, 1, 2, 1, 1)):
        if step == 4:
            for each in (mine, theirs):
                each.reorder_cache(torch.tensor([1, 0]))
        if step == 6:
            for each in (mine, theirs):
                each.batch_repeat_interleave(2)
                each.batch_select_indices(torch.tensor([0, 3, 1]))
            rows = 3
        for layer in (0, 1):
            keys, values = states(length, 10 * step + layer, rows=rows), states(length, 1000 + step, rows=rows)
            assert mine.get_mask_sizes(length, layer) == theirs.get_mask_sizes(length, layer)
            found, expected = (each.update(keys, values, layer) for each in (mine, theirs))
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
        assert mine.get_seq_length() == theirs.get_seq_length()


def test_a_new_token_is_written_beside_the_others() -> None:
    mine, _ = caches()
    for layer in (0, 1):
        mine.update(states(9, 0), states(9, 1), layer)
    places = [
        (layer.keys.untyped_storage().data_ptr(), layer.values.untyped_storage().data_ptr()) for layer in mine.layers
    ]
    for step in range(cache.NUM_FREE):
        for layer in (0, 1):
            mine.update(states(1, step), states(1, step), layer)
    assert places == [
        (layer.keys.untyped_storage().data_ptr(), layer.values.untyped_storage().data_ptr()) for layer in mine.layers
    ]


def test_tokens_that_were_cropped_are_overwritten() -> None:
    mine, theirs = caches()
    for each in (mine, theirs):
        each.update(states(5, 0), states(5, 1), 1)
        each.layers[1].crop(-2)
    found, expected = (each.update(states(1, 2), states(1, 3), 1) for each in (mine, theirs))
    assert found[0].shape == (2, 3, 4, 4)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("how", ["left-padded", "one row", "beams"])
def test_answers_and_logits_are_those_of_the_dynamic_cache(
    option: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers are longer than the windows of the sliding layers, and than the buffers at first."""
    monkeypatch.setattr(cache, "NUM_FREE", 4)
    model = tiny_model(llm=small_llm(option))  # type: ignore[arg-type]
    batch = make_batch(*[(prompt, []) for prompt in (ROWS[:1] if how == "one row" else ROWS)], side="left")
    logits: list[Tensor] = []
    used = set()

    def see(_: Any, __: Any, output: Any) -> None:
        logits.append(output.logits[:, -1])
        used.add(type(output.past_key_values))

    model.llm.model.register_forward_hook(see)
    options: dict[str, Any] = {"stop_ids": [319], "max_new_tokens": 14, "num_beams": 3 if how == "beams" else 1}
    found = model.generate(batch, **options)
    assert used == {BufferedCache}
    expected = model.generate(batch, **options, past_key_values=DynamicCache(config=model.llm.model.config))
    assert found.tolist() == expected.tolist()
    mine, theirs = torch.stack(logits).chunk(2)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_an_answer_continues_in_the_same_cache() -> None:
    llm: Any = small_llm("gemma3_270m")
    ids = torch.tensor([[11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22]])
    kept = BufferedCache(config=llm.model.config)
    options = {"past_key_values": kept, "max_new_tokens": 9, "eos_token_id": 319, "pad_token_id": 319}
    first = llm.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert kept.get_seq_length() == 12 + 9 - 1
    longer = torch.cat([first, torch.tensor([[40, 41, 42]])], dim=1)
    whole = torch.ones_like(longer)
    continued = llm.model.generate(longer, attention_mask=whole, **options)
    options["past_key_values"] = DynamicCache(config=llm.model.config)
    assert continued.tolist() == llm.model.generate(longer, attention_mask=whole, **options).tolist()


@pytest.mark.parametrize("chosen", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_a_cache_that_was_asked_for_is_kept(chosen: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(*[(prompt, []) for prompt in ROWS], side="left")
    model = tiny_model(llm=small_llm("smollm2_135m"))  # type: ignore[arg-type]
    expected = model.generate(batch, stop_ids=[319], max_new_tokens=4)
    monkeypatch.setattr(causal, "BufferedCache", None)
    assert model.generate(batch, stop_ids=[319], max_new_tokens=4, **chosen).tolist() == expected.tolist()
