"""POPE from a folder of the published form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.benchmarks import figures, values, write_images
from vlm.evaluation.benchmarks.pope import Pope
from vlm.launch.benchmarks import bind_benchmarks

IMAGE = "COCO_val2014_{:012d}.jpg".format
RECORDS = {
    "random": [(1, 7, "snowboard", "yes"), (2, 7, "car", "no"), (3, 8, "dog", "yes")],
    "popular": [(1, 7, "chair", "no"), (2, 8, "person", "no")],
    "adversarial": [(1, 8, "ski", "yes"), (2, 8, "pole", "no")],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for category, records in RECORDS.items():
        lines = [
            json.dumps(
                {
                    "question_id": number,
                    "image": IMAGE(image),
                    "text": f"Is there a {what} in the image?",
                    "label": label,
                }
            )
            for number, image, what, label in records
        ]
        (tmp_path / f"coco_pope_{category}.json").write_text("\n".join(lines) + "\n")
    write_images(tmp_path / "val2014", IMAGE(7), IMAGE(8))
    return tmp_path


def pope(folder: Path) -> Pope:
    return Pope(annotations=str(folder), images=str(folder / "val2014"))


def test_questions(folder: Path) -> None:
    benchmark = pope(folder)
    assert [question.id for question in benchmark.questions] == [
        f"{category}/{number}" for category, records in RECORDS.items() for number, *_ in records
    ]
    first = benchmark.questions[0]
    assert (first.text, first.references, first.type) == ("Is there a snowboard in the image?", ("yes",), "random")
    assert first.cluster == IMAGE(7) == benchmark.questions[3].cluster
    assert benchmark.image(first.images[0]).size == (8, 8)
    assert (
        benchmark.ask(first)
        == "<image>\nIs there a snowboard in the image?\nAnswer the question using a single word or phrase."
    )


def test_metrics(folder: Path) -> None:
    """By hand: of the seven answers, four say yes, two of these rightly; three questions have the answer yes."""
    answers = {
        "random/1": "Yes",
        "random/2": "Yes, there is a car.",
        "random/3": "There is no dog in the image.",
        "popular/1": "No",
        "popular/2": "Yes",
        "adversarial/1": "Yes, it is.",
        "adversarial/2": "no",
    }
    found = values(pope(folder), answers)
    expected = {
        "accuracy": 4 / 7,
        "precision": 2 / 4,
        "recall": 2 / 3,
        "f1": 4 / 7,
        "yes_ratio": 4 / 7,
        "accuracy/random": 1 / 3,
        "precision/random": 1 / 2,
        "recall/random": 1 / 2,
        "f1/random": 1 / 2,
        "yes_ratio/random": 2 / 3,
        "accuracy/popular": 1 / 2,
        "precision/popular": 0,
        "recall/popular": None,  # no question has the answer yes
        "f1/popular": 0,
        "yes_ratio/popular": 1 / 2,
        **{f"{name}/adversarial": 1 for name in ("accuracy", "precision", "recall", "f1")},
        "yes_ratio/adversarial": 1 / 2,
    }
    assert found == {
        name: value if value is None else pytest.approx(value, abs=1e-6) for name, value in expected.items()
    }


def test_the_best_constant_answer(folder: Path) -> None:
    benchmark = pope(folder)
    best = figures(benchmark, {question.id: "yes" for question in benchmark.questions})["best_constant"]
    assert not any(name.startswith("yes_ratio") for name in best)
    assert best["accuracy"] == {"value": pytest.approx(4 / 7, abs=1e-6), "answer": "no"}
    assert best["f1"] == {"value": 0.6, "answer": "yes"}


def test_a_category_alone_has_no_types(folder: Path) -> None:
    benchmark = Pope(annotations=str(folder), images=str(folder), categories=["random"])
    assert len(benchmark.questions) == 3
    assert values(benchmark, {"random/1": "yes"}).keys() == {"accuracy", "precision", "recall", "f1", "yes_ratio"}


def bound(folder: Path) -> None:
    target = {"_target_": "vlm.evaluation.benchmarks.pope.Pope", "annotations": str(folder), "images": str(folder)}
    bind_benchmarks({"pope": target}, defaults={})


def test_a_missing_file_names_the_option_and_the_source(folder: Path) -> None:
    (folder / "coco_pope_popular.json").unlink()
    with pytest.raises(
        ValueError, match=r"no file .*set benchmark.pope.annotations=.*; https://github.com/RUCAIBox/POPE"
    ):
        bound(folder)
    with pytest.raises(ValueError, match=r"no folder .*data.json'.*set benchmark.pope.images=.* has it"):
        bound(folder / "data.json")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"question_id": 9, "image": "a.jpg", "text": "Is it?", "label": "maybe"}', "neither yes nor no"),
        ('{"question_id": 9, "image": "a.jpg", "label": "no"}', "has no 'text' but 'question_id', 'image', 'label'"),
        ('{"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "no"}', "2 questions of id 'random/1'"),
        ("[1]", "coco_pope_random.json:4"),
    ],
)
def test_other_records_are_refused(folder: Path, line: str, said: str) -> None:
    with (folder / "coco_pope_random.json").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"random") as error:
        bound(folder)
    assert said in str(error.value)
