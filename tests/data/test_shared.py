"""Pictures in train and in val: found whatever their names, folders and sources are, and only where bytes are equal."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.sources import caption_shard, cell, picture, table, write
from vlm.data import shared
from vlm.data.datamodule import VLMDataModule
from vlm.data.filter import Filtered
from vlm.data.shared import Shared, shared_images
from vlm.data.sources.captions import Captions
from vlm.data.sources.huggingface import HuggingFace
from vlm.data.sources.image_folder import ImageFolder
from vlm.data.sources.instruct import Instruct
from vlm.data.sources.mixture import Mixture
from vlm.data.sources.webdataset import WebDataset
from vlm.data.split import PART, in_split


def folder(root: Path, reds: Mapping[str, int]) -> Path:
    """Pictures of these names, each with a caption."""
    for name, red in reds.items():
        picture(root / name, color=(red, 0, 0))
        write((root / name).with_suffix(".txt"), "A dot.")
    return root


def names_of(split: str, num: int) -> list[str]:
    names = (f"{number}.png" for number in range(1000))
    return [name for name in names if in_split(name, split=split, val_fraction=0.3)][:num]  # type: ignore[arg-type]


def compared(source: Callable[..., Any]) -> Shared:
    train, val = source(split="train"), source(split="val")
    return shared_images(train, val, range(len(val)))


def of_folder(root: Path, **options: Any) -> Callable[..., Any]:
    return partial(ImageFolder, root=root, val_fraction=0.3, **options)


def test_a_copy_under_another_name_is_counted_and_named(tmp_path: Path) -> None:
    train, val = names_of("train", 4), names_of("val", 3)
    source = of_folder(folder(tmp_path, {name: number for number, name in enumerate([*train, *val])}))
    assert VLMDataModule(source=source).check_shared() is None
    folder(tmp_path, {val[1]: 2})
    said = VLMDataModule(source=source).check_shared()
    assert said is not None
    assert said.startswith(
        f"1 of 3 validation images is also in the training split, namely '{val[1]}', in train '{train[2]}': metrics"
    )
    folder(tmp_path, {val[2]: 0, val[0]: 2})
    said = VLMDataModule(source=source).check_shared()
    assert said is not None
    assert said.startswith("3 of 3 validation images are also in the training split, the first one '")


def test_the_filter_that_is_advised_helps(tmp_path: Path) -> None:
    train, val = names_of("train", 3), names_of("val", 2)
    source = of_folder(folder(tmp_path, dict.fromkeys([train[1], val[0]], 7) | {train[0]: 1, train[2]: 2, val[1]: 3}))
    splits = source(split="train"), source(split="val")
    (copy,) = (index for index in range(3) if splits[0][index].id == train[1])
    assert shared_images(*splits, [0, 1]) == Shared(1, 2, (val[0], train[1]))
    assert shared_images(*splits, [1 - [splits[1][n].id for n in (0, 1)].index(val[0])]).num_shared == 0
    left = Filtered(splits[0], split="train", left_out=[copy])
    assert shared_images(left, splits[1], [0, 1]) == Shared(0, 2, None)


def test_two_folders_of_a_mixture(tmp_path: Path) -> None:
    train, val = names_of("train", 2), names_of("val", 1)
    sources = {
        name: of_folder(folder(tmp_path / name, {train[0]: reds[0], train[1]: reds[1], val[0]: reds[2]}))
        for name, reds in (("a", (1, 2, 3)), ("b", (3, 4, 5)))
    }
    assert compared(partial(Mixture, sources=sources)) == Shared(1, 2, (f"a/{val[0]}", f"b/{train[0]}"))


def test_files_are_equal_only_in_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of one size are read in part; those that are equal there, as a whole."""
    (train, other), (val,) = names_of("train", 2), names_of("val", 1)
    folder(tmp_path, {train: 1, other: 2, val: 3})
    whole = bytearray(10 * PART)
    for name, changed in ((train, 3 * PART), (val, None)):  # between the parts
        content = bytearray(whole)
        if changed is not None:
            content[changed] = 1
        (tmp_path / name).write_bytes(content)
    reads: list[str] = []
    digest = shared._digest
    monkeypatch.setattr(shared, "_digest", lambda image: reads.append(image.name) or digest(image))
    assert compared(of_folder(tmp_path)) == Shared(0, 1, None)
    assert sorted(reads) == sorted([train, val])
    (tmp_path / train).write_bytes(whole)
    assert compared(of_folder(tmp_path)) == Shared(1, 1, (val, train))


