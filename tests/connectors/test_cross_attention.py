"""Gated cross-attention: the bare LLM while the gates are closed, the right images for each token once they open."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.nn import functional as F
from transformers import IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

from tests.helpers.cross_attention import SIZES, attending
from tests.helpers.llms import FAMILIES
from tests.helpers.parts import IMAGE, make_batch, make_module, pictures, tiny_llm
from vlm.connectors.cross_attention import GATE_SCALE, CrossAttention, GatedBlock, VisualContext
from vlm.connectors.resampler import Resampler
from vlm.launch.entry import CONF
from vlm.models.composed import Composed
from vlm.schema import Batch

OPT = {"word_embed_proj_dim": 32, "ffn_dim": 64, "do_layer_norm_before": True}
FACTS: dict[str, Any] = {"vision_width": 24, "llm_width": 32, "grid": (2, 2), "output_rms": 0.2}
LLMS: dict[str, dict[str, Any]] = {**FAMILIES, "opt": OPT}
# A row with two images, one without, one whose image comes first: 6, 4 and 4 tokens, of which 5 are supervised.
ROWS = (([11, IMAGE, 12, 13, IMAGE, 14], [21, 22]), ([15, 16], [23, 24]), ([IMAGE, 17, 18], [25]))


def rows(*given: Any, **options: Any) -> Batch:
    return make_batch(*(given or ROWS), num_tokens=0, **options)


def bare(model: Composed, batch: Batch) -> Tensor:
    return model.llm(model.llm.embed(batch.input_ids), batch.attention_mask, batch.position_ids, batch.logits_mask)


def gradients(model: Composed, batch: Batch | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    model(rows() if batch is None else batch).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


# --- What the LLM is without it


@pytest.mark.parametrize("family", LLMS)
def test_closed_gates_give_the_bare_llm_bit_for_bit(family: str) -> None:
    llm = tiny_llm(family, **LLMS[family])
    names, batch = list(llm.state_dict()), rows()
    before = bare(attending(llm=llm), batch)
    model = attending(llm=tiny_llm(family, **LLMS[family]))
    assert torch.equal(model(batch), before)
    assert torch.equal(bare(model, batch), before)
    assert list(model.llm.state_dict()) == names
    opened = attending(llm=tiny_llm(family, **LLMS[family]), gate=0.5)
    moved = (opened(batch) - before).abs().amax(1)
    assert (moved > 1e-2).tolist() == [True, True, False, False, True], "open gates change every row with an image"
    assert torch.equal(opened(batch)[2:4], before[2:4])
    assert torch.equal(bare(opened, batch), before), "outside the context the LLM is bare"


@pytest.mark.parametrize(("every", "places"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (5, [0])])
def test_a_block_stands_before_every_nth_layer(every: int, places: list[int]) -> None:
    model = attending(llm=tiny_llm(num_hidden_layers=5), every=every)
    assert [i for i, layer in enumerate(model.llm.layers()) if layer._forward_pre_hooks] == places
    assert len(model.connector.blocks) == len(places)


def test_names_and_count_of_the_parameters() -> None:
    connector = attending(every=2).connector
    matrices = ["q", "k", "v", "out", "ff_in", "ff_out"]
    tensors = ["attention_gate", "ff_gate", *(f"{name}.weight" for name in matrices)]
    tensors += [f"{norm}.{kind}" for norm in ("attention_norm", "ff_norm") for kind in ("weight", "bias")]
    names = {name for name, _ in connector.named_parameters() if not name.startswith("resampler.")}
    assert names == {"places"} | {f"blocks.{index}.{tensor}" for index in (0, 1) for tensor in tensors}
    resampler = sum(p.numel() for p in Resampler(**FACTS, **SIZES).parameters())
    block = 4 * 32 * 2 * 8 + 2 * 2 * 32 * 32 + 4 * 32 + 2 * 32
    assert sum(p.numel() for p in connector.parameters()) == resampler + SIZES["num_queries"] * 32 + 2 * block


def test_the_shipped_option_fits_the_tiny_llm() -> None:
    options = OmegaConf.to_container(OmegaConf.load(f"{CONF}/connector/cross_attention.yaml"))
    layers = OmegaConf.load(f"{CONF}/llm/tiny.yaml").config.num_hidden_layers
    del options["_target_"], options["lr"]  # the stage reads the rate
    connector = CrossAttention(**FACTS, **options)
    connector.attach([nn.Identity() for _ in range(layers)])
    assert len(connector.blocks) == 1


def test_blocks_are_made_on_the_connectors_device() -> None:
    with torch.device("meta"):
        connector = CrossAttention(**FACTS, **SIZES, every=1)
    connector.attach([nn.Identity()])
    assert all(parameter.is_meta for parameter in connector.parameters())


def test_a_copy_looks_with_its_own_blocks() -> None:
    model, batch = attending(gate=0.5), rows()
    twin = copy.deepcopy(model)
    before = model(batch)
    assert torch.equal(twin(batch), before)
    for block in twin.connector.blocks:
        nn.init.zeros_(block.attention_gate)
        nn.init.zeros_(block.ff_gate)
    assert torch.equal(twin(batch), bare(model, batch))
    assert torch.equal(model(batch), before)


# --- Which image a token sees


def test_visible_images_by_hand() -> None:
    """Two visual tokens per image; row 0 has images before its tokens 1 and 3, row 1 none."""
    batch = replace(rows(([11, IMAGE, 12, 13, IMAGE], [21]), ([14], [22])))
    assert batch.images_before.tolist() == [[0, 1, 1, 2], [0, 0, 0, 0]]

    def visible(length: int, num_beams: int = 1, everything: bool = False) -> list[list[str]]:
        view = VisualContext.of(torch.randn(2, 2, 32), batch, all_previous_images=everything)
        seen = view.visible(2 * num_beams, length)
        return [["".join("01"[v] for v in token) for token in row] for row in seen.int().tolist()]

    none, first, second, both = "0000", "1100", "0011", "1111"
    assert visible(4) == [[none, first, first, second], [none] * 4]
    assert visible(4, everything=True) == [[none, first, first, both], [none] * 4]
    assert visible(6) == [[none, first, first, second, second, second], [none] * 6], "generated without a cache"
    assert visible(1) == [[second], [none]], "generated with a cache"
    assert visible(1, num_beams=3) == [[second] * 3, [none] * 3]
    assert visible(4, num_beams=2) == [[none, first, first, second] * 2, [none] * 8]


@pytest.mark.parametrize("everything", [False, True])
def test_logits_depend_on_the_images_that_their_tokens_see(everything: bool) -> None:
    """One layer, so that no token hears of an image from an earlier one but through the visible tokens themselves."""
    model = attending(llm=tiny_llm(num_hidden_layers=1), gate=0.5, all_previous_images=everything)
    batch = rows(([11, IMAGE, 12, IMAGE, 13], [21]), ([14, 15], [22]), ([IMAGE, 16], [23]))
    visual = model.connector(model.encoder(batch.pixel_values)).detach().requires_grad_()
    hidden = model.llm.embed(batch.input_ids)
    with model.connector.attending_to(visual, batch):
        seen = model.connector._pre_hook(model.connector.blocks[0], nn.Identity(), (hidden,))[0]  # B T D
    reach = []
    for row, token in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]:
        (slope,) = torch.autograd.grad(seen[row, token].sum(), visual, retain_graph=True)
        assert slope.isfinite().all()
        reach.append([image for image in range(3) if slope[image].any()])
    assert reach == [[], [0], [0, 1] if everything else [1], [], [], [2]]


def test_a_token_without_an_image_gets_exactly_nothing_from_attention() -> None:
    model, batch = attending(gate=0.5), rows()
    for block in model.connector.blocks:
        nn.init.zeros_(block.ff_gate)
    assert torch.equal(model(batch)[2:4], bare(model, batch)[2:4]), "the row of text alone"
    assert (model(batch) - bare(model, batch)).abs().amax(1)[[0, 1, 4]].min() > 1e-3


def test_padding_and_company_change_nothing() -> None:
    model = attending(gate=0.5)
    together = model(rows())
    images = pictures(3)
    alone = [model(rows(row, images=own)) for row, own in zip(ROWS, (images[:2], [], images[2:]), strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_a_batch_without_images_gives_zero_gradients() -> None:
    model = attending(gate=0.5)
    model.encoder.requires_grad_(False)
    batch = rows(ROWS[1], ROWS[1])
    got = gradients(model, batch)
    assert got.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(tensor.any() for name, tensor in got.items() if name.startswith("connector."))
    assert all(tensor.any() for name, tensor in got.items() if name.startswith("llm.model.layers"))


def test_a_wrong_number_of_images_names_both() -> None:
    model, batch = attending(), rows()
    wrong = replace(batch, pixel_values=batch.pixel_values[:2])
    with pytest.raises(
        ValueError, match=r"counts 3 images but has the visual tokens of 2; make num_images match.*sample/0"
    ):
        model(wrong)


# --- Training


def test_a_gate_at_zero_learns_first() -> None:
    model = attending()
    got = {name: tensor for name, tensor in gradients(model).items() if name.startswith("connector.")}
    assert {name for name, tensor in got.items() if tensor.any()} == {n for n in got if n.endswith("_gate")}
    assert all(tensor.any() for tensor in gradients(attending(gate=0.1)).values() if tensor.ndim > 1)


def checkpoint_by_transformers(model: Composed, *, reentrant: bool) -> None:
    model.llm.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.llm.model.train()
    model.llm.gradient_checkpointing = True


def checkpoint_with_hooks(model: Composed, *, reentrant: bool) -> None:
    """As FSDP does, and Transformers before 5.2x did: the hooks run a second time, in the backward pass."""
    how = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    decoder = model.llm.model.get_decoder()
    decoder.layers = nn.ModuleList(checkpoint_wrapper(layer, checkpoint_impl=how) for layer in decoder.layers)


def calls(module: nn.Module) -> list[int]:
    """Filled with an item at every call of the module from now on."""
    made: list[int] = []
    module.register_forward_hook(lambda *_: made.append(1))
    return made


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("way", ["reentrant", "not reentrant", "with hooks"])
def test_gradients_with_and_without_checkpointing_are_equal(way: str, lora: bool) -> None:
    def learner() -> Composed:
        torch.manual_seed(4)
        states = {"llm": "lora" if lora else "full", "encoder": "frozen" if lora else "full"}
        return make_module(attending(gate=0.5), states=states).model

    plain = gradients(learner())
    model = learner()
    attention, block = calls(model.llm.layers()[1].self_attn), calls(model.connector.blocks[1])
    if way == "with hooks":
        checkpoint_with_hooks(model, reentrant=False)
    else:
        checkpoint_by_transformers(model, reentrant=way == "reentrant")
    got = {name.replace("_checkpoint_wrapped_module.", ""): tensor for name, tensor in gradients(model).items()}
    assert_same(got, plain)
    assert len(attention) == 2, "computed again in the backward pass"
    assert len(block) == (2 if way == "with hooks" else 1)
    assert sum("lora_" in name for name in plain) == (2 * 2 * 3 if lora else 0)


def test_two_batches_before_one_backward_each_keep_their_images() -> None:
    first, second = rows(), rows(images=pictures(3, seed=9))

    def both(model: Composed) -> dict[str, Tensor]:
        one, other = model(first), model(second)
        (one.square().sum() + other.square().sum()).backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {name.replace("_checkpoint_wrapped_module.", ""): tensor for name, tensor in found.items()}

    model = attending(gate=0.5)
    checkpoint_with_hooks(model, reentrant=False)
    assert_same(both(model), both(attending(gate=0.5)))


def test_the_bare_llm_is_bare_also_for_embeddings_that_were_seen_with_images() -> None:
    model, batch = attending(gate=0.5), rows()
    embeds = model.llm.embed(batch.input_ids)
    given = (embeds, batch.attention_mask, batch.position_ids, batch.logits_mask)
    before = model.llm(*given)
    with model.connector.attending_to(model.connector(model.encoder(batch.pixel_values)), batch):
        assert (model.llm(*given) - before).abs().max() > 1e-2
    assert torch.equal(model.llm(*given), before)


def test_reentrant_checkpointing_around_the_hooks_is_refused() -> None:
    model = attending(gate=0.5)
    checkpoint_with_hooks(model, reentrant=True)
    with pytest.raises(ValueError, match=r"use_reentrant=True loses the gradient.*set use_reentrant=False"):
        model(rows())


def test_it_learns_to_tell_pictures_apart_in_a_few_steps() -> None:
    """The LLM is random and frozen; four pictures have four answers, which the text alone cannot tell apart."""
    model = attending(llm=tiny_llm())
    batch = rows(*(([11, IMAGE, 12], [20 + i]) for i in range(4)))
    module = make_module(model)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=6e-3, betas=(0.9, 0.98))
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(batch), batch.targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > math.log(4), "no better than by the text alone"
    assert losses[-1] < 0.7 * math.log(4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_llm_may_be_narrower_than_the_blocks(dtype: str, autocast: bool) -> None:
    def make(gate: float) -> Composed:
        return attending(llm=tiny_llm(num_hidden_layers=3, dtype=dtype), gate=gate)

    batch = rows()
    entering: list[torch.dtype] = []
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        model = make(0.0)
        model.llm.layers()[1].register_forward_pre_hook(lambda _, args: entering.append(args[0].dtype))
        assert torch.equal(model(batch), bare(model, batch))
        got = gradients(make(0.5))
    assert len(set(entering)) == 1, "a layer is given what it is given without blocks"
    ours = {name: tensor for name, tensor in got.items() if name.startswith("connector.")}
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
    exact = gradients(attending(gate=0.5))
    for name, tensor in ours.items():
        assert F.cosine_similarity(tensor.flatten(), exact[name].flatten(), dim=0) > 0.95, name


# --- Generation


@pytest.mark.parametrize(("family", "everything"), [*((family, False) for family in LLMS), ("llama", True)])
def test_words_with_a_cache_are_those_computed_one_by_one(family: str, everything: bool) -> None:
    loud = {"gate": 2.0, "output_rms": 5.0}  # so that images change the words
    model = attending(llm=tiny_llm(family, **LLMS[family]), all_previous_images=everything, **loud).eval()
    prompts = [[11, IMAGE, 12, 13, IMAGE, 14], [15, 16], [IMAGE, 17, 18]]
    batch = rows(*((prompt, []) for prompt in prompts), side="left")
    answers = model.generate(batch, stop_ids=[1], max_new_tokens=5)
    assert torch.equal(model.generate(batch, stop_ids=[1], max_new_tokens=5, use_cache=False), answers)
    images = pictures(3)
    for prompt, own, answer in zip(prompts, (images[:2], [], images[2:]), answers.tolist(), strict=True):
        expected: list[int] = []
        for _ in range(5):
            with torch.no_grad():
                expected.append(int(model(rows(([*prompt, *expected], [7]), images=own)).argmax()))
        assert answer == expected
    blind = rows(*(([token for token in prompt if token is not IMAGE], []) for prompt in prompts), side="left")
    assert (model.generate(blind, stop_ids=[1], max_new_tokens=5) != answers).any(1).tolist() == [True, False, True]


def test_keys_and_values_are_computed_once_for_all_generated_tokens() -> None:
    model = attending(gate=0.5).eval()
    batch = rows(([IMAGE, 17, 18], []), side="left")
    keys, queries = calls(model.connector.blocks[1].k), calls(model.connector.blocks[1].q)
    model.generate(batch, stop_ids=[1], max_new_tokens=5)
    assert (len(keys), len(queries)) == (1, 5)


def test_beams_of_a_batch_are_those_of_its_rows_alone() -> None:
    model, images = attending(gate=0.5).eval(), pictures(3)
    prompts = [[11, IMAGE, 12, 13, IMAGE, 14], [15, 16], [IMAGE, 17, 18]]
    search = {"stop_ids": [1], "max_new_tokens": 6, "num_beams": 6}
    together = model.generate(rows(*((prompt, []) for prompt in prompts), side="left"), **search)
    alone = [
        model.generate(rows((prompt, []), images=own, side="left"), **search)
        for prompt, own in zip(prompts, (images[:2], [], images[2:]), strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))
    greedy = model.generate(rows(*((prompt, []) for prompt in prompts), side="left"), **{**search, "num_beams": 1})
    assert not torch.equal(together, greedy), "the search finds what greed does not"


# --- The block by itself


def test_block_is_idefics_gated_layer_but_for_norms_and_feed_forward() -> None:
    """Their RMS norms and SwiGLU give place to ours; attention, mask, gates and sums are theirs.

    What sees no image passes their feed-forward half all the same, and ours not.
    """
    config = IdeficsConfig(
        hidden_size=32,
        num_attention_heads=4,
        vision_config={"embed_dim": 32},
        alpha_type="vector",
        qk_layer_norms=False,
    )
    config._attn_implementation = "eager"
    theirs = IdeficsGatedCrossAttentionLayer(config, layer_idx=0)
    ours = GatedBlock(width=32, num_heads=4, head_dim=8, ff_mult=4, output_rms=1.0)
    theirs.input_layernorm, theirs.post_attention_layernorm = ours.attention_norm, ours.ff_norm
    theirs.mlp = FeedForward(ours)
    with torch.no_grad():
        for norm in (ours.attention_norm, ours.ff_norm):
            norm.weight.normal_(1, 0.3)
            norm.bias.normal_()
        ours.attention_gate.normal_(std=1 / GATE_SCALE)
        ours.ff_gate.normal_(std=1 / GATE_SCALE)
    theirs.load_state_dict(
        {
            **{f"cross_attn.{name}_proj.weight": getattr(ours, name).weight for name in "qkv"},
            "cross_attn.o_proj.weight": ours.out.weight,
            "alpha_cross_attn": GATE_SCALE * ours.attention_gate[None, None],
            "alpha_dense": GATE_SCALE * ours.ff_gate[None, None],
        },
        strict=False,
    )
    hidden, visual = torch.randn(2, 5, 32), torch.randn(2, 6, 32)
    visible = torch.rand(2, 5, 6) < 0.4
    visible[0, :2] = False
    expected = theirs(
        hidden,
        image_hidden_states=visual,
        image_attention_mask=torch.where(visible, 0.0, torch.finfo(torch.float32).min)[:, None],
        cross_attention_gate=visible.any(2).float(),
    )
    found, sighted = ours(hidden, *ours.project(visual), visible), visible.any(2)
    assert 2 <= sighted.sum() < 9
    torch.testing.assert_close(found[sighted], expected[sighted], rtol=0, atol=1e-5)
    assert torch.equal(found[~sighted], hidden[~sighted])


class FeedForward(nn.Module):
    """The block's second half, written out: squared ReLU between two matrices."""

    def __init__(self, block: GatedBlock) -> None:
        super().__init__()
        self.weights = block.ff_in.weight, block.ff_out.weight

    def forward(self, x: Tensor) -> Tensor:
        inner = (x @ self.weights[0].T).clamp(min=0)
        return (inner * inner) @ self.weights[1].T


