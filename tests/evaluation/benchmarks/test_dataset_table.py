"""Datasets of the hub on disk, written by `datasets` in the columns that they are published with."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm.evaluation.benchmarks.base import Question
from vlm.evaluation.benchmarks.caption import Caption
from vlm.evaluation.benchmarks.dataset_table import DatasetTable
from vlm.evaluation.benchmarks.gqa import Gqa
from vlm.evaluation.benchmarks.mme import Mme
from vlm.evaluation.benchmarks.pope import Pope
from vlm.evaluation.benchmarks.retrieval import Retrieval
from vlm.evaluation.benchmarks.text import Text
from vlm.evaluation.benchmarks.vqa import Vqa

datasets = pytest.importorskip("datasets")

RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture(params=["parquet", "disk"])
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


def save(folder: Path, layout: str, columns: Mapping[str, list[Any]], *, split: str = "test") -> str:
    """A dataset with its images as bytes, as the hub's Parquet files or as `save_to_disk` leaves it; its folder."""
    cells = {}
    for name, values in columns.items():
        is_image = any(isinstance(value, tuple) for value in values)
        cells[name] = [None if value is None else png(value) for value in values] if is_image else values
    table = datasets.Dataset.from_dict(cells)
    for name, values in columns.items():
        if any(isinstance(value, tuple) for value in values):
            table = table.cast_column(name, datasets.Image(decode=True))
    if layout == "disk":
        datasets.DatasetDict({split: table}).save_to_disk(folder)
    else:
        (folder / "data").mkdir(parents=True, exist_ok=True)
        table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", batch_size=2)  # rows of a group
    return str(folder)


def png(color: tuple[int, int, int]) -> dict[str, Any]:
    data = BytesIO()
    Image.new("RGB", (4, 4), color).save(data, "PNG")
    return {"bytes": data.getvalue(), "path": None}


def shown(benchmark: Any, question: Question) -> Any:
    """The color of the question's image."""
    return benchmark.image(question.images[0]).getpixel((0, 0))


def test_vqa(tmp_path: Path, layout: str) -> None:
    """The columns of lmms-lab/VQAv2. Rows with one image share it, and without answers there is no score."""
    people = [{"answer": "red", "answer_confidence": "yes", "answer_id": number} for number in range(10)]
    path = save(
        tmp_path,
        layout,
        {
            "question_type": ["what color", "is the", "what"],
            "answers": [people, people[:1], None],
            "image_id": [7, 8, 7],
            "answer_type": ["other", "yes/no", "other"],
            "question_id": [70, 80, 71],
            "question": ["Which color?", "Is it?", "What?"],
            "image": [RED, BLUE, RED],
        },
    )
    benchmark = Vqa(questions=path)
    assert [(q.id, q.text, len(q.references), q.type) for q in benchmark.questions] == [
        ("70", "Which color?", 10, "other"),
        ("80", "Is it?", 1, "yes/no"),
        ("71", "What?", 0, "other"),
    ]
    assert [shown(benchmark, question) for question in benchmark.questions] == [RED, BLUE, RED]
    assert benchmark.questions[0].images == benchmark.questions[2].images
    assert benchmark.score("Red", benchmark.questions[0]) == 1
    assert Vqa(questions=path, types="question_type").questions[1].type == "is the"


def test_vizwiz(tmp_path: Path, layout: str) -> None:
    columns = {"question_id": ["VizWiz_val_00000000.jpg"], "question": ["What?"], "answers": [["a mug", "mug"]]}
    path = save(tmp_path, layout, {**columns, "image": [RED], "category": ["other"]}, split="val")
    (question,) = Vqa(questions=path, split="val").questions
    assert (question.id, question.references, question.type) == (
        "VizWiz_val_00000000.jpg",
        ("a mug", "mug"),
        "other",
    )


def test_gqa_has_its_images_apart(tmp_path: Path, layout: str) -> None:
    questions = {
        "id": ["201307251"],
        "imageId": ["n161313"],
        "question": ["Is it overcast?"],
        "answer": ["no"],
        "types": [{"structural": "verify", "semantic": "global", "detailed": "place"}],
    }
    path = save(tmp_path / "testdev_balanced_instructions", layout, questions, split="testdev")
    pictures = {"id": ["n1", "n161313"], "image": [RED, BLUE]}
    images = save(tmp_path / "testdev_balanced_images", layout, pictures, split="testdev")
    benchmark = Gqa(annotations=path, images=images)
    (question,) = benchmark.questions
    assert (question.id, question.references, question.type) == ("201307251", ("no",), "verify")
    assert shown(benchmark, question) == BLUE
    with pytest.raises(ValueError, match=r"data\.images is not given; set data\.images= to the folder"):
        Gqa(annotations=path)


def test_pope(tmp_path: Path, layout: str) -> None:
    columns = {
        "question_id": ["1", "1"],
        "question": ["Is there a dog?", "Is there a cat?"],
        "answer": ["yes", "no"],
        "image_source": ["COCO_val2014_1", "COCO_val2014_1"],
        "image": [RED, RED],
        "category": ["random", "popular"],
    }
    benchmark = Pope(annotations=save(tmp_path, layout, columns))
    assert [(q.id, q.references, q.type, q.cluster) for q in benchmark.questions] == [
        ("random/1", ("yes",), "random", "0#0#image"),
        ("popular/1", ("no",), "popular", "0#0#image"),
    ]
    assert shown(benchmark, benchmark.questions[1]) == RED
    assert [q.type for q in Pope(annotations=str(tmp_path), categories=["popular"]).questions] == ["popular"]


