"""The Q-Former computes what Transformers' BLIP-2 does, and starts from its weights, from a BERT's or from none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from tests.helpers.blip2 import (
    OPT,
    ROWS,
    SIZES,
    THEIRS,
    TINY,
    assert_learns_alike,
    bare,
    captioner,
    question,
    retrieval,
    shaken,
    start,
    twin,
)
from tests.helpers.parts import Parts, make_batch, pictures, tiny_llm
from vlm.connectors.qformer import QFormer
from vlm.connectors.qformer_weights import TEXT_VOCABULARY, to_blip2
from vlm.training.optim import parameter_groups


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("every", [1, 2])
def test_queries_are_those_of_blip2(tmp_path: Path, every: int) -> None:
    reference = bare(tmp_path, cross_attention_frequency=every)
    connector = start(tmp_path, norm=False, cross_attention_every=every)
    features = torch.randn(3, 5, 24)
    queries = connector.queries.expand(3, -1, -1)
    expected = reference(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
    torch.testing.assert_close(connector.hidden_states(features), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(connector(features), connector.project(expected), atol=1e-5, rtol=0)


def masks(kind: str, words: Tensor) -> Tensor:
    """Who may look at whom, in the three tasks of BLIP-2's first stage (arXiv 2301.12597, figure 2); `words` [N,T]."""
    everyone = torch.cat([torch.ones(len(words), 4, dtype=torch.bool), words], 1)  # N S
    mask = everyone[:, None, :].repeat(1, everyone.shape[1], 1)  # N S S
    if kind == "matching":
        return mask
    mask[:, :4, 4:] = False
    if kind == "contrastive":
        mask[:, 4:, :4] = False
    if kind == "generation":
        mask[:, 4:, 4:] &= torch.ones(words.shape[1], words.shape[1], dtype=torch.bool).tril()
    return mask


@pytest.mark.parametrize("kind", ["matching", "contrastive", "generation"])
def test_queries_and_text_are_those_of_blip2(tmp_path: Path, kind: str) -> None:
    reference = retrieval(tmp_path)
    connector = start(tmp_path, text=True)
    features, ids = torch.randn(2, 5, 24), torch.randint(0, TEXT_VOCABULARY, (2, 6))
    words = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    mask = masks(kind, words)
    embeds = reference.embeddings(input_ids=ids, query_embeds=reference.query_tokens.expand(2, -1, -1))
    expected = reference.qformer(
        query_embeds=embeds,
        query_length=4,
        attention_mask=mask[:, None],
        encoder_hidden_states=reference.vision_model.post_layernorm(features),
    ).last_hidden_state
    states = connector.hidden_states(features, ids, mask)
    assert states.shape == (2, 10, 16)
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)


def test_text_alone_is_that_of_blip2(tmp_path: Path) -> None:
    reference = retrieval(tmp_path)
    connector = start(tmp_path, text=True)
    ids = torch.randint(0, TEXT_VOCABULARY, (2, 6))
    embeds = reference.embeddings(input_ids=ids)
    expected = reference.qformer(query_embeds=embeds, query_length=0).last_hidden_state
    torch.testing.assert_close(connector.hidden_states(None, ids), expected, atol=1e-5, rtol=0)


def test_matching_without_a_mask_lets_everyone_see_all(tmp_path: Path) -> None:
    retrieval(tmp_path)
    connector = start(tmp_path, text=True)
    features, ids = torch.randn(2, 5, 24), torch.randint(0, TEXT_VOCABULARY, (2, 6))
    everyone = torch.ones(2, 10, 10, dtype=torch.bool)
    torch.testing.assert_close(connector.hidden_states(features, ids), connector.hidden_states(features, ids, everyone))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Any, Any]:
    """The same model twice: Transformers' and ours."""
    reference = captioner(tmp_path)
    return reference, twin(reference, tmp_path, tiny_llm(**OPT))


def test_composed_with_opt_is_blip2(pair: tuple[Any, Any]) -> None:
    reference, ours = pair
    batch = make_batch(*ROWS)
    theirs = reference(**question(batch), labels=batch.labels)
    torch.testing.assert_close(ours(batch), theirs.logits[batch.logits_mask], atol=1e-5, rtol=0)
    assert_learns_alike(reference, ours, batch, theirs.loss)


