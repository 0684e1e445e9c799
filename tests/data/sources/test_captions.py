"""Captions from COCO, JSONL and CSV: what they yield, how they split, and what they refuse."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.sources import answer, picture, refusal, samples, write
from vlm.data.images import load_image
from vlm.data.sources.captions import Captions
from vlm.schema import BadSample


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for index in range(8):
        picture(tmp_path / "images" / f"{index}.png", color=(index, 0, 0))
    return tmp_path / "images"


@pytest.fixture
def coco(images: Path) -> Path:
    return write(
        images.parent / "coco.json",
        {
            "images": [{"id": 100 + index, "file_name": f"{index}.png"} for index in range(8)],
            "annotations": [
                {"id": 1000 + 10 * index + turn, "image_id": 100 + index, "caption": f" Caption {turn} of {index}.\n"}
                for turn in range(3)
                for index in range(7)
            ],
        },
    )


def test_coco_trains_on_every_caption_and_validates_every_image_once(coco: Path, images: Path) -> None:
    train, val = (
        Captions(split=split, annotations=coco, images=images, val_fraction=0.4, prompt="What?")
        for split in ("train", "val")
    )
    train_images, val_images = ({sample.meta["image"] for sample in samples(source)} for source in (train, val))
    assert not train_images & val_images
    assert train_images | val_images == {f"{index}.png" for index in range(7)}
    assert (len(train), len(val)) == (3 * len(train_images), len(val_images))
    assert train.left_out == {"images without a caption": 1}

    first = int(val[0].meta["image"][0])
    assert val[0].id == f"10{first}0"
    assert val[0].messages == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": f"Caption 0 of {first}."}]},
    ]
    assert json.loads(val[0].meta["references"]) == [f"Caption {turn} of {first}." for turn in range(3)]
    assert val[0].images[0].getpixel((0, 0)) == (first, 0, 0)
    assert [answer(sample)[:9] for sample in samples(train)[:3]] == ["Caption 0", "Caption 1", "Caption 2"]
    assert "references" not in train[0].meta


def test_each_caption_has_one_of_several_prompts(coco: Path, images: Path) -> None:
    prompts = ["What?", "<image> Which?", ""]
    made = {"annotations": coco, "images": images, "val_fraction": 0.0}
    found = samples(Captions(split="train", prompt=prompts, **made))
    asked = {sample.id: [item.get("text", "<image>") for item in sample.messages[0]["content"]] for sample in found}
    assert {tuple(pieces) for pieces in asked.values()} == {("<image>", "What?"), ("<image>", " Which?"), ("<image>",)}
    again = samples(Captions(split="val", prompt=prompts, **made))
    assert all([item.get("text", "<image>") for item in s.messages[0]["content"]] == asked[s.id] for s in again)
    with pytest.raises(
        ValueError, match=r'^data\.prompt=\[\] has no prompt; write at least one, or data\.prompt="" for none$'
    ):
        Captions(split="train", prompt=[], **made)


def test_jsonl_csv_and_json_list_say_the_same(images: Path, tmp_path: Path) -> None:
    rows = [("0.png", 'A "red" dot, small'), ("1.png", "青い点。\u2028次"), ("0.png", "Again")]
    records = [{"image": image, "caption": caption} for image, caption in rows]
    quoted = "".join(f'{image},"{caption.replace(chr(34), chr(34) * 2)}"\n' for image, caption in rows)
    files = [
        write(tmp_path / "a.jsonl", records),
        write(tmp_path / "a.csv", "\ufeffimage, caption\n" + quoted),
        write(tmp_path / "a.json", records),
        write(tmp_path / "lines.json", "\n".join(json.dumps(record) for record in records)),
    ]
    for file in files:
        found = samples(Captions(split="train", annotations=file, images=images, val_fraction=0.0))
        assert [(sample.meta["image"], answer(sample)) for sample in found] == [rows[0], rows[2], rows[1]]
    assert [
        sample.id for sample in samples(Captions(split="train", annotations=files[0], images=images, val_fraction=0.0))
    ] == [
        "a.jsonl:1",
        "a.jsonl:3",
        "a.jsonl:2",
    ]
    assert Captions(split="train", annotations=files[1], images=images, val_fraction=0.0)[0].id == "a.csv:2"
    assert Captions(split="train", annotations=files[2], images=images, val_fraction=0.0)[2].id == "a.json[1]"


def test_a_list_of_captions_in_one_line_and_a_validation_file(images: Path, tmp_path: Path) -> None:
    train_file = write(tmp_path / "train.jsonl", [{"image": "0.png", "caption": ["One.", "Two."]}])
    val_file = write(tmp_path / "val.jsonl", [{"image": "1.png", "caption": ["Three.", "Four."]}])
    options = {"annotations": train_file, "images": images, "val_annotations": val_file}
    train, val = Captions(split="train", **options), Captions(split="val", **options)
    assert [(sample.id, answer(sample)) for sample in samples(train)] == [
        ("train.jsonl:1", "One."),
        ("train.jsonl:1#1", "Two."),
    ]
    assert [(sample.id, answer(sample)) for sample in samples(val)] == [("val.jsonl:1", "Three.")]
    assert val[0].meta["references"] == '["Three.", "Four."]'


def test_spellings_of_one_image_stay_on_one_side(images: Path, tmp_path: Path) -> None:
    names = [name for index in range(8) for name in (f"{index}.png", f"./{index}.png", str(images / f"{index}.png"))]
    file = write(tmp_path / "a.jsonl", [{"image": name, "caption": name} for name in names])
    val = Captions(split="val", annotations=file, images=images, val_fraction=0.4)
    train = Captions(split="train", annotations=file, images=images, val_fraction=0.4)
    assert 0 < len(val) < 8
    assert len(train) == 3 * (8 - len(val))
    assert all(len(json.loads(sample.meta["references"])) == 3 for sample in samples(val))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"images": [],\n "annotations": [}\n', r"a\.json' line 2 is not JSON \(Expecting value\); correct"),
        ("a.json", '{\n"images": []}\n}', r"a\.json' line 3 is not JSON \(Extra data\)"),
        ("a.json", "7", r"a\.json' holds a number; give a list of samples or an object"),
        ("a.json", "[" * 100_000, r"a\.json' is JSON that cannot be read"),
        ("a.json", {"images": []}, r"a\.json' has no list 'annotations' but 'images'; give COCO captions"),
        ("a.json", [], r"a\.json' holds 0 captions; set data\.annotations="),
        ("a.jsonl", '{"image": "0.png", "caption": "x"}\n\n{"image"\n', r"a\.jsonl' line 3 is not JSON"),
        (
            "a.csv",
            "0.png,A dot\n",
            r"a\.csv' has no column 'image' in its first line \('0\.png', 'A dot'\); write image,cap",
        ),
        ("a.csv", "\ufeff \n", r"a\.csv' is an empty file; set data\.annotations="),
        ("a.csv", 'image,caption\n0.png,x\n0.png,"un\nclosed', r"a\.csv' line 3 is not CSV"),
        (
            "a.txt",
            "x",
            r"a\.txt' has no column 'image' in its first line \('x'\); write image,caption there, or rename",
        ),
        (
            "a.xml",
            "x",
            r"a\.xml' ends in '\.xml'; give a \.json, \.jsonl, \.ndjson, \.csv, \.tsv, \.txt or \.token file",
        ),
    ],
)
def test_caption_files_that_cannot_be_read(images: Path, tmp_path: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Captions(split="train", annotations=write(tmp_path / name, content), images=images)


def test_caption_files_that_are_not_there_or_not_text(images: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"there is no file '.*gone\.json'; set data\.annotations= to the annotation file"
    ):
        Captions(split="train", annotations=tmp_path / "gone.json", images=images)
    file = write(tmp_path / "a.jsonl", [{"image": "0.png", "caption": "x"}])
    with pytest.raises(ValueError, match=r"there is no file '.*gone'; set data\.val_annotations="):
        Captions(split="val", annotations=file, val_annotations="gone", images=images)
    with pytest.raises(ValueError, match=r"there is no folder '.*gone'; set data\.images="):
        Captions(split="train", annotations=file, images=tmp_path / "gone")
    with pytest.raises(ValueError, match=r"none of the 1 images in '.*' falls into val with val_fraction 1e-09; set"):
        Captions(split="val", annotations=file, images=images, val_fraction=1e-9)
    (tmp_path / "latin.jsonl").write_bytes(b'{"image": "0.png", "caption": "x"}\n{"caption": "\xe9t\xe9"}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl' line 2 is not UTF-8"):
        Captions(split="train", annotations=tmp_path / "latin.jsonl", images=images)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", [{"caption": "x"}], "'a.jsonl:1' has no image name under 'image'; write the file's path there"),
        ("a.jsonl", [{"image": "0.png"}], "'a.jsonl:1' has no text as its caption; write one or remove the sample"),
        ("a.jsonl", [{"image": "0.png", "caption": " "}], "'a.jsonl:1' has no text as its caption; write"),
        ("a.jsonl", [{"image": "0.png", "caption": []}], "'a.jsonl:1' has 0 captions; write one or remove the sample"),
        ("a.jsonl", [["0.png"]], "'a.jsonl:1' is a list where an object is needed; write it as {...}"),
        ("a.jsonl", [{"image": "no.png", "caption": "x"}], "'a.jsonl:1': image 'no.png' does not exist under"),
        ("a.jsonl", [{"image": "../a.jsonl", "caption": "x"}], "'a.jsonl:1': image '../a.jsonl' is outside the"),
        (
            "a.csv",
            "image,caption\n0.png,A dog, red\n",
            "'a.csv:2' has 3 fields separated by commas, but the table has 2 columns; put quotes around",
        ),
        ("a.csv", "caption,image\n0.png\n", "'a.csv:2' has 1 fields separated by commas, but the table has 2 columns;"),
        (
            "a.json",
            {"images": [{"id": 1, "file_name": "0.png"}], "annotations": [{"id": 5, "image_id": 2, "caption": "x"}]},
            "'5' names image_id '2', which is not in 'images'; add that image",
        ),
        (
            "a.json",
            {"images": [{"id": 1}], "annotations": [{"id": 5, "image_id": 1}]},
            "'5' has no image name under 'f",
        ),
        ("a.json", {"images": [], "annotations": ["x"]}, "'a.json[annotations][0]' is not an object; write it as"),
    ],
)
def test_one_bad_caption(images: Path, tmp_path: Path, name: str, content: Any, message: str) -> None:
    source = Captions(split="train", annotations=write(tmp_path / name, content), images=images, val_fraction=0.0)
    assert refusal(source).startswith(f"sample {message}")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
            "is a Git LFS pointer, not the file itself",
        ),
        (b"<!DOCTYPE html><html></html>", "is a web page; download the file itself"),
        (b"\x1f\x8b\x08\x00", "is compressed with gzip; decompress it"),
        (b"PK\x03\x04xl/worksheets", "is a zip archive, as Excel's files are; unpack it, or save it as CSV"),
        (b"PAR1\x15\x04", "is a Parquet file; read it with data=huggingface"),
    ],
)
def test_files_of_another_kind_are_named(images: Path, tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.jsonl' {says}"):
        Captions(split="train", annotations=file, images=images)
    with pytest.raises(BadSample, match=rf"image 'a\.jsonl' {says}"):
        load_image("a.jsonl", root=tmp_path)


def test_an_annotation_file_is_a_regular_file(images: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match=r"pipe\.json' is not a regular file; set data\.annotations="):
        Captions(split="train", annotations=tmp_path / "pipe.json", images=images)
    with pytest.raises(ValueError, match=rf"'{images}' is a folder; set data\.annotations="):
        Captions(split="train", annotations=images, images=images)


def test_a_link_as_the_annotation_file_is_followed_and_one_as_a_picture_is_not(images: Path, tmp_path: Path) -> None:
    """The user names the first, and the data the second."""
    rows = [{"image": "0.png", "caption": "In."}, {"image": "away.png", "caption": "Out."}]
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere" / "rows.jsonl", rows)
    picture(tmp_path / "elsewhere" / "away.png")
    (images / "away.png").symlink_to(tmp_path / "elsewhere" / "away.png")
    (images / "rows.jsonl").symlink_to(tmp_path / "elsewhere" / "rows.jsonl")
    source = Captions(split="train", annotations=images / "rows.jsonl", images=images, val_fraction=0.0)
    assert answer(source[0]) == "In."
    assert f"image 'away.png' is outside the folder '{images}'" in refusal(source, 1)
