"""Masked words and matching with the right and with another image, with models whose answers are given."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.pairs import PACKAGE, context_of, make_pairs
from vlm.connectors.bert_tokenizer import load_tokenizer
from vlm.evaluation.masked_words import MaskedWords
from vlm.evaluation.pair_matching import PairMatching
from vlm.evaluation.pair_retrieval import PairRetrieval
from vlm.models.base import Fused
from vlm.schema import Batch, LossOutput
from vlm.text.encode import TextEncoder

BERT = load_tokenizer("x", PACKAGE, option="x")
RED, BLUE, GREEN, STAR, A = BERT.convert_tokens_to_ids(["red", "blue", "green", "star", "a"])
COLORS = (RED, BLUE, GREEN, RED, BLUE, GREEN)


class Painter:
    """A model that fills each mask with the color of the image, which its first pixel names.

    A text matches an image if it has the image's color.
    """

    tokenizer = BERT
    masked: Tensor

    def features(self, batch: Batch) -> Tensor:
        return self.masked_features(batch.pixel_values, None)

    def masked_features(self, pixel_values: Tensor, hidden: None) -> Tensor:
        return pixel_values[:, :1, 0, :1]  # N 1 1

    def fuse(self, features: Tensor, ids: Tensor, mask: Tensor) -> Fused:
        self.masked = ids == BERT.mask_token_id
        return Fused(words=features.expand(-1, ids.shape[1], -1), cells=features, pair=features[:, 0])

    def predict_words(self, states: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(states[:, 0].long(), len(BERT)).float()

    def match(self, features: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        has = (ids == features[:, 0].long()).any(1)
        return torch.stack([~has, has], 1).float()


def batch() -> Batch:
    """A text of each color and its image, three of them twice."""
    images = [torch.full((3, 16, 16), float(color)) + 0.01 * number for number, color in enumerate(COLORS)]
    return make_pairs([[A, color, STAR] for color in COLORS], images=images)


def metrics(evaluator: Any, model: Any, *batches: Batch) -> dict[str, float]:
    context = context_of(model, TextEncoder(tokenizer=BERT, num_image_tokens=0, max_length=8, chat_template="plain"))
    evaluator.before_training(context)
    evaluator.start()
    for each in batches:
        evaluator.update(context, each, LossOutput({}, {}))
    return evaluator.finish(context)


def test_masked_words_with_the_right_and_another_image() -> None:
    """Images go one row down, so the other image of a text has another color."""
    model = Painter()
    found = metrics(MaskedWords(words=["red", "blue", "green"]), model, batch())
    assert model.masked.tolist() == [[False, False, True, False, False]] * 6, "the color and nothing else"
    assert (found["val/masked_words/accuracy"], found["val/masked_words/accuracy_shuffled"]) == (1, 0)
    assert found["val/masked_words/accuracy_low"] == pytest.approx(0.6097, abs=1e-4)
    assert (found["val/masked_words/accuracy_high"], found["val/masked_words/num"]) == (1, 6)


def test_texts_without_such_a_word_are_left_out() -> None:
    assert metrics(MaskedWords(words=["red"]), Painter(), batch())["val/masked_words/num"] == 2
    assert metrics(MaskedWords(words=["circle"]), Painter(), batch()) == {}


def test_any_word_may_be_masked() -> None:
    """The same one at every validation, and different ones in different samples."""
    found = []
    for _ in range(2):
        model = Painter()
        assert metrics(MaskedWords(), model, batch())["val/masked_words/num"] == 6
        found.append(model.masked.nonzero()[:, 1].tolist())
    assert found[0] == found[1]
    assert len({*found[0]}) > 1
    assert {*found[0]} <= {1, 2, 3}


def test_images_that_are_all_alike() -> None:
    """None can be swapped."""
    same = replace(batch(), pixel_values=torch.zeros(6, 3, 16, 16))
    assert metrics(MaskedWords(), Painter(), same) == {}
    assert metrics(PairMatching(), Painter(), same) == {}


@pytest.mark.parametrize(("word", "pieces"), [("red-blue", "red, -, blue"), ("☃", "[UNK]")])
def test_a_word_of_several_tokens(word: str, pieces: str) -> None:
    said = f"evaluators.masked_words.words has {word!r}, which is {pieces} to the tokenizer and must be one known token"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        metrics(MaskedWords(words=["red", word]), Painter(), batch())


def test_matching() -> None:
    found = metrics(PairMatching(), Painter(), batch(), batch())
    assert (found["val/pair_matching/accuracy"], found["val/pair_matching/accuracy_shuffled"]) == (1, 0.5)
    assert found["val/pair_matching/accuracy_low"] == pytest.approx(0.8620, abs=1e-4)  # of 24


def test_retrieval_without_embeddings() -> None:
    """Each text is matched with each image; texts and images of one color are equally good, and a tie is a miss."""
    samples = [
        replace(sample, messages=[*sample.messages[:-1], answer(BERT.decode([A, color, STAR]))])
        for sample, color in zip(batch().samples, COLORS, strict=True)
    ]
    some = replace(batch(), samples=samples, pixel_values=batch().pixel_values.floor())
    found = metrics(PairRetrieval(num_reranked=1), Painter(), some)
    assert found["val/image_to_text/R@1"] == 1, "an equal text counts as right"
    assert found["val/text_to_image/R@1"] == 1
    assert not [name for name in found if name.endswith("_contrastive")]


def answer(text: str) -> Any:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def test_a_model_that_knows_nothing_matches_at_chance() -> None:
    model = SimpleNamespace(
        features=Painter().features, match=lambda features, ids, mask: torch.tensor([[1.0, 0.0]]).expand(len(ids), -1)
    )
    found = metrics(PairMatching(), model, batch())
    assert found["val/pair_matching/accuracy"] == found["val/pair_matching/accuracy_shuffled"] == 0.5
