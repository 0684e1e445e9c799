"""A source tells a sample's text without opening its images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.sources import picture, samples, write
from vlm.data.sources.captions import Captions
from vlm.data.sources.instruct import Instruct
from vlm.data.sources.stamps import Stamps


def captions(root: Path) -> Captions:
    file = write(root / "a.jsonl", [{"image": "0.png", "caption": ["A dot.", "Red."]}])
    return Captions(split="train", annotations=file, images=root, val_fraction=0.0)


def instruct(root: Path) -> Instruct:
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "!"}]
    file = write(root / "a.jsonl", [{"images": "0.png", "messages": turns}])
    return Instruct(split="train", annotations=file, images=root, val_fraction=0.0)


def stamps(root: Path) -> Stamps:
    write(root / "0.txt", "A dot.")
    return Stamps(split="train", root=root, val_fraction=0.0)


@pytest.mark.parametrize("make", [captions, instruct, stamps], ids=lambda make: make.__name__)
def test_outline_is_the_sample_without_its_images(tmp_path: Path, make: Any) -> None:
    picture(tmp_path / "0.png")
    source = make(tmp_path)
    read = samples(source)
    assert all(len(sample.images) == 1 for sample in read)
    (tmp_path / "0.png").write_text("not a picture")
    assert [source.outline(index) for index in range(len(source))] == [replace(sample, images=[]) for sample in read]