def test_composed_with_opt_writes_what_blip2_writes(pair: tuple[Any, Any]) -> None:
    reference, ours = pair
    batch = make_batch(*((prompt, []) for prompt, _ in ROWS), images=pictures(3, seed=1), side="left")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 1, "pad_token_id": 0}
    theirs = reference.generate(**question(batch), **options)[:, batch.input_ids.shape[1] :]
    assert ours.generate(batch, stop_ids=[1], max_new_tokens=8).tolist() == theirs.tolist()
    assert len({tuple(row) for row in theirs.tolist()}) == 3


def test_weights_go_back_into_blip2(tmp_path: Path) -> None:
    reference = captioner(tmp_path)
    connector = shaken(start(tmp_path), seed=1)
    exported = to_blip2(connector.state_dict())
    missing, unexpected = reference.load_state_dict(exported, strict=False)
    assert unexpected == []
    assert {name for name in missing if not name.startswith(("vision_model", "language_model"))} == set()
    save_file({name: tensor.contiguous() for name, tensor in exported.items()}, tmp_path / "model.safetensors")
    again = start(tmp_path, init_projection=True)
    assert all(torch.equal(tensor, connector.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_position_cannot_go_into_blip2() -> None:
    with pytest.raises(
        ValueError, match=r"no parameter for the Q-Former's position embeddings; train with connector.position=false"
    ):
        to_blip2(QFormer(**TINY).state_dict())


def test_blip2_in_several_files_and_half_precision(tmp_path: Path) -> None:
    whole = captioner(tmp_path).half().state_dict()
    (tmp_path / "model.safetensors").unlink()
    names = sorted(whole.keys() - {"language_model.lm_head.weight"})  # tied
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: whole[name].contiguous() for name in part}, tmp_path / f"model-{number}.safetensors")
    connector = start(tmp_path)
    assert {p.dtype for p in connector.parameters()} == {torch.float32}
    assert torch.equal(connector.queries, whole["query_tokens"][0].float())


def test_position_starts_at_zero_where_a_blip2_does_not_need_it(tmp_path: Path) -> None:
    captioner(tmp_path)
    features = torch.randn(2, 5, 24)
    with_position = start(tmp_path, position=True)
    assert torch.equal(with_position.hidden_states(features), start(tmp_path).hidden_states(features))


@pytest.mark.parametrize("text", [False, True])
def test_a_run_with_another_llm_gives_its_qformer(tmp_path: Path, text: bool) -> None:
    """As MiniGPT-4 takes BLIP-2's: all but the projection; whatever else the run has trained does not matter."""
    ours = shaken(QFormer(**{**TINY, "position": False, "text": True}))
    tensors = {f"connector.{name}": tensor.contiguous() for name, tensor in ours.state_dict().items()}
    (tmp_path / "artifact").mkdir()
    save_file({**tensors, "llm.model.x": torch.ones(1)}, tmp_path / "artifact" / "weights.safetensors")
    manifest = {"parts": {"connector": {"num_heads": 2}}}
    (tmp_path / "artifact" / "manifest.json").write_text(json.dumps(manifest))
    found = start(tmp_path, llm_width=48, text=text)
    for name, tensor in found.state_dict().items():
        if not name.startswith("project."):
            torch.testing.assert_close(tensor, ours.state_dict()[name], rtol=0, atol=0)
    torch.testing.assert_close(
        start(tmp_path, text=text, init_projection=True).project.weight, ours.project.weight, rtol=0, atol=0
    )
    with pytest.raises(ValueError, match=r"has num_heads=2, the connector has 4; set connector.num_heads=2$"):
        start(tmp_path, num_heads=4)
    with pytest.raises(
        ValueError, match=r"language_projection.weight has shape \[32, 16\], the connector needs \[48, 1"
    ):
        start(tmp_path, llm_width=48, init_projection=True)
    save_file({"connector.position": torch.ones(5, 24)}, tmp_path / "artifact" / "weights.safetensors")
    with pytest.raises(ValueError, match=r"was trained with connector.position=true, which only ckpt= reads; take a"):
        start(tmp_path)


def test_projection_of_a_checkpoint_is_read_only_on_demand(tmp_path: Path) -> None:
    reference = captioner(tmp_path)
    torch.manual_seed(0)
    connector = start(tmp_path, llm_width=512)
    assert connector(torch.randn(8, 5, 24)).square().mean().sqrt().item() == pytest.approx(0.7, rel=0.15)
    assert torch.equal(start(tmp_path, init_projection=True).project.weight, reference.language_projection.weight)


