"""ViLBERT's two streams against Transformers' BERT and LXMERT, and what each side can see of the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LxmertConfig
from transformers.models.lxmert.modeling_lxmert import LxmertXLayer

from tests.helpers.blip2 import shaken
from tests.helpers.pair_models import CELL, NUM_CELLS, classes, encoder, pairs, tiny, tiny_dual
from tests.helpers.pairs import PACKAGE
from vlm.connectors.qformer_weights import TEXT_VOCABULARY
from vlm.encoders.timm import TimmEncoder
from vlm.models.dual_stream import CoAttention, DualStream
from vlm.models.pair_model import boxes

BERT: dict[str, Any] = {
    **{"vocab_size": TEXT_VOCABULARY - 1, "hidden_size": 16, "num_hidden_layers": 3},
    **{"num_attention_heads": 2, "intermediate_size": 64},
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny(DualStream)


def test_without_the_image_it_is_a_bert(tmp_path: Path) -> None:
    """Its weights are taken over, and the words of a text that no layer of co-attention changes are predicted so."""
    reference = shaken(BertForMaskedLM(BertConfig(**BERT)))
    reference.save_pretrained(tmp_path)
    tokenizer = tiny_dual().tokenizer
    tokenizer.save_pretrained(tmp_path)
    ours = tiny_dual(init="bert", init_from=str(tmp_path), package=None).eval()
    batch = pairs()
    words = ours.text.embed(batch.input_ids)
    for block in ours.text.blocks:
        words = block(words, batch.attention_mask)
    found = reference(batch.input_ids, attention_mask=batch.attention_mask.long(), output_hidden_states=True)
    real = batch.attention_mask
    torch.testing.assert_close(words[real], found.hidden_states[-1][real], atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.predict_words(words[real])[:, :-1], found.logits[real], atol=1e-5, rtol=0)


def test_co_attention_is_that_of_lxmert() -> None:
    """LXMERT has one set of weights for both directions, so ours has it twice here."""
    torch.manual_seed(0)
    reference = shaken(LxmertXLayer(LxmertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=64)))
    ours = CoAttention(16, 16, inner_width=16, num_heads=2, image_feed_width=64, dropout=0.0).eval()
    theirs = reference.visual_attention
    for attention in (ours.text, ours.image):
        for name in ("query", "key", "value"):
            getattr(attention, name).load_state_dict(getattr(theirs.att, name).state_dict())
        attention.out.load_state_dict(theirs.output.dense.state_dict())
        attention.norm.load_state_dict(theirs.output.LayerNorm.state_dict())
    for feed, up, down in (
        (ours.text_feed, reference.lang_inter, reference.lang_output),
        (ours.image_feed, reference.visn_inter, reference.visn_output),
    ):
        feed.up.load_state_dict(up.dense.state_dict())
        feed.down.load_state_dict(down.dense.state_dict())
        feed.norm.load_state_dict(down.LayerNorm.state_dict())
    words, cells = torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    hidden = torch.where(mask, 0.0, -torch.inf)[:, None, None]
    (words_seen, *_), (cells_seen, *_) = reference.cross_att(words, hidden, cells, None)
    expected = reference.output_fc(words_seen, cells_seen)
    for mine, other in zip(ours(words, cells, mask), expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)


def test_the_published_places_of_co_attention(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 3 blocks of text and 2 of the image: text; co-attention, text, image; co-attention, text, image."""
    called: list[str] = []
    for name, module in model.named_modules():
        if found := re.fullmatch(r"(text|image)\.blocks\.(\d)|(co_attention)\.(\d)", name):
            label = (found[1] or found[3]) + (found[2] or found[4])
            module.register_forward_pre_hook(lambda *_, label=label: called.append(label))
    batch = pairs()
    model.fuse(model.features(batch), batch.input_ids, batch.attention_mask)
    assert called == ["text0", "co_attention0", "text1", "image0", "co_attention1", "text2", "image1"]


