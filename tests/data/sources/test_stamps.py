"""Sources that read files: how they split, and the stamps. Captions and conversations have their own tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.sources import answer, picture, refusal, samples
from vlm.data.sources.stamps import Stamps
from vlm.data.split import group_keys, image_key, in_split

STAMPS = Path("/usr/share/tuxpaint/stamps")


# -- split ------------------------------------------------------------------------------------------------------------


def test_split_is_the_same_everywhere_and_has_the_share_asked_for() -> None:
    names = [f"{index}.jpg" for index in range(2000)]
    val = [name for name in names if in_split(name, split="val", val_fraction=0.1)]
    assert val[:5] == ["11.jpg", "12.jpg", "55.jpg", "65.jpg", "70.jpg"]  # a fixed hash: these never change
    assert abs(len(val) - 200) < 45  # three standard deviations
    assert [name for name in names if in_split(name, split="train", val_fraction=0.1)] == sorted(
        set(names) - set(val), key=names.index
    )


def test_one_key_per_image_and_per_group(tmp_path: Path) -> None:
    spellings = ("x/a.jpg", "./x/a.jpg", "x//a.jpg", "y/../x/a.jpg", str(tmp_path / "x" / "a.jpg"))
    assert {image_key(name, root=tmp_path) for name in spellings} == {"x/a.jpg"}
    assert group_keys([["c", "b"], ["d"], ["a", "c"], ["b"]]) == ["a", "d", "a", "a"]


@pytest.mark.parametrize("val_fraction", [-0.1, 1.0, 15.0])
def test_share_out_of_range(tmp_path: Path, val_fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"^val_fraction is {val_fraction}; it must be in"):
        Stamps(split="train", root=tmp_path, val_fraction=val_fraction)


# -- stamps -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    root = tmp_path / "stamps"
    for index in range(20):
        picture(root / "animals" / f"{index:02}.png", color=(index, 0, 0))
        text = f"Animal {index}.\nde.utf8=Tier {index}.\nja.utf8=動物{index}。\n"
        (root / "animals" / f"{index:02}.txt").write_text(text, encoding="utf-8")
    picture(root / "animals" / "00_mirror.png")
    picture(root / "animals" / "00_mirror_flip.png")
    picture(root / "animals" / "silent.png")
    picture(root / "animals" / "untitled.png")
    (root / "animals" / "untitled.txt").write_text("\nja.utf8=題なし。\n", encoding="utf-8")
    (root / "animals" / "00.svg").write_text("<svg/>")
    (root / "animals" / "drawn.svg").write_text("<svg/>")
    (root / "animals" / "drawn.txt").write_text("Drawn.\n")
    (root / "animals" / "00.ogg").write_bytes(b"OggS")
    picture(root / "symbols" / "a.png", color=(0, 0, 0, 0))
    (root / "symbols" / "a.txt").write_text("The letter A.\nja.utf8=\n")
    return root


def test_stamps_are_counted_and_split_by_path(stamps: Path) -> None:
    train, val = (Stamps(split=split, root=stamps) for split in ("train", "val"))
    ids = [sample.id for sample in samples(train)], [sample.id for sample in samples(val)]
    assert sorted(ids[0] + ids[1]) == [f"animals/{index:02}.png" for index in range(20)]
    assert ids[1] == [name for name in sorted(ids[0] + ids[1]) if in_split(name, split="val", val_fraction=0.15)]
    assert train.left_out == {
        "symbols": 1,
        "drawings that exist only as SVG": 1,
        "mirrored copies": 2,
        "images without a caption in 'en'": 2,
    }


def test_a_stamp_has_its_own_shape_and_its_caption(stamps: Path) -> None:
    found = {sample.id: sample for split in ("train", "val") for sample in samples(Stamps(split=split, root=stamps))}
    sample = found["animals/07.png"]
    assert sample.messages == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Animal 7."}]},
    ]
    assert sample.images[0].size == (4, 2)
    assert [sample.images[0].getpixel((0, row)) for row in range(2)] == [(7, 0, 0), (7, 0, 0)]


def test_stamps_in_japanese(stamps: Path) -> None:
    source = Stamps(split="train", root=stamps, language="ja", val_fraction=0.0)
    assert source[8].messages[0]["content"][1]["text"] == "画像を説明してください。"
    assert [answer(sample) for sample in samples(source)] == [*(f"動物{index}。" for index in range(20)), "題なし。"]
    assert source.left_out["images without a caption in 'ja'"] == 1
    assert Stamps(split="train", root=stamps, prompt="What?")[0].messages[0]["content"][1]["text"] == "What?"


def test_symbols_on_demand(stamps: Path) -> None:
    source = Stamps(split="train", root=stamps, symbols=True, val_fraction=0.0)
    assert source.left_out["symbols"] == 0
    assert len(source) == 21
    assert source[20].id == "symbols/a.png"
    assert source[20].images[0].getpixel((1, 1)) == (255, 255, 255)  # transparent, so white
    japanese = Stamps(split="train", root=stamps, symbols=True, language="ja", val_fraction=0.0)
    assert "symbols/a.png" not in [sample.id for sample in samples(japanese)]  # its translation is empty


def test_equal_files_stay_on_one_side(stamps: Path) -> None:
    for index in range(20):
        picture(stamps / "food" / f"{index:02}.png", color=(index, 0, 0))
        (stamps / "food" / f"{index:02}.txt").write_text(f"Food {index}.\n")
    val = {sample.id for sample in samples(Stamps(split="val", root=stamps, val_fraction=0.4))}
    assert {name.replace("animals", "food") for name in val if "animals" in name} == {n for n in val if "food" in n}
    assert len(val) > 2


def test_what_stamps_refuse(stamps: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no folder '/gone'; run apt-get install tuxpaint-stamps-default, or set data\.root="
    ):
        Stamps(split="train", root="/gone")
    with pytest.raises(ValueError, match=r"none of the 24 stamps .* in language 'fr'; choose one of de, en, ja$"):
        Stamps(split="train", root=stamps, language="fr")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"none of the 0 stamps .* \(no caption found: set data\.root=\)$"):
        Stamps(split="train", root=tmp_path / "empty")
    with pytest.raises(
        ValueError, match=r"none of the 20 stamps .* falls into val with val_fraction 1e-09; set data\.val_"
    ):
        Stamps(split="val", root=stamps, val_fraction=1e-9)
    assert (
        Stamps(split="val", root=stamps, val_fraction=0.0).items
        == Stamps(split="train", root=stamps, val_fraction=0.0).items
    )


def test_one_bad_stamp(stamps: Path) -> None:
    (stamps / "animals" / "00.txt").write_bytes(b"\xe9t\xe9.\n")
    (stamps / "animals" / "01.png").write_bytes((stamps / "animals" / "01.png").read_bytes()[:45])
    source = Stamps(split="train", root=stamps, val_fraction=0.0)
    assert refusal(source, 0) == "stamp 'animals/00.png' has a caption that is not UTF-8; save its .txt file as UTF-8"
    assert "image 'animals/01.png' cannot be decoded" in refusal(source, 1)
    assert answer(source[2]) == "Animal 2."


@pytest.mark.skipif(not STAMPS.exists(), reason="needs the Debian package tuxpaint-stamps-default")
def test_real_stamps() -> None:
    splits = {name: (Stamps(split="train", language=name), Stamps(split="val", language=name)) for name in ("en", "ja")}
    for train, val in splits.values():
        assert 400 < len(train) < 520
        assert 50 < len(val) < 110
        assert not {name for name, _ in train.items} & {name for name, _ in val.items}
        assert train.left_out["symbols"] > 200
        assert train.left_out["drawings that exist only as SVG"] > 100
        for sample in [source[index] for source in (train, val) for index in range(0, len(source), 40)]:
            assert sample.images[0].mode == "RGB"
            assert answer(sample).strip()
    assert [name for name, _ in splits["en"][1].items] == [name for name, _ in splits["ja"][1].items]
    assert (
        dict(splits["en"][0].items)["animals/birds/albino_peahen.png"]
        == "An albino peahen (a female peafowl, or peacock)."
    )
    assert not any("symbols/" in name for name, _ in splits["en"][0].items)