@pytest.mark.parametrize("release", ["model", "masked_lm", "gamma"])
def test_text_is_that_of_bert(tmp_path: Path, release: str) -> None:
    """In the names of BertModel, under those of a model with a head, and as in Google's files."""
    reference = shaken(BertModel(BertConfig(**{**THEIRS, "vocab_size": TEXT_VOCABULARY - 1})))
    reference.save_pretrained(tmp_path)
    if release != "model":
        file = tmp_path / "model.safetensors"
        tensors = {f"bert.{name}": tensor for name, tensor in load_file(file).items()}
        if release == "gamma":
            tensors = {
                n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
                for n, t in tensors.items()
            }
        save_file(tensors, file)
    connector = start(tmp_path, "bert", text=True)
    ids = torch.randint(0, TEXT_VOCABULARY - 1, (2, 6))
    torch.testing.assert_close(connector.hidden_states(None, ids), reference(ids).last_hidden_state, atol=1e-5, rtol=0)


def test_queries_go_through_berts_feed_forward(tmp_path: Path) -> None:
    reference = shaken(BertModel(BertConfig(**THEIRS)))
    reference.save_pretrained(tmp_path)
    connector = start(tmp_path, "bert")
    for block, layer in zip(connector.blocks, reference.encoder.layer, strict=True):
        assert torch.equal(block.query_feed.up.weight, layer.intermediate.dense.weight)
        assert torch.equal(block.query_feed.norm.bias, layer.output.LayerNorm.bias)
        assert torch.equal(block.attention.out.weight, layer.attention.output.dense.weight)
    assert torch.equal(connector.norm.weight, reference.embeddings.LayerNorm.weight)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_queries": 6}, "has num_queries=4, the connector has 6; set connector.num_queries=4"),
        ({"depth": 2}, "has depth=3, the connector has 2; set connector.depth=3"),
        ({"width": 32}, "has width=16, the connector has 32; set connector.width=16"),
        ({"num_heads": 4}, "has num_heads=2, the connector has 4; set connector.num_heads=2"),
        (
            {"cross_attention_every": 1},
            "has cross_attention_every=2, the connector has 1; set connector.cross_attention_every=2",
        ),
        (
            {"vision_width": 20},
            r"post_layernorm.weight has shape \[24\], the connector needs \[20\]; choose the encoder that",
        ),
        (
            {"vision_width": 20, "norm": False},
            r"key.weight has shape \[16, 24\], the connector needs \[16, 20\]; choose the enc",
        ),
        (
            {"init_projection": True, "llm_width": 40},
            r"shape \[32, 16\], the connector needs \[40, 16\]; set connector.init_pro",
        ),
        (
            {"text": True},
            r"lacks 20 of \d+ tensors, first 'embeddings.word_embeddings.weight'; set connector.text=f",
        ),
    ],
)
def test_a_blip2_of_another_shape_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    captioner(tmp_path)
    with pytest.raises(ValueError, match=said):
        start(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"depth": 4}, "has depth=3, the connector has 4; set connector.depth=3"),
        ({"num_heads": 4}, "has num_heads=2, the connector has 4; set connector.num_heads=2"),
        (
            {"text": True},
            r"word_embeddings.weight has shape \[99, 16\], the connector needs \[30523, 16\]; set connector.text=fa",
        ),
    ],
)
def test_a_bert_of_another_shape_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    BertModel(BertConfig(**{**THEIRS, "vocab_size": 99})).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=said):
        start(tmp_path, "bert", **changes)


