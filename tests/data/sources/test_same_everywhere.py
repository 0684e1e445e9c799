"""The same ten conversations through every format that can hold them, and what only large files show."""

from __future__ import annotations

import json
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.sources import refusal, samples, shard, write
from vlm.data import record_file
from vlm.data.annotations import Record
from vlm.data.record_file import RecordFile
from vlm.data.sources.huggingface import HuggingFace
from vlm.data.sources.instruct import Instruct
from vlm.data.sources.webdataset import WebDataset
from vlm.schema import Sample

ROLES = {"human": "user", "gpt": "assistant"}


def png(red: int) -> bytes:
    data = BytesIO()
    Image.new("RGB", (4, 2), (red, 0, 0)).save(data, "PNG")
    return data.getvalue()


def talk(number: int) -> list[tuple[str, str]]:
    """One to three questions about 0, 1 or 2 images."""
    marks = "<image>\n" * (number % 3)
    turns = [("human", f'{marks}Is {number} "red" \\ {{[?'), ("gpt", f"はい {number}.")]
    return turns + [("human", "Sure?"), ("gpt", "Yes.\nVery.")] * (number % 2)


def names(number: int) -> list[str]:
    return [f"{number}_{place}.png" for place in range(number % 3)]


def chat(number: int) -> list[dict[str, str]]:
    return [{"role": ROLES[who], "content": text} for who, text in talk(number)]


def llava(number: int) -> dict[str, Any]:
    turns = [{"from": who, "value": text} for who, text in talk(number)]
    return {"id": str(number), "image": names(number), "conversations": turns}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(10):
        for place, name in enumerate(names(number)):
            (tmp_path / "images" / name).write_bytes(png(10 * number + place))
    return tmp_path / "images"


def sources(images: Path) -> dict[str, Any]:
    root, numbers = images.parent, range(10)
    options: dict[str, Any] = {"split": "train", "val_fraction": 0.0}
    members: dict[str, Any] = {}
    for number in numbers:
        pictures = {f"{number}.{p}.png": (images / name).read_bytes() for p, name in enumerate(names(number))}
        members |= pictures | {f"{number}.json": llava(number)}
    files = [
        write(root / "llava.json", [llava(number) for number in numbers]),
        write(root / "llava.jsonl", [llava(number) for number in numbers]),
        write(root / "chat.jsonl", [{"images": names(number), "messages": chat(number)} for number in numbers]),
    ]
    made = {file.name: Instruct(annotations=file, images=images, **options) for file in files}
    made["webdataset"] = WebDataset(shards=str(shard(root / "0.tar", members)), **options)
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    pictures = [[{"bytes": (images / name).read_bytes(), "path": None} for name in names(n)] for n in numbers]
    table = datasets.Dataset.from_dict(
        {"images": pictures[1:] + pictures[:1], "texts": [chat(n % 10) for n in range(1, 11)]}
    )
    table.save_to_disk(root / "disk")
    made["huggingface"] = HuggingFace(path=root / "disk", image_column="images", messages_column="texts", **options)
    return made


def content(sample: Sample) -> tuple[Any, list[bytes]]:
    return sample.messages, [image.tobytes() for image in sample.images]


def test_every_format_says_the_same(images: Path) -> None:
    read = {name: sorted(map(content, samples(source)), key=str) for name, source in sources(images).items()}
    assert len(read["llava.json"]) == 10
    assert sum(len(pictures) for _, pictures in read["llava.json"]) == 9
    for name, contents in read.items():
        assert contents == read["llava.json"], name


def test_outlines_of_every_format(images: Path) -> None:
    for source in sources(images).values():
        assert [source.outline(i) for i in range(10)] == [replace(s, images=[]) for s in samples(source)]


# -- large files ------------------------------------------------------------------------------------------------------


