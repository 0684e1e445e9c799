"""Multiple choice: the published layouts, how a letter is read, every rotation of the options, and chance."""

from __future__ import annotations

import base64
import csv
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.benchmarks import Table
from vlm.evaluation.benchmarks.multiple_choice import MultipleChoice
from vlm.evaluation.harness import figures, records
from vlm.evaluation.respondent import Answer
from vlm.evaluation.scorers.letter import read_letter
from vlm.launch import benchmarks

WHO = benchmarks.Who(name="a table", identity={}, methods=("generate", "rank"))
OPTIONS = ["a cat", "a dog", "two dogs", "birds"]


def png(color: tuple[int, int, int]) -> bytes:
    file = BytesIO()
    Image.new("RGB", (40, 40), color).save(file, "PNG")
    return file.getvalue()


def metrics(benchmark: MultipleChoice, answers: list[str]) -> dict[str, float]:
    found = {index: Answer(index, prediction=answer) for index, answer in enumerate(answers)}
    result = figures(benchmark, records(benchmark, found))
    return {name: metric["value"] for name, metric in result["metrics"].items()}


def jsonl(folder: Path, *questions: dict[str, Any]) -> MultipleChoice:
    return MultipleChoice(path=str(lines(folder, *questions)))


def lines(folder: Path, *questions: dict[str, Any]) -> Path:
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in questions))
    return file


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        (" (b). ", "B"),
        ("B. a dog", "B"),
        ("The answer is C.", "C"),
        ("A dog.", "B"),
        ("A is right", "A"),
        ("A dog is in the image, so B", "B"),
        ("I see birds", "D"),
        ("There are two dogs and no birds.", ""),
        ("E", ""),
        ("Because", ""),
        ("", ""),
    ],
)
def test_the_letter_of_an_answer(answer: str, letter: str) -> None:
    assert read_letter(answer, OPTIONS) == letter


def test_science_qa(tmp_path: Path) -> None:
    problem = {
        "question": "Which?",
        "choices": ["one", "two"],
        "answer": 1,
        "hint": "Look.",
        "subject": "natural science",
    }
    problems = {
        "7": {**problem, "image": "image.png", "split": "test"},
        "8": {**problem, "image": None, "split": "test", "hint": "", "subject": "social science", "answer": 0},
        "9": {**problem, "image": None, "split": "train"},
    }
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["9"], "test": ["7", "8"]}))
    image = tmp_path / "images" / "test" / "7" / "image.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(png((255, 0, 0)))
    benchmark = MultipleChoice(path=str(tmp_path))
    first, second = benchmark.questions
    assert first.text == "Look.\nWhich?\nA. one\nB. two"
    assert (first.references, second.references, second.text) == (("B",), ("A",), "Which?\nA. one\nB. two")
    assert benchmark.image(first.images[0]).getpixel((0, 0)) == (255, 0, 0)
    assert metrics(benchmark, ["B", "nothing"]) == {
        "accuracy": 0.5,
        "chance": 0.5,
        "no_letter": 0.5,
        "accuracy/natural science": 1,
        "accuracy/social science": 0,
    }
    assert [q.id for q in MultipleChoice(path=str(tmp_path), only="with_image").questions] == ["7"]
    assert [q.id for q in MultipleChoice(path=str(tmp_path), split="train").questions] == ["9"]
    target = {"_target_": "vlm.evaluation.benchmarks.multiple_choice.MultipleChoice", "path": str(tmp_path)}
    for answer_by, shown in (("letter", "B"), ("likelihood", "two")):
        options = {**target, "num_shots": 1, "answer_by": answer_by}
        asked = benchmarks.bind_benchmarks({"science": options}, defaults={})["science"]
        assert asked.demonstrations is not None
        (demonstration,) = asked.demonstrations.questions
        assert (demonstration.id, asked.demonstrations.answer(demonstration)) == ("9", shown)
    with pytest.raises(ValueError, match=r"pid_splits.json' has no split 'val', only 'train', 'test'; set data.split="):
        MultipleChoice(path=str(tmp_path), split="val")


def mmbench(folder: Path) -> MultipleChoice:
    """Two questions of four and two options about one image, and a published rotation of the first."""
    encoded = base64.b64encode(png((0, 255, 0))).decode()
    header = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    rows = [
        ["1", 'A "green"\nsquare?', "A hint", *OPTIONS, "C", "scene", encoded],
        ["2", "Which?", "", "yes", "no", "", "", "A", "object", "1"],
        ["1000001", "Rotated", "", *OPTIONS, "A", "scene", "1"],
    ]
    file = folder / "mmbench.tsv"
    with file.open("w", newline="") as opened:
        csv.writer(opened, delimiter="\t").writerows([header, *rows])
    return MultipleChoice(path=str(file))


