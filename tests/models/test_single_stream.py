"""UNITER's transformer against Transformers' VisualBERT and ViLT, and the embeddings of cells against a derivation."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, ViltConfig, ViltModel, VisualBertConfig, VisualBertModel

from tests.helpers.blip2 import shaken
from tests.helpers.pair_models import CELL, NUM_CELLS, pairs, tiny, tiny_single
from vlm.connectors.qformer_weights import TEXT_VOCABULARY, start_from_bert
from vlm.models.single_stream import SingleStream

BERT: dict[str, Any] = {
    **{"vocab_size": TEXT_VOCABULARY - 1, "hidden_size": 16, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "intermediate_size": 64},
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny(SingleStream)


def test_the_stream_is_that_of_visual_bert(tmp_path: Any) -> None:
    """Text and transformer have its weights; its image embeddings, which are others, are given to ours."""
    reference = shaken(VisualBertModel(VisualBertConfig(**BERT, visual_embedding_dim=64)))
    bert = shaken(BertForMaskedLM(BertConfig(**BERT)))
    bert.bert.encoder.load_state_dict(reference.encoder.state_dict())
    bert.bert.embeddings.load_state_dict(reference.embeddings.state_dict(), strict=False)
    bert.save_pretrained(tmp_path)
    ours = tiny_single().eval()
    start_from_bert(ours.stream.state_dict(), str(tmp_path), num_heads=2)
    ours.heads.pool_first.load_state_dict(reference.pooler.dense.state_dict())
    batch = pairs()
    features = torch.randn(8, NUM_CELLS, 64)
    inputs = {"visual_embeds": features, "visual_attention_mask": torch.ones(8, NUM_CELLS)}
    embedded = reference.embeddings(
        batch.input_ids, visual_embeds=features, visual_token_type_ids=torch.ones(8, NUM_CELLS, dtype=torch.long)
    )
    ours.cells.embed = lambda _: embedded[:, batch.input_ids.shape[1] :]
    found = reference(batch.input_ids, attention_mask=batch.attention_mask.float(), **inputs)
    fused = ours.fuse(features, batch.input_ids, batch.attention_mask)
    words, cells = found.last_hidden_state.split([batch.input_ids.shape[1], NUM_CELLS], dim=1)
    real = batch.attention_mask
    torch.testing.assert_close(fused.words[real], words[real], atol=1e-5, rtol=0)
    torch.testing.assert_close(fused.cells, cells, atol=1e-5, rtol=0)
    torch.testing.assert_close(fused.pair, found.pooler_output, atol=1e-5, rtol=0)


def test_the_embeddings_of_a_text_are_those_of_vilt(model: Any) -> None:
    """ViLT also has BERT's embeddings, then its own norm before each layer instead of after it."""
    config = ViltConfig(**{**BERT, "vocab_size": TEXT_VOCABULARY}, image_size=32, patch_size=32, layer_norm_eps=1e-12)
    reference = ViltModel(config).eval()
    theirs = reference.embeddings.text_embeddings
    with torch.no_grad():
        theirs.word_embeddings.weight.copy_(model.stream.words.weight)
        theirs.position_embeddings.weight[:] = model.stream.word_positions.weight[: config.max_position_embeddings]
        theirs.token_type_embeddings.weight.zero_()
        theirs.LayerNorm.load_state_dict(model.stream.norm.state_dict())
    ids = pairs().input_ids
    torch.testing.assert_close(model.stream.embed(ids), theirs(ids), atol=1e-5, rtol=0)


def test_the_embedding_of_a_cell(model: Any) -> None:
    """Of the middle one of 3×3, whose box has the corners 1/3 and 2/3."""
    features = torch.randn(2, NUM_CELLS, 64)
    cells = model.cells
    box = torch.tensor([1 / 3, 1 / 3, 2 / 3, 2 / 3, 1 / 3, 1 / 3, 1 / 9])
    expected = cells.norm(
        cells.feature_norm(cells.feature(features[:, 4])) + cells.location_norm(cells.location(box)) + cells.kind
    )
    torch.testing.assert_close(cells.embed(features)[:, 4], expected)


def test_padding_changes_nothing(model: Any) -> None:
    whole, alone = pairs(), pairs(1, 2)
    one, all_ = (model.fuse(model.features(each), each.input_ids, each.attention_mask) for each in (alone, whole))
    torch.testing.assert_close(one.words[0], all_.words[1, : alone.input_ids.shape[1]])
    torch.testing.assert_close(one.cells[0], all_.cells[1])
    torch.testing.assert_close(one.pair[0], all_.pair[1])


def test_a_hidden_cell_has_the_learned_feature_and_nothing_leaks(model: Any) -> None:
    pixel_values = pairs().pixel_values
    hidden = torch.zeros(8, NUM_CELLS, dtype=torch.bool)
    hidden[:, 4] = True
    changed = pixel_values.clone()
    changed[:, :, CELL : 2 * CELL, CELL : 2 * CELL] = 7.0
    found = model.masked_features(pixel_values, hidden)
    assert torch.equal(found, model.masked_features(changed, hidden))
    torch.testing.assert_close(found[:, 4], model.cells.masked.expand(8, -1))
    other = model.masked_features(pixel_values, None)
    torch.testing.assert_close(other[:, 0].mean(-1), torch.zeros(8), atol=1e-5, rtol=0)


def test_features_are_predicted_by_the_transposed_matrix(model: Any) -> None:
    states = torch.randn(3, 16)
    heads = model.heads
    hidden = heads.features.norm(F.gelu(states @ heads.features.transform.weight.T + heads.features.transform.bias))
    expected = F.linear(hidden, model.cells.feature.weight.T, heads.feature_bias)
    torch.testing.assert_close(model.predict_features(states), expected)


def test_every_parameter_is_in_the_graph_of_every_task(model: Any) -> None:
    """DDP waits for all of them."""
    batch = pairs()
    fused = model.fuse(model.features(batch), batch.input_ids, batch.attention_mask)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for output in (fused.words.sum() + 0 * fused.pair.sum(), fused.pair.sum()):
        found = torch.autograd.grad(output, [*trained.values()], retain_graph=True, allow_unused=True)
        assert [name for name, gradient in zip(trained, found, strict=True) if gradient is None] == []


def test_options_that_do_not_fit() -> None:
    said = "model.width=15 must be a multiple of model.num_heads=2; try model.width=14"
    with pytest.raises(ValueError, match=re.escape(said)):
        tiny_single(width=15)