def test_padding_changes_nothing(model: Any) -> None:
    whole, alone = pairs(), pairs(1, 2)
    assert alone.input_ids.shape[1] < whole.input_ids.shape[1]
    one, all_ = (model.fuse(model.features(each), each.input_ids, each.attention_mask) for each in (alone, whole))
    torch.testing.assert_close(one.words[0], all_.words[1, : alone.input_ids.shape[1]])
    torch.testing.assert_close(one.cells[0], all_.cells[1])
    torch.testing.assert_close(one.pair[0], all_.pair[1])


def test_each_side_sees_the_other(model: Any) -> None:
    batch = pairs()
    features = model.features(batch)
    own = model.fuse(features, batch.input_ids, batch.attention_mask)
    other_image = model.fuse(features.roll(1, 0), batch.input_ids, batch.attention_mask)
    other_text = model.fuse(features, batch.input_ids.roll(1, 0), batch.attention_mask.roll(1, 0))
    assert (own.words - other_image.words)[batch.attention_mask].abs().amax(1).min() > 1e-3
    assert (own.cells - other_text.cells).abs().amax(2).min() > 1e-3


def test_nothing_leaks_from_a_hidden_cell(model: Any) -> None:
    """Not through the features of its neighbors either: other pixels in it change no feature at all."""
    pixel_values = pairs().pixel_values
    hidden = torch.zeros(8, NUM_CELLS, dtype=torch.bool)
    hidden[:, 4] = hidden[:, 2] = True  # the middle and the top right
    changed = pixel_values.clone()
    changed[:, :, CELL : 2 * CELL, CELL : 2 * CELL] = 7.0
    changed[:, :, :CELL, 2 * CELL :] = -7.0
    found = model.masked_features(pixel_values, hidden)
    assert torch.equal(found, model.masked_features(changed, hidden))
    assert (found[hidden] == 0).all()
    visible = model.masked_features(pixel_values, None)
    assert not torch.equal(visible, model.masked_features(changed, None))
    assert (visible[:, 0] - found[:, 0]).abs().max() > 1e-3, "a neighbor's features hold the cell where it is visible"


def test_boxes_of_cells(model: Any) -> None:
    expected = [[0, 0, 1 / 3, 1 / 2], [1 / 3, 0, 2 / 3, 1 / 2], [2 / 3, 0, 1, 1 / 2], [0, 1 / 2, 1 / 3, 1]]
    torch.testing.assert_close(boxes((2, 3))[:4], torch.tensor(expected))
    locations = model.image.locations
    assert locations[0].tolist() == [0, 0, 1, 1, 1], "the mean of the image is at the whole of it"
    torch.testing.assert_close(locations[1:, 4], torch.full((NUM_CELLS,), 1 / NUM_CELLS))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_depth": 4}, "model.image_depth=4 is more than model.depth=3, and each block of the image goes with"),
        ({"width": 15}, "model.width=15 must be a multiple of model.num_heads=2; try model.width=14"),
        (
            {"image_width": 25},
            "model.image_width=25 must be a multiple of model.image_heads=3; try model.image_width=24",
        ),
        ({"co_width": 1}, "model.co_width=1 must be a multiple of model.co_heads=2; try model.co_width=2"),
        (
            {"init": "bert"},  # the MiniLM of the package
            "has depth=6, the model has 3; set model.depth=6",
        ),
    ],
)
def test_options_that_do_not_fit(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        tiny_dual(**changes)


def test_an_encoder_with_other_cells_than_its_classifier() -> None:
    finer = TimmEncoder(name="test_efficientnet", weights="random", image_size=96, layer=2)
    said = "the encoder has 12×12 = 144 cells, but its classifier 9; set encoder.layer=-1"
    with pytest.raises(ValueError, match=re.escape(said)):
        DualStream(encoder=finer, classes=classes(), init="random", init_from="x", package=PACKAGE)
    assert encoder().grid == (3, 3)


def test_texts_are_no_longer_than_the_positions(model: Any) -> None:
    model.check_rows(max_length=512, packing=False)
    with pytest.raises(ValueError, match=r"data.max_length=513 is more than the 512 tokens that BERT's positions take"):
        model.check_rows(max_length=513, packing=False)
    with pytest.raises(ValueError, match=r"set data\.packing=false"):
        model.check_rows(max_length=32, packing=True)