def test_a_folder_without_the_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no tensors in \*.safetensors; download the checkpoint and set"):
        start(tmp_path)
    captioner(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 50 of 50 tensors, first 'embeddings.LayerNorm.weight'; choose an"):
        start(tmp_path, "bert")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_queries": 0}, "connector.num_queries=0 must be at least 1"),
        ({"depth": 0}, "connector.depth=0 must be at least 1"),
        ({"cross_attention_every": 0}, "connector.cross_attention_every=0 must be at least 1"),
        ({"num_heads": 3}, "connector.width=16 must be a multiple of connector.num_heads=3; try connector.width=15"),
        ({"init": "bert"}, "connector.init=bert and connector.init_from=None do not fit together; set"),
        ({"init_from": "x"}, "connector.init=random and connector.init_from=x do not fit together; set"),
        ({"init_projection": True}, "connector.init=random has no projection; set connector.init_projection=false"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        QFormer(**{**TINY, **changes})


def test_a_text_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got a text but has no text path; set connector.text=true"):
        QFormer(**TINY).hidden_states(None, torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"the text has 513 tokens, but the Q-Former takes at most 512; truncate it"):
        QFormer(**TINY, text=True).hidden_states(None, torch.zeros(1, 513, dtype=torch.long))


def test_parameter_count() -> None:
    """The formula of the docstring, by the numbers of BLIP-2 with its ViT-g (Dv=1408) and OPT-2.7B (D=2560)."""
    with torch.device("meta"):
        sizes = {"vision_width": 1408, "llm_width": 2560, "grid": (16, 16), "output_rms": 1.0}
        plain = QFormer(**sizes, norm=False, position=False)
        blocks = 12 * (12 * 768**2 + 13 * 768) + 6 * (2 * 768**2 + 2 * 1408 * 768 + 6 * 768)
        assert count(plain) == blocks + 32 * 768 + 2 * 768 + 768 * 2560 + 2560 == 107_130_880
        assert count(QFormer(**sizes)) == count(plain) + 2 * 1408 + 256 * 1408
        text = 12 * (8 * 768**2 + 7 * 768) + (30_523 + 512) * 768
        assert count(QFormer(**sizes, text=True)) == count(QFormer(**sizes)) + text


def test_text_has_parameters_only_on_demand() -> None:
    without, with_text = (set(QFormer(**TINY, text=text).state_dict()) for text in (False, True))
    feeds = {
        f"blocks.{b}.text_feed.{m}.{k}" for b in range(3) for m in ("up", "down", "norm") for k in ("weight", "bias")
    }
    assert with_text == without | feeds | {"words.weight", "word_positions.weight"}


def test_vectors_per_token_do_not_decay() -> None:
    model = Parts(connector=QFormer(**TINY))
    decay, rest = parameter_groups(model, lr={"connector": 1.0}, weight_decay=0.1)
    assert {id(model.connector.queries), id(model.connector.position)} <= {id(p) for p in rest["params"]}
    assert all(p.ndim == 2 and 16 in p.shape for p in decay["params"])


@pytest.mark.parametrize("text", [False, True])
def test_checkpointing_changes_no_gradient(text: bool) -> None:
    features, ids = torch.randn(2, 5, 24), torch.randint(0, TEXT_VOCABULARY, (2, 6)) if text else None
    gradients, runs = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        connector = QFormer(**TINY, text=text, gradient_checkpointing=checkpointing)
        ran: list[int] = []
        connector.blocks[0].register_forward_pre_hook(lambda *_, ran=ran: ran.append(0))
        connector.project(connector.hidden_states(features, ids)).square().sum().backward()
        gradients.append({name: p.grad for name, p in connector.named_parameters()})
        runs.append(len(ran))
    torch.testing.assert_close(*gradients, atol=0, rtol=0)
    assert runs == [1, 2]  # once more in the backward pass


def seen(visual: Tensor) -> float:
    """How much of the tokens' energy depends on the picture."""
    return ((visual - visual.mean(0)).square().mean() / visual.square().mean()).item()


def test_fresh_tokens_depend_on_the_picture() -> None:
    """With the initial weights of BERT they hardly would."""
    torch.manual_seed(0)
    features = torch.randn(8, 1, 24) + torch.randn(8, 36, 24)
    connector = QFormer(**{**SIZES, "grid": (6, 6)}, width=192)
    assert seen(connector(features)) > 0.25
    with torch.no_grad():
        for module in connector.modules():
            if isinstance(module, nn.Linear) and module is not connector.project:
                module.weight.normal_(std=0.02 * (768 / 192) ** 0.5)
        connector.position.zero_()
    assert seen(connector(features)) < 0.15


def test_each_query_starts_at_a_patch_of_its_own() -> None:
    torch.manual_seed(0)
    sizes = {**SIZES, "grid": (3, 4), "num_queries": 6, "depth": 3, "width": 192, "num_heads": 3}
    features = torch.randn(1, 12, 24)
    features -= features.mean(2, keepdim=True)  # or the norm would make something of a patch that is all zeros
    changed = torch.stack([features[0].index_fill(0, torch.tensor(patch), 0.0) for patch in range(12)])
    connector = QFormer(**sizes)
    change = (connector(changed) - connector(features)).square().sum(2)  # P K
    assert change.argmax(0).tolist() == [0, 2, 4, 7, 9, 11]


def test_position_tells_where_a_patch_is() -> None:
    features = torch.randn(2, 5, 24)
    for position in (False, True):
        connector = QFormer(**TINY, position=position)
        same = torch.allclose(connector(features), connector(features.flip(1)), atol=1e-5)
        assert same is not position


def test_config_without_heads_is_no_obstacle(tmp_path: Path) -> None:
    reference = captioner(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert torch.equal(start(tmp_path).queries, reference.query_tokens[0])
