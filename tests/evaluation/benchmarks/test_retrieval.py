"""Retrieval: ranks in both directions by hand, the prior of a caption, equal captions, and chance."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm.evaluation.benchmarks.retrieval import Retrieval, chance
from vlm.evaluation.harness import figures, records
from vlm.evaluation.respondent import Answer

# Of each image (rows) the nats of each caption (columns): three pairs.
NATS = [[-1.0, -2.0, -9.0], [-3.0, -4.0, -8.0], [-6.0, -5.0, -7.0]]


def pairs(folder: Path, *captions: str, **options: Any) -> Retrieval:
    for number, _ in enumerate(captions):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    file = folder / "captions.json"
    file.write_text(json.dumps([{"image": f"{n}.png", "caption": text} for n, text in enumerate(captions)]))
    chosen = {"num_candidates": len(captions), **options}
    return Retrieval(annotations=str(file), images=str(folder), **chosen)


def metrics(benchmark: Retrieval, nats: list[list[float]]) -> dict[str, float]:
    """With row and column of `nats` as the pairs are numbered in the file."""
    numbers = [benchmark.image(question.images[0]).getpixel((0, 0))[0] for question in benchmark.questions]
    found = {
        index: Answer(index, log_likelihoods=[(nats[number][other], 1) for other in numbers])
        for index, number in enumerate(numbers)
    }
    result = figures(benchmark, records(benchmark, found))
    return {name: metric["value"] for name, metric in result["metrics"].items()}


def test_both_directions_by_hand(tmp_path: Path) -> None:
    benchmark = pairs(tmp_path, "a", "b", "c")
    assert all(set(question.choices) == {"a", "b", "c"} for question in benchmark.questions)
    found = metrics(benchmark, NATS)
    # Image 0 prefers its caption, image 1 and 2 another; captions 0 and 2 prefer their image, caption 1 image 0.
    assert found["image_to_text/R@1"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["text_to_image/R@1"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["image_to_text/chance@1"] == found["text_to_image/chance@1"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["image_to_text/R@5"] == found["image_to_text/chance@5"] == 1


def test_the_prior_of_a_caption_is_subtracted(tmp_path: Path) -> None:
    # The means of the columns are -10/3, -11/3 and -8; less these, image 2 prefers its caption, image 1 caption 0.
    found = metrics(pairs(tmp_path, "a", "b", "c", prior=True), NATS)
    assert found["image_to_text/R@1"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["text_to_image/R@1"] == pytest.approx(2 / 3, abs=1e-6)


def test_equal_captions_are_both_right_and_ties_are_misses(tmp_path: Path) -> None:
    found = metrics(pairs(tmp_path, "same", "same", "c"), [[-2.0, -2.0, -3.0], [-2.0, -2.0, -3.0], [-1.0, -1.0, -1.0]])
    # Images 0 and 1 are right by either caption; image 2 has a tie. The best image for "same" is image 2.
    assert found["image_to_text/R@1"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["text_to_image/R@1"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["image_to_text/chance@1"] == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3, abs=1e-6)


def test_likelihoods_of_shuffled_images_are_at_chance(tmp_path: Path) -> None:
    num, rng = 40, random.Random(0)
    benchmark = pairs(tmp_path, *(f"caption {n}" for n in range(num)))
    hits = []
    for _ in range(20):
        order = rng.sample(range(num), num)
        nats = [[-1.0 if other == order[n] else -2.0 - rng.random() for other in range(num)] for n in range(num)]
        hits.append(metrics(benchmark, nats)["image_to_text/R@1"])
    assert sum(hits) / len(hits) == pytest.approx(1 / num, abs=0.02)


def test_the_prompt_does_not_tell_the_form_of_the_caption() -> None:
    benchmark = Retrieval(data="shapes", num_candidates=50)
    assert len({benchmark.ask(question) for question in benchmark.questions}) == 1
    assert len({json.dumps(benchmark.messages(question)) for question in benchmark.questions}) == 1
    assert benchmark.num_left_out > 0


def test_pools_are_apart(tmp_path: Path) -> None:
    benchmark = pairs(tmp_path, "a", "b", "c", "d", "e", num_candidates=2, num_pools=None)
    assert len(benchmark.questions) == 4
    first, second, third, _ = benchmark.questions
    assert (first.unit, first.choices) == (second.unit, second.choices)
    assert not {*first.choices} & {*third.choices}


def test_too_few_images(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"num_candidates=3 and data.num_pools=2 need 6 images, and there are 4; lower"
    ):
        pairs(tmp_path, "a", "b", "c", "d", num_candidates=3, num_pools=2)
    with pytest.raises(ValueError, match=r"data.data=captions needs data.annotations= and data.images="):
        Retrieval()


def test_chance_with_several_right_candidates() -> None:
    assert chance(10, 1, 5) == 0.5
    assert chance(4, 2, 2) == pytest.approx(1 - 1 / 6)
    assert chance(3, 1, 5) == 1
