"""Tables of Hugging Face datasets on disk: what they yield, how they split, and what they refuse."""

from __future__ import annotations

import json
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.sources import answer, cell, refusal, samples, table
from vlm.data.sources.huggingface import HuggingFace

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()


def source(path: Path, **options: Any) -> HuggingFace:
    return HuggingFace(**{"split": "train", "path": path, "val_fraction": 0.0, **options})


@pytest.fixture
def captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = range(12)
    texts = [f" Dot {i}. " for i in rows]
    return table({"image": [cell(i) for i in rows], "text": texts, "of": [i // 3 for i in rows]})


def test_captions_from_disk_and_from_parquet_say_the_same(captions: Any, tmp_path: Path) -> None:
    captions.save_to_disk(tmp_path / "disk")
    (tmp_path / "files").mkdir()
    captions.to_parquet(tmp_path / "files" / "train-00000-of-00001.parquet")
    disk, parquet = (samples(source(tmp_path / kind, prompt="What?")) for kind in ("disk", "files"))
    assert disk == parquet
    assert (disk[7].id, answer(disk[7])) == ("train/7", "Dot 7.")
    assert disk[7].images[0].getpixel((0, 0)) == (7, 0, 0)
    assert disk[7].messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]


def test_rows_of_a_group_stay_on_one_side(captions: Any, tmp_path: Path) -> None:
    captions.save_to_disk(tmp_path / "disk")
    train, val = (
        [
            int(s.id.split("/")[1])
            for s in samples(source(tmp_path / "disk", split=split, val_fraction=0.4, **{"group_column": "of"}))
        ]
        for split in ("train", "val")
    )
    assert sorted(train + val) == list(range(12))
    assert not {i // 3 for i in train} & {i // 3 for i in val}
    datasets.DatasetDict({"train": captions, "test": captions.select([3])}).save_to_disk(tmp_path / "both")
    assert [s.id for s in samples(source(tmp_path / "both", split="val", val_split="test"))] == ["test/0"]
    assert len(source(tmp_path / "both", val_split="test", val_fraction=0.4)) == 12


def test_one_picture_is_never_on_both_sides(captions: Any, tmp_path: Path) -> None:
    """Eight pictures, each of them in several rows; the first rows of two hold two pictures and so join them."""
    num = 48
    pictures = [[cell(row % 8)] if row > 1 else [cell(row), cell(row + 2)] for row in range(num)]
    chat = [[{"user": f"q{row}", "assistant": "a"}] for row in range(num)]
    table({"images": pictures, "texts": chat}, images=True).save_to_disk(tmp_path / "several")
    table({"image": [cell(row % 8) for row in range(num)], "text": ["x"] * num}).save_to_disk(tmp_path / "one")
    big = BytesIO()
    Image.effect_noise((200, 200), 64).save(big, "PNG")
    assert len(big.getvalue()) > 3 * 4096  # of which parts are looked at
    alike = {"bytes": big.getvalue(), "path": None}
    table({"image": [alike] * num, "text": ["x"] * num}).save_to_disk(tmp_path / "alike")

    def reds(name: str, split: str, **options: Any) -> list[list[int]]:
        made = source(tmp_path / name, split=split, val_fraction=0.4, **options)
        return [[image.getpixel((0, 0))[0] for image in sample.images] for sample in samples(made)]

    chats = {"image_column": "images", "messages_column": "texts"}
    for name, options in (("one", {}), ("several", chats)):
        train, val = (reds(name, split, **options) for split in ("train", "val"))
        assert len(train) + len(val) == num
        assert not {red for row in train for red in row} & {red for row in val for red in row}
    with pytest.raises(ValueError, match="none of the 48 rows of 'train' falls into"):
        [reds("alike", split) for split in ("train", "val")]


def test_the_layout_of_the_cauldron(captions: Any, tmp_path: Path) -> None:
    turns = [
        {"user": "Same?", "assistant": "No.", "source": "x"},
        {"user": "Sure?", "assistant": "Yes.", "source": "x"},
    ]
    marked = [{"user": "Is <image> red?", "assistant": "Yes.", "source": "x"}]
    columns = {"images": [[cell(1), cell(2)], [cell(3)], [], [cell(4)]], "texts": [turns, marked, turns, []]}
    table(columns, images=True).save_to_disk(tmp_path / "disk")
    made = source(tmp_path / "disk", image_column="images", messages_column="texts")
    two, one, none = (made[index] for index in range(3))
    assert [piece.get("text", "<image>") for piece in two.messages[0]["content"]] == ["<image>", "<image>", "Same?"]
    assert [image.getpixel((0, 0))[0] for image in two.images] == [1, 2]
    assert [message["role"] for message in two.messages] == ["user", "assistant"] * 2
    assert [piece.get("text", "<image>") for piece in one.messages[0]["content"]] == ["Is ", "<image>", " red?"]
    assert (none.images, answer(none)) == ([], "Yes.")
    assert refusal(made, 3) == "sample 'train/3' has 0 turns of a conversation; add a user turn and its answer"


def test_lists_labels_and_numbers_as_captions(tmp_path: Path) -> None:
    texts = [["A.", "B."], ["C."], [], None, ["D.", "E.", "F."]]
    table({"image": [cell(i) for i in range(5)], "text": texts}).save_to_disk(tmp_path / "lists")
    train = source(tmp_path / "lists")
    assert [train[index].id for index in (0, 1, 2, 5)] == ["train/0", "train/0#1", "train/1", "train/4"]
    assert [answer(train[index]) for index in (0, 1, 2, 5, 6, 7)] == ["A.", "B.", "C.", "D.", "E.", "F."]
    assert train[7].images[0].getpixel((0, 0)) == (4, 0, 0)
    assert refusal(train, 3) == (
        "sample 'train/2' has an empty list in column 'text'; write a caption or remove the row"
    )
    assert refusal(train, 4) == "sample 'train/3' has no text in column 'text'; write one or remove the row"
    assert len(train) == 8
    val = source(tmp_path / "lists", split="val", val_split="train")
    assert len(val) == 5
    assert (answer(val[4]), json.loads(val[4].meta["references"])) == ("D.", ["D.", "E.", "F."])
    assert val[1].meta == {}

    labels = table({"image": [cell(0), cell(1)], "text": [1, 0]})
    labels.cast_column("text", datasets.ClassLabel(names=["cat", "dog"])).save_to_disk(tmp_path / "labels")
    assert [answer(sample) for sample in samples(source(tmp_path / "labels"))] == ["dog", "cat"]
    labels.save_to_disk(tmp_path / "numbers")
    assert [answer(sample) for sample in samples(source(tmp_path / "numbers"))] == ["1", "0"]
    table({"image": [cell(0)], "text": [{"en": "A"}]}).save_to_disk(tmp_path / "objects")
    assert refusal(source(tmp_path / "objects")) == (
        "sample 'train/0' has no text in column 'text' but an object of 'en'; write one or remove the row"
    )


def test_columns_of_questions_and_answers(tmp_path: Path) -> None:
    columns: dict[str, list[Any]] = {"image": [cell(1), None], "query": ["Red?", "Hi"], "response": ["Yes.", "Hey"]}
    columns |= {"history": [[["A?", "B."]], None], "system": ["S.", None], "note": ["x", "y"]}
    table(columns).save_to_disk(tmp_path / "disk")
    one, two = samples(source(tmp_path / "disk"))
    assert [message["role"] for message in one.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert one.messages[1]["content"] == [{"type": "image"}, {"type": "text", "text": "A?"}]
    assert (answer(one), answer(two), len(one.images), len(two.images)) == ("Yes.", "Hey", 1, 0)


def test_turns_with_roles_of_their_own_a_system_text_and_a_null_image(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "<image>Red?"}, {"role": "bot", "content": "Yes."}]
    columns: dict[str, list[Any]] = {"images": [[cell(1)], [None]], "messages": [turns] * 2, "system": ["S.", ""]}
    table(columns, images=True).save_to_disk(tmp_path / "disk")
    options = {"image_column": "images", "messages_column": "messages"}
    made = source(tmp_path / "disk", **options, role_map={"bot": "assistant"}, image_first=True)
    assert [message["role"] for message in made[0].messages] == ["system", "user", "assistant"]
    assert made[0].messages[1]["content"] == [{"type": "image"}, {"type": "text", "text": "\nRed?"}]
    assert refusal(made, 1).startswith("sample 'train/1' holds 0 images but its text has 1 image placeholder; add or")
    plain = source(tmp_path / "disk", **options)
    assert refusal(plain, 0).startswith("sample 'train/0' has 'bot' as 'role' of turn 2; choose one of user, human")


def test_rows_that_cannot_be_used(captions: Any, tmp_path: Path) -> None:
    bad = {"bytes": cell(0)["bytes"][:45], "path": None}
    table({"image": [cell(0), None, bad], "text": [" ", "x", "x"]}).save_to_disk(tmp_path / "disk")
    made = source(tmp_path / "disk")
    assert refusal(made, 0) == "sample 'train/0' has no text in column 'text'; write one or remove the row"
    assert refusal(made, 1) == "sample 'train/1' has 0 images for 1 caption; give it one"
    assert refusal(made, 2).startswith("sample 'train/2': image '1' cannot be decoded (")
    assert made.outline(2).messages[-1]["content"] == [{"type": "text", "text": "x"}]  # no picture was opened

    paths = datasets.Dataset.from_dict({"image": ["/etc/hostname"], "text": ["x"]})
    paths.save_to_disk(tmp_path / "paths")
    outside = "sample 'train/0': image '/etc/hostname' is outside the folder"
    assert refusal(source(tmp_path / "paths")).startswith(outside)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"path": "owner/name"},
            r"there is no folder .owner/name.; set data\.path= to the folder that holds the dataset, or data\.n",
        ),
        ({"path": None}, r"data\.path=None and data\.name=None, but exactly one must be given; set data\.path="),
        ({"name": "x/y"}, r"but exactly one must be given; set"),
        ({"text_column": "caption"}, r"no column 'caption', only 'image', 'text', 'of'; set data\.image_column="),
        ({"val_split": "test", "split": "val"}, r"has no split 'test', only train; set data\.train_split= or"),
        (
            {"split": "val", "val_fraction": 1e-6},
            r"none of the 12 rows of 'train' falls into val with val_fraction 1e-06; set",
        ),
    ],
)
def test_options_that_do_not_fit(captions: Any, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    captions.save_to_disk(tmp_path / "disk")
    with pytest.raises(ValueError, match=message):
        source(**{"path": tmp_path / "disk", **options})


def test_a_folder_without_tables_and_a_machine_without_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"cannot be read as a dataset \(.*\); see data\.path="):
        source(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the package datasets.*; run pip install -e '\.\[datasets\]'$"):
        source(tmp_path)
