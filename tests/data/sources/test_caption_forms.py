"""The forms in which people keep captions: what each becomes, and which are refused with the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.sources import answer, picture, refusal, samples, url, write
from vlm.data.sources.captions import Captions
from vlm.data.sources.image_folder import ImageFolder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for index in range(4):
        picture(tmp_path / "images" / f"{index}.png", color=(index, 0, 0))
        picture(tmp_path / "images" / "val2014" / f"{index}.png", color=(10 + index, 0, 0))
    return tmp_path / "images"


def read(images: Path, name: str, content: Any, **options: Any) -> Captions:
    file = write(images.parent / name, content)
    return Captions(**{"split": "train", "annotations": file, "images": images, "val_fraction": 0.0, **options})


def pairs(source: Any) -> list[tuple[int, str]]:
    """The red of each sample's image and its caption."""
    return [(sample.images[0].getpixel((0, 0))[0], answer(sample)) for sample in samples(source)]


TWO = [(0, 'A "red" dot, small; round'), (1, "Blue.")]
LLAVA = [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "Blue."}]
HI = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hey"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'image,caption\n0.png,"A ""red"" dot, small; round"\n1.png,Blue.\n'),
        ("a.csv", 'image;caption\n0.png;"A ""red"" dot, small; round"\n1.png;Blue.\n'),
        ("a.CSV", '\ufefffile_name|text|n\r\n0.png|A "red" dot, small; round|1\r\n1.png|Blue.|2\r\n'),
        ("a.tsv", 'caption\timage\nA "red" dot, small; round\t0.png\nBlue.\t1.png\n'),
        ("a.tsv", 'image\tcaption\n0.png\t"A ""red"" dot, small; round"\n1.png\tBlue.\n'),
        ("a.txt", 'image_name| comment_number| comment\n0.png| 0| A "red" dot, small; round\n1.png| 0| Blue.\n'),
        ("a.txt", 'image,caption\n0.png,"A ""red"" dot, small; round"\n1.png,Blue.\n'),
        ("a.token", '0.png#0\tA "red" dot, small; round\n1.png#0\tBlue.\n'),
        ("a.txt", '0.png\tA "red" dot, small; round\n1.png\tBlue.\n'),
        ("a.txt", "".join(json.dumps({"image": f"{n}.png", "caption": text}) + "\n" for n, text in TWO)),
        ("a.ndjson", "".join(json.dumps({"filename": f"{n}.png", "captions": text}) + "\n" for n, text in TWO)),
        ("a.JSON", [{"file_name": f"{n}.png", "text": [text], "width": 4} for n, text in TWO]),
        (
            "a.jsonl",
            [{"image": ["0.png"], "caption": TWO[0][1]}, {"id": "1", "image": "1.png", "conversations": LLAVA}],
        ),
        ("a.jsonl", [{"image": url(n), "caption": text} for n, text in TWO]),
    ],
)
def test_tables_and_rows_say_the_same(images: Path, name: str, content: Any) -> None:
    assert pairs(read(images, name, content)) == TWO


def test_numbers_are_texts_and_lists_are_captions(images: Path) -> None:
    rows = [{"image": "0.png", "caption": 7}, {"image": "1.png", "caption": ["One.", 2.5]}]
    assert pairs(read(images, "a.jsonl", rows)) == [(0, "7"), (1, "One."), (1, "2.5")]


KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filename": f"{index}.png",
            "filepath": "val2014",
            "split": split,
            "imgid": index,
            "sentids": [index],
            "sentences": [{"raw": f"{split} {turn}", "tokens": [split], "sentid": index} for turn in range(2)],
        }
        for index, split in enumerate(["train", "restval", "val", "test"])
    ],
}


def test_karpathys_file_keeps_its_splits(images: Path) -> None:
    train = read(images, "dataset_coco.json", KARPATHY, val_fraction=0.9)
    assert pairs(train) == [(10, "train 0"), (10, "train 1"), (11, "restval 0"), (11, "restval 1")]
    val = read(images, "dataset_coco.json", KARPATHY, split="val")
    assert pairs(val) == [(12, "val 0")]
    assert json.loads(val[0].meta["references"]) == ["val 0", "val 1"]
    assert train.left_out == {"images without a caption": 0, "images of the test split": 1}
    only = {"images": KARPATHY["images"][:1]}
    with pytest.raises(ValueError, match=r"only\.json' holds 0 captions of the split val; set data\.annotations="):
        read(images, "only.json", only, split="val")


def coco(*images: tuple[Any, str], annotations: list[tuple[Any, Any, Any]]) -> dict[str, Any]:
    return {
        "images": [{"id": given, "file_name": name} for given, name in images],
        "annotations": [{"id": given, "image_id": of, "caption": text} for given, of, text in annotations],
    }


def test_ids_of_coco_may_be_strings_and_repeat_for_one_image(images: Path) -> None:
    file = coco(
        (0, "0.png"), ("1", "1.png"), (0, "0.png"), annotations=[(5, "0", "A"), ("5", 1, "B"), (6, 0, ["C", "D"])]
    )
    source = read(images, "a.json", file)
    assert pairs(source) == [(0, "A"), (0, "C"), (0, "D"), (1, "B")]
    assert [sample.id for sample in samples(source)] == ["5", "6", "6#1", "a.json[annotations][1]"]