def test_what_cannot_be_read_is_equal_to_nothing(tmp_path: Path) -> None:
    (train, other), (val, gone) = names_of("train", 2), names_of("val", 2)
    folder(tmp_path / "in", {train: 1, other: 2, val: 3, gone: 4})
    picture(tmp_path / "out.png", color=(3, 0, 0))
    source = of_folder(tmp_path / "in")
    splits = source(split="train"), source(split="val")
    (tmp_path / "in" / train).unlink()
    (tmp_path / "in" / train).symlink_to(tmp_path / "out.png")  # the loader refuses it too
    (tmp_path / "in" / gone).unlink()
    assert shared_images(*splits, [0, 1]) == Shared(0, 1, None)


def captions(tmp_path: Path) -> Callable[..., Any]:
    files = [
        write(tmp_path / f"{name}.jsonl", [{"image": f"{name}{i}.png", "caption": "A dot."} for i in (0, 1)])
        for name in ("t", "v")
    ]
    return partial(Captions, annotations=files[0], val_annotations=files[1], images=tmp_path)


def instruct(tmp_path: Path) -> Callable[..., Any]:
    files = [
        write(tmp_path / f"{name}.json", [{"image": f"{name}{i}.png", "question": "?", "answer": "!"} for i in (0, 1)])
        for name in ("t", "v")
    ]
    return partial(Instruct, annotations=files[0], val_annotations=files[1], images=tmp_path)


def data_urls(tmp_path: Path) -> Callable[..., Any]:
    def record(name: str) -> dict[str, str]:
        url = "data:image/png;base64," + base64.b64encode((tmp_path / name).read_bytes()).decode()
        return {"image": url, "question": "?", "answer": "!"}

    files = [write(tmp_path / f"{name}.json", [record(f"{name}0.png"), record(f"{name}1.png")]) for name in ("t", "v")]
    return partial(Instruct, annotations=files[0], val_annotations=files[1], images=None)


def image_folder(tmp_path: Path) -> Callable[..., Any]:
    return partial(ImageFolder, root=folder(tmp_path / "t", {"0.png": 1, "1.png": 2}),
                   val_root=folder(tmp_path / "v", {"0.png": 2, "1.png": 3}))  # fmt: skip


def shards(tmp_path: Path) -> Callable[..., Any]:
    files = caption_shard(tmp_path / "t.tar", 1, 2), caption_shard(tmp_path / "v.tar", 2, 3)
    return partial(WebDataset, shards=str(files[0]), val_shards=str(files[1]))


def tables(tmp_path: Path) -> Callable[..., Any]:
    datasets = pytest.importorskip("datasets")
    splits = {name: table({"image": [cell(red) for red in reds], "text": ["A dot."] * 2})
              for name, reds in (("train", (1, 2)), ("validation", (2, 3)))}  # fmt: skip
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "tables"))
    return partial(HuggingFace, path=tmp_path / "tables", val_split="validation")


def paths_in_tables(tmp_path: Path) -> Callable[..., Any]:
    datasets = pytest.importorskip("datasets")
    splits = {name: datasets.Dataset.from_dict({"image": [f"{name[0]}0.png", f"{name[0]}1.png"], "text": ["A."] * 2})
              for name in ("train", "validation")}  # fmt: skip
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path))
    return partial(HuggingFace, path=tmp_path, val_split="validation")


@pytest.mark.parametrize(
    "source", [captions, instruct, data_urls, image_folder, shards, tables, paths_in_tables], ids=lambda f: f.__name__
)
def test_splits_of_their_own_are_compared_in_every_source(tmp_path: Path, source: Callable[..., Any]) -> None:
    """Two pictures each, of which the second of train is the first of val."""
    for name, red in (("t0", 1), ("t1", 2), ("v0", 2), ("v1", 3)):
        picture(tmp_path / f"{name}.png", color=(red, 0, 0))
    num_shared, num_compared, example = compared(source(tmp_path))
    assert (num_shared, num_compared) == (1, 2)
    assert example is not None
