"""Adapters that act on some tokens only: without an image, the LLM is the untouched one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.parts import IMAGE, LORA, NUM_TOKENS, Gated, make_batch, pictures, tiny_llm, tiny_model
from tests.helpers.programs import QUICK, train
from vlm.llms.causal import CausalLM
from vlm.models.composed import Composed
from vlm.schema import Batch

TEXT = ([14, 15, 16], [23, 24])
FIRST = ([IMAGE, 12, 13], [21, 22])  # every token is the image's or comes after it
LATER = ([11, 17, IMAGE, 12], [25, 26, 27])
KINDS = ["after_image", "visual"]


def adapted_llm(tokens: str, *, attention: str = "sdpa", **lora: Any) -> CausalLM:
    """With an adapter that has learned something; the same one for all `tokens`."""
    llm = tiny_llm()
    if attention == "blocks":
        llm.auto_attention()
        assert llm.joins_rows
    llm.add_lora(**{**LORA, "target_modules": "all-linear", **lora}, tokens=tokens)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(5)
    for name, parameter in llm.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return llm.eval()  # type: ignore[return-value]


def by_hand(tokens: str, batch: Batch) -> Composed:
    """The untouched LLM, each linear layer of which adds what the adapter of `adapted_llm` says at these tokens."""
    llm, donor = tiny_llm(), adapted_llm("all")
    where = batch.image_mask if tokens == "visual" else batch.image_mask.long().cumsum(1) > 0
    layers = {name: module for name, module in donor.model.named_modules() if hasattr(module, "lora_A")}
    assert len(layers) == 2 * 7

    def add(layer: Any) -> Any:
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return lambda _, args, output: output + where[..., None] * (args[0] @ down.T @ up.T) * 2  # alpha / r

    for name, layer in layers.items():
        llm.model.get_submodule(name).register_forward_hook(add(layer))
    return tiny_model(llm=llm)


def logits(model: Composed, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(batch)


@pytest.mark.parametrize("attention", ["sdpa", "blocks"])
@pytest.mark.parametrize("tokens", KINDS)
def test_the_adapter_acts_on_its_tokens_only(tokens: str, attention: str) -> None:
    """In padded rows, and in one row of all samples."""
    batch = make_batch(TEXT, FIRST, LATER)
    found = logits(tiny_model(llm=adapted_llm(tokens, attention=attention)), batch)
    assert torch.allclose(found, logits(by_hand(tokens, batch), batch), atol=1e-5)
    untouched, everywhere = logits(tiny_model(), batch), logits(tiny_model(llm=adapted_llm("all")), batch)
    assert torch.allclose(found[:2], untouched[:2], atol=1e-5)  # of the text
    assert (found[2:] - untouched[2:]).abs().max() > 0.1
    assert torch.allclose(found[2:4], everywhere[2:4], atol=1e-5) == (tokens == "after_image")  # of the first image


@pytest.mark.parametrize("tokens", KINDS)
def test_gradients_are_those_by_hand(tokens: str) -> None:
    """Also where layers are recomputed in the backward pass."""
    batch = make_batch(TEXT, FIRST, LATER)
    expected = by_hand(tokens, batch)
    llm = adapted_llm(tokens)
    llm.gradient_checkpointing = True
    llm.model.activation_checkpointing_enable({"use_reentrant": False})
    grads = []
    for model in (tiny_model(llm=llm), expected):
        model(batch).square().sum().backward()
        grads.append(model.connector.layers[0].weight.grad)
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-5)
    down = next(p for name, p in llm.named_parameters() if "lora_A" in name)
    assert down.grad is not None
    assert down.grad.abs().max() > 1e-4


def test_texts_alone_train_nothing() -> None:
    llm = adapted_llm("after_image")
    tiny_model(llm=llm)(make_batch(TEXT)).square().sum().backward()
    assert {
        float(p.grad.abs().max()) for name, p in llm.named_parameters() if "lora_" in name and p.grad is not None
    } == {0.0}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("tokens", KINDS)
def test_generated_tokens_are_those_of_whole_rows(tokens: str, beams: int) -> None:
    """A row that has an image has the adapter in all its answer, one without has none; left-padded in one batch."""
    model = tiny_model(llm=adapted_llm(tokens))
    prompts = [([14, 15, 16], []), ([IMAGE, 12, 13, 18], []), ([11, 17, IMAGE, 12], [])]
    batch = make_batch(*prompts, side="left")
    given = model.generate(batch, stop_ids=[999], max_new_tokens=4, num_beams=beams).tolist()
    images = [None, *pictures(2)]
    for (prompt, _), image, answer in zip(prompts, images, given, strict=True):
        alone = [] if image is None else [image]
        if beams > 1:
            one = make_batch((prompt, []), images=alone)
            assert model.generate(one, stop_ids=[999], max_new_tokens=4, num_beams=beams).tolist() == [answer]
            continue
        written: list[int] = []
        for _ in range(4):
            row = make_batch((prompt, [*written, 1]), images=alone)
            written.append(int(logits(model, row)[-1].argmax()))
        if tokens == "visual" or image is None:
            assert answer == written
        else:
            assert answer == written != _greedy(tiny_model(), prompt, alone)


def _greedy(model: Composed, prompt: Any, images: list[Tensor]) -> list[int]:
    batch = make_batch((prompt, []), images=images)
    return model.generate(batch, stop_ids=[999], max_new_tokens=4).tolist()[0]


@pytest.mark.parametrize("tokens", KINDS)
def test_a_shared_beginning_is_computed_once_and_gives_the_same(tokens: str) -> None:
    model = tiny_model(llm=adapted_llm(tokens))
    image = pictures(1)[0]
    rows = [([11, IMAGE, 12], [21]), ([11, IMAGE, 12], [22, 23, 24])]
    batch = make_batch(*rows, images=[image, image])
    batch = dataclasses.replace(batch, pixel_values=batch.pixel_values[:1], image_index=torch.tensor([0, 0]))
    assert batch.num_shared_tokens == 1 + NUM_TOKENS
    assert torch.allclose(model.logits_of_answers(batch), logits(model, batch), atol=1e-5)


def test_layers_that_attend_to_images_have_it_after_the_image() -> None:
    torch.manual_seed(1)
    connector = Gated()
    rows = (TEXT, LATER)
    batch = make_batch(*rows, num_tokens=0)
    found = logits(tiny_model(llm=adapted_llm("after_image"), connector=connector), batch)
    untouched = logits(tiny_model(connector=connector), batch)
    assert torch.allclose(found[:2], untouched[:2], atol=1e-6)
    assert (found[2:] - untouched[2:]).abs().max() > 0.1


# --- runs


def test_a_run_forgets_nothing_and_its_next_stage_keeps_the_adapter(tmp_path: Path) -> None:
    options = [*QUICK, "stage=instruct", "stage.lora.tokens=after_image", "stage.lr.llm=1e-1"]
    assert train(*options, f"run_dir={tmp_path / 'one'}") == 0
    metrics = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert metrics["text/loss"] == metrics["text/loss_base"] > 0
    assert metrics["text/forgetting"] == 0.0
    assert train(*options, f"ckpt={tmp_path / 'one'}", f"run_dir={tmp_path / 'two'}") == 0
    manifest = json.loads((tmp_path / "two" / "artifact" / "manifest.json").read_text())
    assert manifest["lora"]["tokens"] == "after_image"
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["text/forgetting"] == 0.0


def test_other_tokens_than_before_are_refused(tmp_path: Path, told: Any) -> None:
    assert train(*QUICK, "stage=instruct", f"run_dir={tmp_path / 'one'}") == 0
    changed = ["stage=instruct", "stage.lora.tokens=visual", f"ckpt={tmp_path / 'one'}"]
    assert train(*QUICK, *changed, f"run_dir={tmp_path / 'two'}") == 2
    assert "'tokens': 'visual'" in told()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["stage.lora.use_dora=true"],
            "stage.lora.tokens=visual does not go with stage.lora.use_dora=true, which scales the weights for all "
            "tokens; set one of them back",
        ),
        (
            ["connector=cross_attention"],
            "stage.lora.tokens=visual, but connector CrossAttention puts no visual tokens into the row; set "
            "stage.lora.tokens=after_image",
        ),
        (
            ["data.text_replay=0.1"],
            "stage.lora.tokens=visual leaves texts without an image to the untouched llm, so that data.text_replay=0.1 "
            "trains nothing; set data.text_replay=0",
        ),
        (
            ["llm=flan_t5_xl", "llm.weights=random", "data.num_questions=1"],
            "stage.lora.tokens=visual needs a decoder-only llm; set stage.lora.tokens=all",
        ),
        (["stage.lora.tokens=some"], "stage.lora.tokens='some' must be one of all, after_image, visual"),
    ],
)
def test_refusals(options: list[str], said: str, tmp_path: Path, told: Any) -> None:
    usual = [*QUICK, "stage=instruct", "stage.lora.tokens=visual"]
    assert train(*usual, *options, f"run_dir={tmp_path / 'run'}") == 2
    assert told() == f"Error: {said}"


def test_an_adapter_on_the_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stage.lora.tokens=visual cannot adapt an embedding; leave it out of "):
        tiny_llm().add_lora(**{**LORA, "target_modules": ["embed_tokens"]}, tokens="visual")


def test_such_an_adapter_is_not_merged() -> None:
    llm = adapted_llm("after_image")
    with pytest.raises(ValueError, match=r"tokens=after_image cannot be merged, because merged weights act on all"):
        llm.merge_lora()


def test_layers_that_see_no_rows_are_refused() -> None:
    """As those of experts, which get the tokens that are routed to them."""
    llm = adapted_llm("after_image")
    llm.adapted.where = torch.ones(1, 3, dtype=torch.bool)
    layer: nn.Module = llm.model.model.layers[0].mlp.up_proj
    with pytest.raises(ValueError, match=r"needs layers that see whole rows, and this llm's experts do not"):
        layer(torch.zeros(3, 32))
