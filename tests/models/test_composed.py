"""The model against the bare LLM of Transformers on random weights: same logits, same words, pictures in place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.helpers.llms import FAMILIES
from tests.helpers.parts import IMAGE, NUM_TOKENS, Gated, make_batch, tiny_llm, tiny_model
from vlm.schema import IGNORE

TEXT_ROWS = (([11, 12, 13], [21, 22]), ([14, 15, 16, 17, 18, 19, 20], [23, 24, 25]))
ROWS = (([11, IMAGE, 12, IMAGE, 13], [21]), ([14, 15], [22, 23]), ([IMAGE, 16], [24]))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_at_keep_are_those_of_the_bare_model(family: str) -> None:
    llm = tiny_llm(family, **FAMILIES[family])
    batch = make_batch(*TEXT_ROWS)
    bare = llm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits  # B T V
    logits = tiny_model(llm=llm)(batch)
    assert logits.shape == (5, 320)
    torch.testing.assert_close(logits, bare[batch.logits_mask], rtol=1e-5, atol=1e-5)
    assert batch.logits_mask.nonzero().tolist() == [[0, 2], [0, 3], [1, 6], [1, 7], [1, 8]]
    assert batch.targets.tolist() == [21, 22, 23, 24, 25]
    wide = llm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    assert wide.shape == (2, 10, 320), "the hook that narrows the head is gone"


def test_gemma2_logits_are_capped() -> None:
    """What the parity above would not see if the cap did nothing at these sizes."""
    batch = make_batch(*TEXT_ROWS)
    free = tiny_model(llm=tiny_llm("gemma2", **{**FAMILIES["gemma2"], "final_logit_softcapping": None}))(batch)
    capped = tiny_model(llm=tiny_llm("gemma2", **FAMILIES["gemma2"]))(batch)
    torch.testing.assert_close(capped, 2 * torch.tanh(free / 2), rtol=1e-5, atol=1e-5)
    assert (free - capped).abs().max() > 0.1


def test_visual_tokens_lie_where_the_placeholders_are() -> None:
    model, batch = tiny_model(), make_batch(*ROWS)
    given: dict[str, Any] = {}
    model.llm.model.register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True)
    model(batch)
    visual, embeds = model.connector(model.encoder(batch.pixel_values)), given["inputs_embeds"]
    assert visual.shape == (3, NUM_TOKENS, 32)
    torch.testing.assert_close(embeds[0, 1:5], visual[0], rtol=0, atol=0)
    torch.testing.assert_close(embeds[0, 6:10], visual[1], rtol=0, atol=0)
    torch.testing.assert_close(embeds[2, 0:4], visual[2], rtol=0, atol=0)
    elsewhere = ~batch.image_mask
    torch.testing.assert_close(embeds[elsewhere], model.llm.embed(batch.input_ids)[elsewhere], rtol=0, atol=0)
    assert batch.image_mask.sum(1).tolist() == [8, 0, 4]


def test_a_picture_changes_its_own_row_alone() -> None:
    model, batch = tiny_model(), make_batch(*ROWS)
    before = model(batch)  # supervised: row 0 once, row 1 twice, row 2 once
    pixels = batch.pixel_values.clone()
    pixels[2] += 1
    after = model(replace(batch, pixel_values=pixels))
    torch.testing.assert_close(after[:3], before[:3])
    assert (after[3] - before[3]).abs().max() > 1e-3


def test_padding_changes_nothing() -> None:
    model = tiny_model()
    together = model(make_batch(*ROWS))
    alone = model(make_batch(ROWS[1]))
    torch.testing.assert_close(together[1:3], alone, rtol=1e-5, atol=1e-5)


def test_a_wrong_count_names_both_numbers() -> None:
    batch = make_batch(([IMAGE, 12, IMAGE, 13], [21]), num_tokens=3)
    with pytest.raises(ValueError, match=r"6 image placeholders but 2 images of 4 visual tokens = 8.*sample/0"):
        tiny_model()(batch)


@pytest.mark.parametrize("fusion", ["tokens", "layers"])
def test_a_batch_without_pictures(fusion: str) -> None:
    model = tiny_model(connector=Gated() if fusion == "layers" else None)
    batch = make_batch(*TEXT_ROWS)
    assert batch.pixel_values.shape == (0, 3, 16, 16)
    bare = model.llm(model.llm.embed(batch.input_ids), batch.attention_mask, batch.position_ids, batch.logits_mask)
    if fusion == "tokens":
        torch.testing.assert_close(model(batch), bare, rtol=0, atol=0)
    with torch.no_grad():
        assert model(batch).isfinite().all()


def test_layers_fusion_starts_as_the_bare_llm() -> None:
    batch = make_batch(*ROWS, num_tokens=0)
    llm = tiny_llm()
    names = list(llm.state_dict())
    bare = llm(llm.embed(batch.input_ids), batch.attention_mask, batch.position_ids, batch.logits_mask)
    model = tiny_model(llm=llm, connector=Gated())
    assert torch.equal(model(batch), bare)
    assert list(llm.state_dict()) == names
    assert {name for name in model.state_dict() if name.startswith("connector.")} == {
        "connector.project.weight",
        "connector.project.bias",
        "connector.gate",
    }
    model.connector.gate.data.fill_(0.5)
    opened = model(batch)
    assert (opened - bare)[[0, 3]].abs().max() > 1e-2
    assert torch.equal(opened[1:3], bare[1:3]), "the row without a picture"
    opened.sum().backward()
    assert model.connector.gate.grad != 0


@pytest.mark.parametrize("fusion", ["tokens", "layers"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_greedy_words_are_the_repeated_argmax(family: str, fusion: str) -> None:
    connector = Gated() if fusion == "layers" else None
    if connector is not None:
        connector.gate.data.fill_(0.3)
    num_tokens = 0 if fusion == "layers" else NUM_TOKENS
    model = tiny_model(llm=tiny_llm(family, **FAMILIES[family]), connector=connector).eval()
    prompts = [[11, IMAGE, 12, IMAGE, 13], [14, 15], [IMAGE, 16]]
    batch = make_batch(*((prompt, []) for prompt in prompts), num_tokens=num_tokens, side="left")
    assert not batch.attention_mask[1, 0], "the short rows are padded on the left"
    answers = model.generate(batch, stop_ids=[1], max_new_tokens=5)
    assert answers.shape == (3, 5)
    pixels = batch.pixel_values.split(batch.num_images.tolist())
    for prompt, images, answer in zip(prompts, pixels, answers.tolist(), strict=True):
        expected: list[int] = []
        for _ in range(5):
            row = make_batch(([*prompt, *expected], [7]), images=images, num_tokens=num_tokens)
            with torch.no_grad():
                expected.append(int(model(row).argmax()))
        assert answer == expected
    assert len({tuple(answer) for answer in answers.tolist()}) == 3


def test_generation_ends_at_a_stop_id() -> None:
    model = tiny_model().eval()
    batch = make_batch(([IMAGE, 16], []), side="left")
    free = model.generate(batch, stop_ids=[1], max_new_tokens=5)[0].tolist()
    stop = free[2]
    assert model.generate(batch, stop_ids=[1, stop], max_new_tokens=5)[0].tolist() == free[: free.index(stop) + 1]


def test_the_first_token_and_the_last_position_are_never_scored() -> None:
    """The token after the kept position is the target, so T labels give at most T - 1 logits."""
    batch = make_batch(([], [11, 12, 13]))
    assert batch.labels.tolist() == [[IGNORE, 12, 13]]
    assert batch.logits_mask.tolist() == [[True, True, False]]
    assert batch.targets.tolist() == [12, 13]
    assert IGNORE not in batch.targets
