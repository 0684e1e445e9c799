"""The model of BLIP-2's first stage against Transformers' image-text retrieval, and what each of its passes can see."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from tests.helpers.blip2 import Eye, retrieval, shaken, start
from tests.helpers.pairs import DEC, PACKAGE, TEXTS, make_pairs, tiny_pretraining
from vlm.connectors.bert_tokenizer import load_tokenizer
from vlm.connectors.qformer_weights import TEXT_VOCABULARY, start_head_from_bert
from vlm.models.qformer_pretraining import Heads, QFormerPretraining


def test_embeddings_and_matching_are_those_of_blip2(tmp_path: Path) -> None:
    reference = retrieval(tmp_path)
    connector = start(tmp_path, text=True, llm_width=None, output_rms=None)
    ours = QFormerPretraining(encoder=Eye(reference.vision_model), connector=connector, tokenizer="x", package=PACKAGE)
    for layer, theirs in (
        (ours.heads.image, reference.vision_projection),
        (ours.heads.text, reference.text_projection),
        (ours.heads.match, reference.itm_head),
    ):
        layer.load_state_dict(theirs.state_dict())
    ours.eval()
    batch = make_pairs()
    question = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long()}
    features = ours.features(batch)
    ids, mask = batch.input_ids, batch.attention_mask
    found = reference(pixel_values=batch.pixel_values, **question, use_image_text_matching_head=False)
    images, texts = ours.embed_images(features), ours.embed_texts(ids, mask)
    assert images.shape == (8, 4, 256)
    torch.testing.assert_close(images, found.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(texts, found.text_embeds, atol=1e-5, rtol=0)
    cosines = torch.einsum("ike,te->itk", images, texts).amax(-1)
    torch.testing.assert_close(cosines, found.logits_per_image, atol=1e-5, rtol=0)
    found = reference(pixel_values=batch.pixel_values, **question, use_image_text_matching_head=True)
    torch.testing.assert_close(ours.match(features, ids, mask), found.logits_per_image, atol=1e-5, rtol=0)


def test_words_are_predicted_by_the_head_of_bert(tmp_path: Path) -> None:
    reference = shaken(
        BertForMaskedLM(
            BertConfig(vocab_size=TEXT_VOCABULARY - 1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        )
    )
    reference.save_pretrained(tmp_path)
    heads = Heads(16, embed_dim=8)
    start_head_from_bert(heads.state_dict(), str(tmp_path))
    states, words = torch.randn(5, 16), torch.nn.functional.pad(reference.get_input_embeddings().weight, (0, 0, 0, 1))
    found = heads.predict_words(states, words)
    torch.testing.assert_close(found[:, :-1], reference.cls(states), atol=1e-5, rtol=0)
    assert found[:, -1].tolist() == [0.0] * 5, "[DEC] is the row that BERT does not have"


def test_description_sees_the_image_and_earlier_words_alone() -> None:
    model = shaken(tiny_pretraining())
    batch = make_pairs()
    features = model.features(batch)
    images, logits = model.describe(features, batch)
    torch.testing.assert_close(images, model.embed_images(features))
    at = torch.nonzero(batch.logits_mask)  # row and position of each prediction
    for number, (row, position) in enumerate(at.tolist()):
        alone = make_pairs([TEXTS[row][:position]], images=[batch.pixel_values[row]])
        _, of_row = model.describe(features[row : row + 1], alone)
        torch.testing.assert_close(logits[number], of_row[position])
    _, other = model.describe(features.roll(1, 0), batch)
    assert (logits - other).abs().amax(1).min() > 1e-3, "each word depends on the image"


def test_description_starts_with_dec() -> None:
    """Not with [CLS], which starts a text that is embedded."""
    model = shaken(tiny_pretraining())
    assert model.tokenizer.bos_token_id == DEC
    batch = make_pairs()
    ids = batch.input_ids.clone()
    ids[:, 0] = 7
    features = model.features(batch)
    assert torch.equal(model.describe(features, replace(batch, input_ids=ids))[1], model.describe(features, batch)[1])
    assert not torch.equal(
        model.embed_texts(ids, batch.attention_mask), model.embed_texts(batch.input_ids, batch.attention_mask)
    )


def test_padding_changes_nothing() -> None:
    model = shaken(tiny_pretraining())
    batch = make_pairs()
    features = model.features(batch)
    alone = make_pairs(TEXTS[1:2], images=[batch.pixel_values[1]])
    few = (alone.input_ids, alone.attention_mask)
    assert alone.input_ids.shape[1] < batch.input_ids.shape[1]
    torch.testing.assert_close(model.embed_texts(*few)[0], model.embed_texts(batch.input_ids, batch.attention_mask)[1])
    torch.testing.assert_close(
        model.match(features[1:2], *few)[0], model.match(features, batch.input_ids, batch.attention_mask)[1]
    )


def test_the_tokenizer_is_berts_with_dec() -> None:
    tokenizer = load_tokenizer("x", PACKAGE, option="model.tokenizer")
    assert (len(tokenizer), tokenizer.bos_token, tokenizer.eos_token) == (TEXT_VOCABULARY, "[DEC]", "[SEP]")
    assert tokenizer("A red Star.").input_ids == [101, 1037, 2417, 2732, 1012, 102]


def test_a_tokenizer_that_is_not_there() -> None:
    expected = (
        "no checkpoint for model.tokenizer: looked for the folder or hub id './nowhere' (there is no folder "
        "'./nowhere'); download it and set model.tokenizer=<folder>"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        load_tokenizer("./nowhere", None, option="model.tokenizer")


def test_texts_are_no_longer_than_the_positions() -> None:
    model = tiny_pretraining()
    model.check_rows(max_length=512, packing=False)
    with pytest.raises(ValueError, match=r"data.max_length=513 is more than the 512 tokens that the Q-Former takes"):
        model.check_rows(max_length=513, packing=False)
    with pytest.raises(ValueError, match=r"set data\.packing=false"):
        model.check_rows(max_length=32, packing=True)
