"""A folder of images and text files: what it yields, how it splits, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.sources import answer, picture, refusal, samples, write
from vlm.data.reading import Reading, applied
from vlm.data.sources.image_folder import ImageFolder


def folder(root: Path, **options: Any) -> ImageFolder:
    return ImageFolder(**{"split": "train", "root": root, "val_fraction": 0.0, **options})


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for index, name in enumerate(("a/0.png", "a/b/1.PNG", "2.jpeg")):
        picture(tmp_path / name, color=(index, 0, 0))
    write(tmp_path / "a" / "0.txt", "\ufeff A dot. \n\nRed.\r\n")
    write(tmp_path / "a" / "b" / "1.txt", "青い点。")
    write(tmp_path / "2.txt", "Two")
    return tmp_path


def test_every_line_is_a_caption(tree: Path) -> None:
    found = samples(folder(tree, prompt="What?"))
    assert [(sample.id, answer(sample)) for sample in found] == [
        ("2.jpeg", "Two"),
        ("a/0.png", "A dot."),
        ("a/0.png#1", "Red."),
        ("a/b/1.PNG", "青い点。"),
    ]
    assert found[2].images[0].getpixel((0, 0)) == (0, 0, 0)
    assert found[3].messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]


def test_validation_sees_an_image_once_and_never_one_of_training(tree: Path) -> None:
    for index in range(20):
        picture(tree / f"more/{index}.png")
        write(tree / "more" / f"{index}.txt", "One\nTwo")
    train, val = (folder(tree, split=split, val_fraction=0.4) for split in ("train", "val"))
    seen = [{sample.meta["image"] for sample in samples(source)} for source in (train, val)]
    assert not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) == 23
    assert len(val) == len(seen[1])
    assert '["One", "Two"]' in {sample.meta["references"] for sample in samples(val)}
    assert len(folder(tree, split="val", val_root=tree / "a", val_fraction=0.4)) == 2
    assert len(folder(tree, val_root=tree / "a", val_fraction=0.4)) == 4 + 40


def test_what_lacks_its_other_half_is_named_and_counted(tree: Path) -> None:
    (tree / "2.txt").unlink()
    write(tree / "a" / "0.txt", " \n")
    (tree / "a" / "b" / "1.txt").write_bytes(b"\xe9t")
    write(tree / "README.txt", "about")
    picture(tree / "._hidden.png")
    source = folder(tree)
    assert len(source) == 3
    assert source.left_out == {"text files without an image": 1}
    assert refusal(source, 0) == "sample '2.jpeg' has no '2.txt' or .caption beside it; write its caption there"
    assert (
        refusal(source, 1)
        == "sample 'a/0.png' has an empty file '0.txt' beside it; write its caption there or remove the image"
    )
    assert refusal(source, 2).startswith("sample 'a/b/1.PNG' cannot be used: text 'a/b/1.txt' is not UTF-8 (")


def test_texts_are_read_as_pictures_are(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in ("2.txt", "a/0.txt", "a/b/1.txt"):
        (tree / name).unlink()
    os.mkfifo(tree / "2.txt")
    outside = write(tmp_path_factory.mktemp("outside") / "secret.txt", "secret")
    (tree / "a" / "0.txt").symlink_to(outside)
    write(tree / "a" / "b" / "1.txt", "x" * 1001)
    with applied(Reading(max_text_bytes=1000)):
        source = folder(tree)
    assert "text '2.txt' under" in refusal(source, 0)
    assert "is not a regular file; replace it with a text file" in refusal(source, 0)
    assert "text 'a/0.txt' is outside the folder" in refusal(source, 1)
    assert refusal(source, 2) == (
        "sample 'a/b/1.PNG' cannot be used: text 'a/b/1.txt' has 1,001 bytes, more than the limit of 1,000; make it "
        "smaller, or set data.reading.max_text_bytes=1001"
    )
    message = r"holds more than 3 files and folders; .* or set data\.reading\.max_files=6"
    with applied(Reading(max_files=3)), pytest.raises(ValueError, match=message):
        folder(tree)


def test_a_folder_without_images(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "x")
    with pytest.raises(ValueError, match=r"holds 0 images among 1 files; set data\.root="):
        folder(tmp_path)