def records_of(file: Path) -> list[Record]:
    """The records of a file: seen once in order, and read again by index."""
    seen: list[Record] = []
    records = RecordFile(file, seen.append)
    assert [records[index] for index in range(len(records))] == seen
    return seen


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_records_are_found_wherever_a_chunk_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(record_file, "CHUNK", chunk)
    odd = [{"a": '\\"}'}, {"b": ["\\", {"c": "]["}]}, {"image": 'x\\\\"'}, {}, {"é": "青"}, {"n": -1.5e3}]
    for name in ("a.json", "b.jsonl"):
        assert [record.fields for record in records_of(write(tmp_path / name, odd))] == odd
    plain = json.dumps(odd, ensure_ascii=False, indent="\t")
    spaced = plain.replace("\n\t}", "\n\t} ").replace("\n", "\r\n")
    for text in (plain, spaced, f"\ufeff \n{spaced}\n\n"):
        assert [record.fields for record in records_of(write(tmp_path / "c.json", text))] == odd
    lines = "\ufeff" + "\n\n".join(json.dumps(record, ensure_ascii=False) for record in odd)
    for name in ("d.json", "d.jsonl"):
        made = records_of(write(tmp_path / name, lines))
        assert [record.fields for record in made] == odd
        assert [row.location for row in made] == [f"{name}:{line}" for line in (1, 3, 5, 7, 9, 11)]


def test_a_file_that_changes_under_a_run_gives_bad_samples(images: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", [llava(0), llava(1)])
    made = Instruct(split="train", annotations=file, images=images, val_fraction=0.0)
    write(file, "[]" + " " * file.stat().st_size)
    assert refusal(made, 1).startswith("sample 'a.json[1]' changed since the start of the run (Expecting value")


def test_text_alone_needs_no_folder_of_images(images: Path, tmp_path: Path) -> None:
    alone = write(tmp_path / "alone.jsonl", [{**llava(0), "image": None}, llava(3)])
    made = Instruct(split="train", annotations=alone, images=None, val_fraction=0.0)
    assert [sample.images for sample in samples(made)] == [[], []]
    some = write(tmp_path / "some.jsonl", [llava(0), llava(1), llava(2)])
    with pytest.raises(
        ValueError, match=r"2 of 3 conversations in '.*' have images and data\.images is null; set data"
    ):
        Instruct(split="train", annotations=some, images=None, val_fraction=0.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"id": 1}, 3]', r"has 1 of 2 items that are not objects; remove them"),
        ('[{"id": 1}\n{"id": 2}]', r"line 2 is not JSON \(Expecting ',' delimiter\); correct that line"),
        ('[{"id": "1}]', r"line 1 is not JSON \(Unterminated string"),
        ('[{"id": 1},\n{"id": 2, "image" 3}]', r"line 2 is not JSON \(Expecting ':' delimiter\); correct that line"),
        ('[{"id": 1},\n]', r"line 2 is not JSON \(Expecting value\); correct that line"),
        ('[\n{"id": 1}]\n{"id": 2}', r"line 3 is not JSON \(Extra data\); correct that line"),
        ('[\n{"id": 1}', r"line 2 is not JSON \(Expecting ',' delimiter\); correct that line"),
        ('[{"id": 1}, ' + "[" * 99999, r"line 1 is not JSON \(maximum recursion depth"),
        ("", r"a\.json' is an empty file; set data\.annotations="),
        ("7", r"a\.json' holds a value that is not a list; give a list of conversations"),
        ("[]", r"holds 0 conversations; set data\.annotations="),
    ],
)
def test_lists_that_are_not_sound(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Instruct(split="train", annotations=write(tmp_path / "a.json", content), images=None)


def test_a_list_that_is_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_bytes(b'[{"id": 1},\n\n{"id": "\xe9"}]')
    for chunk in (4, 1000):
        monkeypatch.setattr(record_file, "CHUNK", chunk)
        with pytest.raises(ValueError, match=r"a\.json' line 3 is not UTF-8 \(invalid continuation byte\); save the"):
            Instruct(split="train", annotations=tmp_path / "a.json", images=None)
