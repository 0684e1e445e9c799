"""Metrics of captions, against the code of the evaluation of COCO's captions (pycocoevalcap).

`ptb_words.json` has 300 generated captions with the words that the Java tokenizer of pycocoevalcap 1.2 finds (Stanford
CoreNLP 3.4.1, in lower case, without its list of punctuation), recorded once.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from tests.helpers.captions import cases, official
from vlm.evaluation.captioning import bleu_sums, cider_d, frequencies, rouge_l, tokens

PTB_WORDS = json.loads((Path(__file__).parent / "ptb_words.json").read_text(encoding="utf-8"))


def test_words_are_those_of_the_java_tokenizer() -> None:
    assert len(PTB_WORDS) == 300
    assert [[text, " ".join(tokens(text))] for text, _ in PTB_WORDS] == PTB_WORDS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("?!", ""),
        ("A man's T-shirt.", "a man 's t-shirt"),
        ("don’t “stop”", "do n't stop"),
        ("shouldn't've", "should n't 've"),
        ("(red) [x]", "-lrb- red -rrb- -lsb- x -rsb-"),
        ("cannot wait…", "can not wait"),
        ("a.m. in the U.S.", "a.m. in the u.s."),
    ],
)
def test_words(text: str, expected: str) -> None:
    assert " ".join(tokens(text)) == expected


def test_cider_d_is_that_of_the_official_code() -> None:
    captions = cases()
    counts = frequencies([references for _, references in captions])
    mine = [
        cider_d(caption, references, image_frequencies=counts, num_images=len(captions))
        for caption, references in captions
    ]
    mean, scores = Cider().compute_score(*official(captions))
    assert mine == pytest.approx(scores.tolist(), abs=1e-9)
    assert 0.5 < mean < 10
    assert max(mine) > 9
    assert min(mine) < 0.1


def test_rouge_l_is_that_of_the_official_code() -> None:
    captions = cases()
    _, scores = Rouge().compute_score(*official(captions))
    assert [rouge_l(*caption) for caption in captions] == pytest.approx(scores.tolist(), abs=1e-12)
    assert len(set(scores.tolist())) > 50


def test_counts_of_bleu_are_those_of_the_official_code() -> None:
    for caption, references in cases():
        scorer = BleuScorer(test=caption, refs=references)
        counts, sums = scorer.ctest[0], bleu_sums(caption, references)
        assert [sums[f"total_{n}"] for n in range(1, 5)] == counts["guess"]
        assert [sums[f"matched_{n}"] for n in range(1, 5)] == counts["correct"]
        assert sums["length"] == counts["testlen"]
        scorer.compute_score(option="closest")
        assert sums["reference_length"] == scorer.reflen()


def test_captions_without_words() -> None:
    counts = frequencies([["a cat"], ["a dog"]])
    assert cider_d("", ["a cat"], image_frequencies=counts, num_images=2) == 0
    assert rouge_l("...", ["a cat"]) == rouge_l("a cat", ["!"]) == 0
    assert bleu_sums("", ["a cat"])["length"] == 0
    assert bleu_sums("", ["a cat"])["reference_length"] == 2