@pytest.mark.parametrize("output_rms", [1.03, 0.05])
def test_what_the_gates_hold_back_starts_at_the_scale_of_the_embeddings(output_rms: float) -> None:
    torch.manual_seed(0)
    block = GatedBlock(width=256, num_heads=8, head_dim=32, ff_mult=4, output_rms=output_rms)
    nn.init.constant_(block.ff_gate, 100.0)  # tanh is 1
    hidden, visible = 30 * torch.randn(2, 64, 256), torch.ones(2, 64, 1, dtype=torch.bool)
    visual = block.project(torch.randn(2, 1, 256))
    assert (block(hidden, *visual, visible) - hidden).square().mean().sqrt().item() == pytest.approx(
        output_rms, rel=0.1
    )
    nn.init.constant_(block.ff_gate, 0.0)
    nn.init.constant_(block.attention_gate, 100.0)
    assert (block(hidden, *visual, visible) - hidden).square().mean().sqrt().item() == pytest.approx(
        output_rms, rel=0.1
    )


# --- Refusals


def test_more_layers_between_blocks_than_the_llm_has() -> None:
    with pytest.raises(
        ValueError, match=r"connector.every=4 but the LLM has 3 layers; set connector.every= to 3 or less"
    ):
        attending(every=4)


def test_no_layers_between_blocks() -> None:
    with pytest.raises(ValueError, match=r"connector.every=0 must be at least 1"):
        CrossAttention(**FACTS, **SIZES, every=0)
