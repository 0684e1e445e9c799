"""MME from folders of both published forms."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.benchmarks import figures, values, write_images
from vlm.evaluation.benchmarks.mme import Mme, Perception
from vlm.launch.benchmarks import bind_benchmarks

ASK = " Please answer yes or no."


def write(folder: Path, name: str, *answers: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"Is it {number}?{ASK}\t{answer}\n" for number, answer in enumerate(answers)]
    (folder / f"{name}.txt").write_text("".join(lines))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two images of `existence` side by side with their texts, one of `scene` in folders, one of `OCR`, a PNG."""
    write_images(tmp_path, "existence/0001.jpg", "existence/0002.jpg", "scene/images/a b.jpg", "OCR/0001.png")
    write(tmp_path / "existence", "0001", "Yes", "No")
    write(tmp_path / "existence", "0002", "Yes", "No")
    write(tmp_path / "scene" / "questions_answers_YN", "a b", "Yes", "No")
    write(tmp_path / "code_reasoning", "0001", "No", "Yes")
    write_images(tmp_path, "code_reasoning/0001.png")
    write(tmp_path / "OCR", "0001", "Yes", "No")
    return tmp_path


TASKS: list[Perception] = ["existence", "scene"]


def mme(root: Path) -> Mme:
    return Mme(root=str(root), tasks=[*TASKS, "code_reasoning"])


def test_questions(root: Path) -> None:
    benchmark = mme(root)
    assert [(question.id, question.images) for question in benchmark.questions] == [
        ("existence/0001/1", ("existence/0001.jpg",)),
        ("existence/0001/2", ("existence/0001.jpg",)),
        ("existence/0002/1", ("existence/0002.jpg",)),
        ("existence/0002/2", ("existence/0002.jpg",)),
        ("scene/a b/1", ("scene/images/a b.jpg",)),
        ("scene/a b/2", ("scene/images/a b.jpg",)),
        ("code_reasoning/0001/1", ("code_reasoning/0001.png",)),
        ("code_reasoning/0001/2", ("code_reasoning/0001.png",)),
    ]
    first = benchmark.questions[0]
    assert (first.text, first.references, first.type) == ("Is it 0?" + ASK, ("yes",), "existence")
    assert [benchmark.image(question.images[0]).size for question in benchmark.questions] == [(8, 8)] * 8


def test_metrics(root: Path) -> None:
    """By hand: existence has 3 of 4 right and 1 of 2 images, scene 1 of 2 and 0 of 1, code 2 of 2 and 1 of 1."""
    said = ["Yes", "No", "yes", "Yes.", "Yes", "other", "No", "y"]
    answers = dict(zip([question.id for question in mme(root).questions], said, strict=True))
    found = figures(mme(root), answers)
    assert {name: metric["value"] for name, metric in found["metrics"].items()} == {
        "perception": 75 + 50 + 50 + 0,
        "cognition": 100 + 100,
        "accuracy": 6 / 8,
        "accuracy_plus": 2 / 4,
        "score/existence": 125,
        "score/scene": 50,
        "score/code_reasoning": 200,
    }
    assert {name: metric["n"] for name, metric in found["metrics"].items() if "/" not in name} == {
        "perception": 6,
        "cognition": 2,
        "accuracy": 8,
        "accuracy_plus": 8,
    }
    assert found["headline"] == "perception"
    assert found["best_constant"]["perception"]["value"] == 50 + 50


def test_an_image_with_one_answer_has_no_part_in_accuracy_plus(root: Path) -> None:
    benchmark = mme(root)
    found = values(benchmark, {"existence/0001/1": "yes", "existence/0001/2": "no", "existence/0002/1": "no"})
    assert found["accuracy_plus"] == 1
    assert found["score/existence"] == pytest.approx(100 * 2 / 3 + 100, abs=1e-6)
    assert values(benchmark, {"scene/a b/1": "yes"})["score/scene"] is None


def bound(root: Path, **options: object) -> None:
    target = {"_target_": "vlm.evaluation.benchmarks.mme.Mme", "root": str(root), **options}
    bind_benchmarks({"mme": target}, defaults={})


def test_all_tasks_are_asked_unless_some_are_named(root: Path) -> None:
    bound(root, tasks=["OCR"])
    with pytest.raises(ValueError, match=r"no folder '.*/count'; set benchmark.mme.root=.*MME_Benchmark\) has it"):
        bound(root)
    with pytest.raises(ValueError, match=r"benchmark.mme.tasks"):
        bound(root, tasks=["ocr"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Is it?\tYes\n", "has 1 questions where 2 are published"),
        ("Is it?\tYes\nIs it not? No\n", "line 2 does not end in a tab and Yes or No"),
    ],
)
def test_other_texts_are_refused(root: Path, text: str, said: str) -> None:
    (root / "OCR" / "0001.txt").write_text(text)
    with pytest.raises(ValueError, match=said):
        bound(root, tasks=["OCR"])


def test_a_missing_image_is_named(root: Path) -> None:
    (root / "scene" / "images" / "a b.jpg").unlink()
    with pytest.raises(ValueError, match=r"no image '.*/scene/images/a b.jpg' \(or .png\)"):
        bound(root, tasks=["scene"])
    (root / "OCR" / "0001.txt").unlink()
    with pytest.raises(ValueError, match=r"has no questions \(\*.txt\)"):
        bound(root, tasks=["OCR"])