def test_mme(tmp_path: Path, layout: str) -> None:
    columns = {
        "question_id": ["count/1.png", "count/1.png", "OCR/2.jpg", "OCR/2.jpg"],
        "image": [RED, RED, BLUE, BLUE],
        "question": ["One?", "Two?", "A?", "B?"],
        "answer": ["Yes", "No", "No", "Yes"],
        "category": ["count", "count", "OCR", "OCR"],
    }
    path = save(tmp_path, layout, columns)
    benchmark = Mme(root=path, tasks=["OCR", "count"])
    assert [(q.id, q.references, q.unit) for q in benchmark.questions] == [
        ("OCR/2.jpg/1", ("no",), "OCR/2.jpg"),
        ("OCR/2.jpg/2", ("yes",), "OCR/2.jpg"),
        ("count/1.png/1", ("yes",), "count/1.png"),
        ("count/1.png/2", ("no",), "count/1.png"),
    ]
    assert len({question.cluster for question in benchmark.questions}) == 2
    assert shown(benchmark, benchmark.questions[1]) == BLUE
    with pytest.raises(ValueError, match=r"no questions of the task color"):
        Mme(root=path, tasks=["color"])


@pytest.mark.parametrize(
    ("column", "key"), [("answer", "file_name"), ("annotations_captions", "image_file_name"), ("caption", "filename")]
)
def test_captions_of_coco_nocaps_and_flickr30k(tmp_path: Path, layout: str, column: str, key: str) -> None:
    columns = {"image": [RED, BLUE], key: ["1.jpg", "2.jpg"], column: [["A square.", "Red."], ["Blue."]]}
    path = save(tmp_path, layout, columns)
    benchmark = Caption(annotations=path)
    assert [(q.id, q.references) for q in benchmark.questions] == [
        ("1.jpg", ("A square.", "Red.")),
        ("2.jpg", ("Blue.",)),
    ]
    assert shown(benchmark, benchmark.questions[1]) == BLUE
    retrieval = Retrieval(annotations=path, num_candidates=2)
    assert {(q.references, shown(retrieval, q)) for q in retrieval.questions} == {
        (("A square.",), RED),
        (("Blue.",), BLUE),
    }


def test_choices_of_arc_and_hellaswag(tmp_path: Path, layout: str) -> None:
    arc = {
        "id": ["Mercury_1"],
        "question": ["Which?"],
        "choices": [{"text": ["a", "b", "c"], "label": ["1", "2", "3"]}],
        "answerKey": ["2"],
    }
    (question,) = Text(annotations=save(tmp_path / "arc", layout, arc)).questions
    assert (question.id, question.choices, question.references) == ("Mercury_1", ("a", "b", "c"), ("b",))
    hellaswag = {"ctx": ["He"], "endings": [["runs", "eats"]], "label": ["1"], "split": ["val"]}
    (question,) = Text(annotations=save(tmp_path / "hellaswag", layout, hellaswag)).questions
    assert (question.text, question.references) == ("He", ("eats",))


def test_a_dataset_with_several_splits_asks_which(tmp_path: Path) -> None:
    for split in ("val", "test"):
        save(tmp_path, "parquet", {"text": [split], "image": [RED]}, split=split)
    with pytest.raises(ValueError, match=r"has the splits 'test', 'val'; set data\.split= to one of them"):
        Caption(annotations=str(tmp_path))
    assert [q.references for q in Caption(annotations=str(tmp_path), split="test").questions] == [("test",)]
    with pytest.raises(ValueError, match=r"has neither train-\*\.parquet nor a folder 'train' of datasets, there are"):
        Caption(annotations=str(tmp_path), split="train")


def test_refusals(tmp_path: Path, layout: str) -> None:
    path = save(tmp_path / "a", layout, {"image": [RED, None], "caption": ["A.", "B."]})
    with pytest.raises(ValueError, match=r"row 1 has no image; choose a split that has them"):
        Caption(annotations=path)
    with pytest.raises(ValueError, match=r"has no column of captions \(.*\) but 'image', 'label'"):
        Caption(annotations=save(tmp_path / "b", layout, {"image": [RED], "label": [1]}))
    (tmp_path / "file.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"data\.split=test is for a dataset of the hub, and '.*' is none"):
        Text(annotations=str(tmp_path / "file.jsonl"), split="test")


def test_a_folder_of_two_datasets_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a", "parquet", {"x": [1]})
    save(tmp_path / "b", "parquet", {"y": [1]})
    with pytest.raises(ValueError, match=r"has the columns 'y' and '.*' 'x'; give the folder that holds one of them"):
        DatasetTable(tmp_path, split=None)


def test_rows_of_several_files_and_groups_keep_their_images(tmp_path: Path) -> None:
    colors = [(number * 40, 0, 0) for number in range(5)]
    save(tmp_path, "parquet", {"id": [*range(5)], "image": colors})
    (tmp_path / "data" / "test-00000-of-00001.parquet").rename(tmp_path / "data" / "test-00000-of-00002.parquet")
    more = [(0, 9, 0), (0, 99, 0)]
    save(tmp_path / "more", "parquet", {"id": [5, 6], "image": more})
    table = DatasetTable(tmp_path, split="test")
    found = [table.image(fields["image"]).getpixel((0, 0)) for _, fields, _ in table.records()]
    assert found == [*colors, *more]
    assert [where for where, _, _ in table.records()][
        -1
    ] == f"{tmp_path.name}/more/data/test-00000-of-00001.parquet row 1"