def test_mmbench_counts_a_question_if_every_rotation_is_right(tmp_path: Path) -> None:
    benchmark = mmbench(tmp_path)
    assert not MultipleChoice(path=str(tmp_path / "mmbench.tsv"), answer_by="likelihood").circular
    assert [q.id for q in benchmark.questions] == ["1", "1#1", "1#2", "1#3", "2", "2#1"]
    assert [q.references for q in benchmark.questions] == [("C",), ("B",), ("A",), ("D",), ("A",), ("B",)]
    assert benchmark.questions[1].text == 'A hint\nA "green"\nsquare?\nA. a dog\nB. two dogs\nC. birds\nD. a cat'
    for question in benchmark.questions:
        assert benchmark.image(question.images[0]).getpixel((0, 0)) == (0, 255, 0)
    right = ["C", "B", "A", "D", "A", "B"]
    assert metrics(benchmark, right)["accuracy"] == 1
    one_wrong = metrics(benchmark, [*right[:3], "A", *right[4:]])
    assert one_wrong["accuracy"] == 0.5
    assert one_wrong["accuracy_single"] == 1
    assert (one_wrong["accuracy/scene"], one_wrong["accuracy/object"]) == (0, 1)
    assert one_wrong["chance"] == pytest.approx((1 / 4**4 + 1 / 2**2) / 2, abs=1e-6)
    assert one_wrong["chance_single"] == pytest.approx((1 / 4 + 1 / 2) / 2)


def test_num_samples_counts_questions_with_all_their_rotations(tmp_path: Path) -> None:
    mmbench(tmp_path)
    target = {"_target_": "vlm.evaluation.benchmarks.multiple_choice.MultipleChoice"}
    options = {**target, "path": str(tmp_path / "mmbench.tsv"), "num_samples": 1}
    asked = benchmarks.bind_benchmarks({"mmbench": options}, defaults={})["mmbench"]
    assert asked.indices == [0, 1, 2, 3]
    benchmarks.ask(asked, WHO, Table(["C", "B", "A", "B", "", ""]), tmp_path / "out", against=None, about={})
    results = json.loads((tmp_path / "out" / "mmbench" / "results.json").read_text())
    assert {name: metric["value"] for name, metric in results["metrics"].items() if name.startswith("acc")} == {
        "accuracy": 0,
        "accuracy_single": 1,
    }


