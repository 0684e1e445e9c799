"""The benchmark of captions, from files of every form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pycocoevalcap.bleu.bleu_scorer import BleuScorer

from tests.helpers.benchmarks import figures, values, write_images
from tests.helpers.captions import cases, official
from vlm.evaluation.benchmarks.caption import Caption
from vlm.launch.benchmarks import bind_benchmarks

CAPTIONS = {
    "COCO_val2014_000000000042.jpg": ["A pile of shoes.", "Dog sleeping on a shoe rack.", "Shoes and a dog."],
    "COCO_val2014_000000000073.jpg": ["A motorcycle on the grass.", "An old motorcycle."],
}


def coco() -> dict[str, Any]:
    """Annotations in another order than the images, as published; nocaps has the same form."""
    images = [{"id": int(name[-10:-4]), "file_name": name, "license": 1} for name in CAPTIONS]
    annotations = [
        {"image_id": image["id"], "id": 100 * image["id"] + number, "caption": caption}
        for image in images
        for number, caption in enumerate(CAPTIONS[image["file_name"]])
    ]
    return {"info": {}, "images": images[::-1], "licenses": [], "annotations": annotations}


def karpathy() -> dict[str, Any]:
    entries = [
        {
            "filepath": "val2014",
            "filename": name,
            "split": split,
            "sentences": [{"raw": caption, "tokens": caption.split(), "sentid": 1} for caption in captions],
        }
        for (name, captions), split in zip(CAPTIONS.items(), ("test", "val"), strict=True)
    ]
    return {"dataset": "coco", "images": entries}


RECORDS = [{"image": name, "captions": captions} for name, captions in CAPTIONS.items()]


def write(folder: Path, name: str, text: str) -> dict[str, str]:
    (folder / name).write_text(text)
    write_images(folder, *CAPTIONS, *(f"val2014/{image}" for image in CAPTIONS))
    return {"annotations": str(folder / name), "images": str(folder)}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions_val2014.json", json.dumps(coco())),
        ("captions.json", json.dumps(RECORDS)),
        ("captions.jsonl", "\n".join(map(json.dumps, RECORDS))),
    ],
)
def test_questions(tmp_path: Path, name: str, text: str) -> None:
    benchmark = Caption(**write(tmp_path, name, text))
    assert {question.id: list(question.references) for question in benchmark.questions} == CAPTIONS
    assert [benchmark.image(question.images[0]).size for question in benchmark.questions] == [(8, 8)] * 2
    assert benchmark.ask(benchmark.questions[0]) == benchmark.prompt


@pytest.mark.parametrize(("split", "number"), [("test", 0), ("val", 1)])
def test_splits_of_karpathy(tmp_path: Path, split: Any, number: int) -> None:
    benchmark = Caption(**write(tmp_path, "dataset_coco.json", json.dumps(karpathy())), split=split)
    (question,) = benchmark.questions
    name = list(CAPTIONS)[number]
    assert (question.id, list(question.references)) == (f"val2014/{name}", CAPTIONS[name])
    assert benchmark.image(question.images[0]).size == (8, 8)


def test_metrics(tmp_path: Path) -> None:
    """By hand: all of the first answer matches; of the second, four words, two pairs of three, and one triple of two.

    The second's length of 4 is as near to 3 as to 5: the shorter reference counts, so nothing is taken off for length.
    """
    benchmark = Caption(**write(tmp_path, "captions.json", json.dumps(RECORDS)))
    first, second = CAPTIONS
    found = values(benchmark, {first: "a pile of shoes", second: "A motorcycle on grass"})
    assert found["bleu_4"] == pytest.approx((1 * 5 / 6 * 3 / 4 * 1 / 2) ** 0.25, abs=1e-6)
    recall = 4 / 5
    assert found["rouge_l"] == pytest.approx((1 + 2.44 * 1 * recall / (recall + 1.44)) / 2, abs=1e-6)
    assert found["cider_d"] is not None
    assert 1 < found["cider_d"] < 10


def test_bleu_of_a_corpus_is_that_of_the_official_code(tmp_path: Path) -> None:
    """With the bootstrap's sums too: an interval around the same value."""
    captions = cases()
    records = [{"image": f"{number}.jpg", "captions": references} for number, (_, references) in enumerate(captions)]
    benchmark = Caption(**write(tmp_path, "captions.json", json.dumps(records)))
    answers = {f"{number}.jpg": caption for number, (caption, _) in enumerate(captions)}
    found = figures(benchmark, answers)
    scorer = BleuScorer()
    references, predictions = official(captions)
    for number, texts in references.items():
        scorer += (predictions[number][0], texts)
    expected, _ = scorer.compute_score(option="closest")
    bleu = found["metrics"]["bleu_4"]
    assert bleu["value"] == pytest.approx(expected[3], abs=1e-6)
    assert bleu["low"] < bleu["value"] < bleu["high"]
    assert found["best_constant"].keys() == {"cider_d", "bleu_4", "rouge_l"}


def test_captions_without_a_match_have_no_bleu(tmp_path: Path) -> None:
    benchmark = Caption(**write(tmp_path, "captions.json", json.dumps(RECORDS)))
    assert values(benchmark, dict.fromkeys(CAPTIONS, "")) == {"cider_d": 0, "bleu_4": 0, "rouge_l": 0}
    assert values(benchmark, dict.fromkeys(CAPTIONS, "no"))["bleu_4"] == 0


def bound(**options: str) -> None:
    bind_benchmarks({"caption": {"_target_": "vlm.evaluation.benchmarks.caption.Caption", **options}}, defaults={})


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    options = write(tmp_path, "captions.json", json.dumps([*RECORDS, {"image": "a.jpg", "captions": []}]))
    with pytest.raises(ValueError, match=r"sample 'captions.json\[2\]' has no text as its caption"):
        bound(**options)
    with pytest.raises(ValueError, match=r"set benchmark.caption.annotations=.*; https://cocodataset.org"):
        bound(**{**options, "annotations": str(tmp_path / "none.json")})
    options = write(tmp_path, "dataset_coco.json", json.dumps({"images": karpathy()["images"][1:]}))
    with pytest.raises(ValueError, match=r"benchmark.caption has no questions; check its files \(https://coco"):
        bound(**options)