def test_images_of_coco_that_share_an_id_are_refused(images: Path) -> None:
    file = coco((7, "0.png"), (8, "2.png"), ("7", "1.png"), annotations=[(5, 7, "A")])
    with pytest.raises(ValueError, match=r"a\.json' has two images of id '7', '0\.png' and '1\.png', so a caption"):
        read(images, "a.json", file)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": "0.png", "caption": True}, "has no text as its caption but True; write one or remove the sample"),
        ({"image": "0.png", "caption": {"en": "A"}}, "has no text as its caption but an object of 'en'; write one"),
        ({"image": "0.png", "caption": [None]}, "has no text as its caption; write one or remove the sample"),
        ({"image": {"url": "x"}, "caption": "A"}, "has no image name under 'image' but an object of 'url'; write the"),
        (
            {"path": "0.png", "img": "1.png", "caption": "A"},
            "has no 'image' but both 'img' and 'path'; choose one",
        ),
        (
            {"image": "0.png", "text": "A", "comment": "B"},
            "has no 'caption' but both 'text' and 'comment'; choose one",
        ),
        (
            {"image": "1.png", "conversations": [*LLAVA, *HI]},
            "has 4 turns and 1 images where a caption needs 2 turns (a question",
        ),
        (
            {"image": "1.png", "conversations": LLAVA[:1]},
            "ends with a user turn (turn 1 of 1); add the answer or remove",
        ),
    ],
)
def test_a_caption_of_another_kind_is_told_as_such(images: Path, record: dict[str, Any], message: str) -> None:
    source = read(images, "a.jsonl", [record, {"image": "3.png", "caption": "Good."}])
    bad = next(index for index in range(2) if source._records[index][0][0] == "a.jsonl:1")
    assert refusal(source, bad).startswith(f"sample 'a.jsonl:1' {message}")


def test_a_line_of_flickr30k_without_its_number_is_a_bad_sample(images: Path) -> None:
    text = "image_name| comment_number| comment\n0.png| 4   A dog runs .\n1.png| 0| Blue.\n"
    source = read(images, "results.csv", text)
    assert refusal(source).startswith(
        "sample 'results.csv:2' has 2 fields separated by bars, but the table has 3 columns; cor"
    )
    assert answer(source[1]) == "Blue."


def test_names_of_columns_can_be_given(images: Path) -> None:
    columns = {"photo": "image", "legend": "caption", "text": None}
    table = "photo,text,legend\n0.png,x,Red.\n"
    assert pairs(read(images, "a.csv", table, columns=columns)) == [(0, "Red.")]
    row = {"photo": "0.png", "text": "x", "legend": "Red."}
    assert pairs(read(images, "a.jsonl", [row], columns=columns)) == [(0, "Red.")]
    with pytest.raises(
        ValueError, match=r"^data\.columns maps 'legend' to 'text'; choose one of image, caption, or null"
    ):
        read(images, "a.csv", table, columns={"legend": "text"})


def test_an_object_of_many_keys_is_told_in_one_line(images: Path) -> None:
    with pytest.raises(ValueError, match=r"has no list 'images' but '0', '1', '2', '3', '4' and 4,995 more; give"):
        read(images, "a.json", {str(key): "x" for key in range(5000)})


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("<image>\nWhat?", ["<image>", "\nWhat?"]),
        ("Of <image>?", ["Of ", "<image>", "?"]),
        ("\\<image>?", ["<image>", "<image>?"]),
    ],
)
def test_a_prompt_says_where_the_image_is(images: Path, prompt: str, asked: list[str]) -> None:
    source = read(images, "a.jsonl", [{"image": "0.png", "caption": "A"}], prompt=prompt)
    assert [piece.get("text", "<image>") for piece in source[0].messages[0]["content"]] == asked


def test_kohyas_endings_and_upper_case(tmp_path: Path) -> None:
    for index, (image, text) in enumerate([("a.JPG", "a.TXT"), ("b.png", "b.caption"), ("c.Png", "c.CAPTION")]):
        picture(tmp_path / image, color=(index, 0, 0), size=(16, 16))
        (tmp_path / text).write_text(f"Dot {index}.")
    (tmp_path / "alone.caption").write_text("x")
    source = ImageFolder(split="train", root=tmp_path, val_fraction=0.0)
    assert [(sample.id, answer(sample)) for sample in samples(source)] == [
        ("a.JPG", "Dot 0."),
        ("b.png", "Dot 1."),
        ("c.Png", "Dot 2."),
    ]
    assert source.left_out == {"text files without an image": 1}


def test_two_texts_for_one_image_and_an_empty_one(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    for name in ("a.txt", "a.caption"):
        (tmp_path / name).write_text("x")
    (tmp_path / "b.txt").write_text(" \n")
    source = ImageFolder(split="train", root=tmp_path, val_fraction=0.0)
    assert refusal(source, 0) == "sample 'a.png' has 'a.caption' and 'a.txt' beside it; keep one of them"
    assert refusal(source, 1).startswith("sample 'b.png' has an empty file 'b.txt' beside it; write its caption there")