def test_mmmu_shows_each_image_where_its_text_does(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    red, green, blue = ({"bytes": png(color), "path": None} for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
    rows = {
        "id": ["validation_Art_1", "validation_Art_2", "validation_Art_3"],
        "question": ["See <image 2>. Which?", "Open", "Compare <image 1>"],
        "options": ["['one', \"it's\", '<image 1>']", "[]", "['x', 'y']"],
        "answer": ["C", "4", "?"],
        "image_1": [red, red, blue],
        "image_2": [green, None, blue],
    }
    table = datasets.Dataset.from_dict(rows)
    (tmp_path / "parquet" / "Art").mkdir(parents=True)
    table.to_parquet(tmp_path / "parquet" / "Art" / "validation-00000-of-00001.parquet")
    datasets.DatasetDict({"validation": table}).save_to_disk(tmp_path / "disk" / "Art")
    for folder in ("parquet", "disk"):
        benchmark = MultipleChoice(path=str(tmp_path / folder))
        first, third = benchmark.questions
        assert benchmark.num_left_out == 1
        assert (first.type, first.references, third.references) == ("Art", ("C",), ())
        assert [piece.get("text", "") for piece in benchmark.messages(first)[0]["content"]] == [
            "See ",
            "",
            ". Which?\nA. one\nB. it's\nC. ",
            "",
            "\nAnswer with the option's letter from the given choices directly.",
        ]
        assert [benchmark.image(name).getpixel((0, 0)) for name in first.images] == [(0, 255, 0), (255, 0, 0)]
        assert [piece["type"] for piece in benchmark.messages(third)[0]["content"]] == [
            "image",
            "text",
            "image",
            "text",
        ]
        by_text = MultipleChoice(path=str(tmp_path / folder), answer_by="likelihood")
        assert [q.id for q in by_text.questions] == ["validation_Art_3"]
        assert by_text.num_left_out == 2


def test_options_of_mmmu_are_not_executed(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"id": ["validation_Art_1"], "question": ["Which?"], "answer": ["A"], "image_1": [None]}
    datasets.Dataset.from_dict({**rows, "options": ["__import__('os').listdir()"]}).to_parquet(
        tmp_path / "validation-0.parquet"
    )
    with pytest.raises(ValueError, match=r"row 0 has .*as 'options'; check that it is a list in Python's syntax"):
        MultipleChoice(path=str(tmp_path))


def test_seed_bench_leaves_videos_out(tmp_path: Path) -> None:
    question = {
        "choice_a": "1",
        "choice_b": "2",
        "choice_c": "3",
        "choice_d": "4",
        "question": "How many?",
        "answer": "B",
    }
    document = {
        "question_type": {"Scene Understanding": 1, "Action Prediction": 11},
        "questions": [
            {**question, "question_id": "5", "question_type_id": 1, "data_type": "image", "data_id": "x_1"},
            {**question, "question_id": "6", "question_type_id": 11, "data_type": "video", "data_id": "v.mp4"},
        ],
    }
    file = tmp_path / "SEED-Bench.json"
    file.write_text(json.dumps(document))
    (tmp_path / "SEED-Bench-image").mkdir()
    (tmp_path / "SEED-Bench-image" / "x_1").write_bytes(png((0, 0, 255)))
    benchmark = MultipleChoice(path=str(file))
    (asked,) = benchmark.questions
    assert (asked.type, asked.references, benchmark.num_left_out) == ("Scene Understanding", ("B",), 1)
    assert benchmark.image(asked.images[0]).getpixel((0, 0)) == (0, 0, 255)


def test_always_the_same_letter_is_at_chance(tmp_path: Path) -> None:
    questions = [{"question": f"{n}?", "choices": OPTIONS, "answer": OPTIONS[n % 4]} for n in range(8)]
    found = metrics(jsonl(tmp_path, *questions), ["A"] * 8)
    assert found["accuracy"] == found["chance"] == 0.25


def test_the_texts_of_the_options_are_ranked_by_mean_log_likelihood(tmp_path: Path) -> None:
    file = lines(tmp_path, {"question": "Which?", "choices": ["long", "B"], "answer": "A"})
    benchmark = MultipleChoice(path=str(file), answer_by="likelihood")
    (question,) = benchmark.questions
    assert (question.choices, benchmark.ask(question)) == (("long", "B"), "<image>\nWhich?")
    prediction = benchmark.choose(question, [(-4.0, 4), (-1.5, 1)])
    assert prediction == "A. long"
    assert benchmark.score(prediction, question) == 1
    assert benchmark.score(benchmark.choose(question, [(-4.0, 2), (-1.5, 1)]), question) == 0
    letters = MultipleChoice(path=str(file), answer_by="letter_likelihood").questions[0]
    assert (letters.choices, letters.text) == (("A", "B"), "Which?\nA. long\nB. B")


@pytest.mark.parametrize(
    ("question", "said"),
    [
        (
            {"question": "Q", "choices": ["a"], "answer": 0},
            "questions.jsonl:1 has a list of 1 as its options, where 2 to 26",
        ),
        ({"question": "Q", "choices": ["a", "b"], "answer": 2}, "questions.jsonl:1 has the answer 2, which is none of"),
        ({"choices": ["a", "b"], "answer": 0}, "questions.jsonl:1 has no 'question' but 'choices', 'answer'"),
        ({"question": "<image 1>?", "choices": ["a", "b"]}, "question 'questions.jsonl:1' shows image 1, and it has 0"),
    ],
)
def test_records_that_do_not_fit(question: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"questions.jsonl:1") as error:
        jsonl(tmp_path, question)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_path_that_does_not_exist_and_a_table_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^there is no file '.*nowhere'; set data.path="):
        MultipleChoice(path=str(tmp_path / "nowhere"))
    file = tmp_path / "other.tsv"
    file.write_text("index\tquestion\n1\tWhich?\n")
    with pytest.raises(
        ValueError, match=r"has no column 'A' in its first line \('index', 'question'\); check the file"
    ):
        MultipleChoice(path=str(file))


def test_a_folder_without_tables(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has neither validation-\*.parquet nor a folder 'validation' of datasets"):
        MultipleChoice(path=str(tmp_path))
