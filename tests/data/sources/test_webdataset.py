"""Tar shards: what they yield, in which order, how they split, and what they refuse."""

from __future__ import annotations

import gzip
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.sources import answer, caption_shard, png, refusal, samples, shard
from vlm.data.reading import Reading, applied
from vlm.data.sources.webdataset import WebDataset, shard_files


def source(shards: Path | str, **options: Any) -> WebDataset:
    return WebDataset(**{"split": "train", "shards": str(shards), "val_fraction": 0.0, **options})


def test_members_of_one_key_are_a_sample(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "<image><image>Same?"}, {"from": "gpt", "value": "No."}]
    text_only = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hey"}]
    shard(
        tmp_path / "0.tar",
        {
            "x/a.png": png(1),
            "x/b.0.png": png(2),  # keys need not lie together
            "x/a.txt": " A dot.\n",
            "x/a.json": {"caption": "Not this.", "url": "u"},
            "x/b.1.PNG": png(3),
            "x/b.json": {"conversations": talk},
            "x/c.json": {"messages": text_only},
            "x/d.png": png(4),
            "x/d.json": {"caption": "Four."},
            "x/d.cls": "7",
        },
    )
    made = source(tmp_path / "0.tar", prompt="What?")
    a, b, c, d = samples(made)
    assert [s.id for s in (a, b, c, d)] == ["0.tar/x/a", "0.tar/x/b", "0.tar/x/c", "0.tar/x/d"]
    assert [answer(s) for s in (a, b, c, d)] == ["A dot.", "No.", "Hey", "Four."]
    assert a.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]
    assert [[image.getpixel((0, 0))[0] for image in s.images] for s in (a, b, c, d)] == [[1], [2, 3], [], [4]]
    assert made.num_ignored == 1


def test_patterns(tmp_path: Path) -> None:
    for name in ("a-08", "a-09", "a-10", "b-09"):
        caption_shard(tmp_path / f"{name}.tar", 0)

    def found(pattern: str) -> list[str]:
        return [file.stem for file in shard_files(str(tmp_path / pattern), option="shards")]

    assert found("a-{08..10}.tar") == ["a-08", "a-09", "a-10"]
    assert found("{b,a}-09.tar") == ["b-09", "a-09"]
    assert found("{b,a}-*.tar") == ["b-09", "a-08", "a-09", "a-10"]
    with pytest.raises(ValueError, match=r"finds 2 of the 4 shards, first '.*a-11\.tar' missing; name existing"):
        found("a-{09..12}.tar")
    with pytest.raises(ValueError, match=r"^data\.shards='.*' finds no shard; name existing \.tar files$"):
        found("c*.tar")


@pytest.mark.parametrize("pattern", ["a-{000000000..100000000}.tar", "{a,b}-{0..9}{0..9}{0..9}.tar", "**/*.tar"])
def test_a_pattern_without_end(tmp_path: Path, pattern: str) -> None:
    caption_shard(tmp_path / "a.tar", 0)
    (tmp_path / "loop").symlink_to(tmp_path)  # `**` follows it again and again
    with (
        applied(Reading(max_files=1000 if "{" in pattern else 20)),
        pytest.raises(ValueError, match=r"^data\.shards='.*' .* more than (1,000|20) .*, or set data\.reading\.max_f"),
    ):
        shard_files(str(tmp_path / pattern), option="shards")
    if pattern == "**/*.tar":
        assert tmp_path / "a.tar" in shard_files(str(tmp_path / pattern), option="shards")


def test_texts_and_pictures_of_a_shard_have_limits(tmp_path: Path) -> None:
    made = source(caption_shard(tmp_path / "0.tar", 0))
    for option, says in (("max_text_bytes", "its txt has 6 bytes"), ("max_image_bytes", f"image 1 has {len(png(0))}")):
        with applied(Reading(**{option: 5})):
            assert refusal(made).startswith(f"sample '0.tar/0000': {says}")
    with applied(Reading(max_text_bytes=6, max_image_bytes=len(png(0)))):
        assert answer(made[0]) == "Dot 0."


def test_a_text_of_six_gigabytes_is_not_read(tmp_path: Path) -> None:
    """A hole in a sparse file; the sample that lies behind it is read as usual."""
    size, header = 6 * 2**30, tarfile.TarInfo("0.txt")
    header.size = size
    parts = [caption_shard(tmp_path / f"{n}.tar", n).read_bytes() for n in (1, 2)]
    with open(tmp_path / "large.tar", "wb") as file:
        file.write(parts[0].rstrip(bytes(1)) + bytes(-len(parts[0].rstrip(bytes(1))) % 512) + header.tobuf())
        file.seek(size, os.SEEK_CUR)
        file.write(parts[1])
    large = source(tmp_path / "large.tar")
    assert [answer(large[index]) for index in (0, 2)] == ["Dot 1.", "Dot 2."]
    assert "its txt has 6,442,450,944 bytes, more than the limit of 4,194,304; make it smaller" in refusal(large, 1)


def test_names_that_begin_at_the_folder_and_turns_in_a_list(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "<image>Red?"}, {"from": "bot", "value": "Yes."}]
    members = {"./a.png": png(1), "./a.json": json.dumps(talk), "./b.png": png(2), "./b.txt": "Blue.", "b.txt.bak": "x"}
    made = source(shard(tmp_path / "0.tar", members), role_map={"bot": "assistant"})
    assert [(sample.id, answer(sample)) for sample in samples(made)] == [("0.tar/a", "Yes."), ("0.tar/b", "Blue.")]
    assert made[0].messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "Red?"}]
    assert made.num_ignored == 1


def test_a_json_with_other_keys(tmp_path: Path) -> None:
    members = {"a.png": png(1), "a.json": {"legend": 7}, "b.png": png(2), "b.json": {"question": "?", "answer": "!"}}
    members |= {"c.png": png(3), "c.json": {"caption": "C", "question": "?", "answer": "!"}}
    members |= {"d.png": png(4), "d.json": {"caption": ["C", "D"]}}
    made = source(shard(tmp_path / "0.tar", members), columns={"legend": "caption"})
    assert [answer(made[index]) for index in range(2)] == ["7", "!"]
    assert refusal(made, 2).startswith("sample '0.tar/c' has the key 'caption', which is not read ('C'); rename or")
    assert refusal(made, 3).startswith("sample '0.tar/d' has no text in its json but a list of 2; write a caption or")


def test_an_epoch_is_shuffled_within_a_few_shards(tmp_path: Path) -> None:
    for number in range(9):
        caption_shard(tmp_path / f"{number}.tar", *range(10 * number, 10 * number + 10))
    made = source(tmp_path / "*.tar")
    order = made.order(0, seed=1)
    assert sorted(order) == list(range(90))
    windows = [{int(i) // 10 for i in part} for part in (order[:40], order[40:80], order[80:])]
    assert [len(window) for window in windows] == [4, 4, 1]
    assert len({int(i) // 10 for i in order[:8]}) > 1  # shards of a window are mixed
    assert list(order) == list(made.order(0, seed=1))
    assert list(order) != list(made.order(1, seed=1))
    assert list(order) != list(made.order(0, seed=2))


def test_one_picture_is_never_on_both_sides(tmp_path: Path) -> None:
    for number in (0, 1):  # each of eight pictures under six keys, in two shards
        members = {f"{n}.{kind}": png(n % 8) if kind == "png" else "x" for n in range(24) for kind in ("png", "txt")}
        shard(tmp_path / f"{number}.tar", members)
    found = {}
    for split in ("train", "val"):
        made = samples(source(tmp_path / "{0..1}.tar", split=split, val_fraction=0.4))
        found[split] = [sample.images[0].getpixel((0, 0))[0] for sample in made]
    assert len(found["train"]) + len(found["val"]) == 48
    assert found["val"]
    assert not set(found["train"]) & set(found["val"])


def test_split_by_key_or_by_shards(tmp_path: Path) -> None:
    caption_shard(tmp_path / "0.tar", *range(20))
    caption_shard(tmp_path / "1.tar", 20, 21)
    train, val = (samples(source(tmp_path / "0.tar", split=split, val_fraction=0.4)) for split in ("train", "val"))
    assert len(val) > 2
    assert sorted(answer(s) for s in train + val) == sorted(f"Dot {n}." for n in range(20))
    own = {"val_shards": str(tmp_path / "1.tar"), "val_fraction": 0.4}
    assert len(source(tmp_path / "0.tar", **own)) == 20
    assert [answer(s) for s in samples(source(tmp_path / "0.tar", split="val", **own))] == ["Dot 20.", "Dot 21."]
    with pytest.raises(
        ValueError, match=r"none of the 20 samples in 1 shards of '.*' falls into val with val_fraction 1e-09"
    ):
        source(tmp_path / "0.tar", split="val", val_fraction=1e-9)
    assert len(source(tmp_path / "0.tar", split="val")) == len(source(tmp_path / "0.tar", split="train")) == 20


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": png(0)}, "has neither a txt nor a json member; add its text or remove its images"),
        ({"a.png": png(0), "a.txt": " \n"}, "has no text in its txt; write a caption or a conversation there"),
        ({"a.png": png(0), "a.json": {"url": "u"}}, "has no text in its json; write a caption or a conversation there"),
        ({"a.png": png(0), "a.json": "[1]"}, "has turns that are not a list of objects; write them as"),
        ({"a.png": png(0), "a.json": "1"}, "has a json that is not an object; write it as {...}"),
        ({"a.png": png(0), "a.txt": b"\xe9t"}, "has a txt that cannot be read ('utf-8' codec"),
        ({"a.txt": "A dot."}, "has 0 images for 1 caption; give it one"),
        ({"a.png": png(0), "a.json": {"messages": []}}, "has 0 turns of a conversation; add"),
    ],
)
def test_one_bad_sample(tmp_path: Path, members: dict[str, Any], message: str) -> None:
    made = source(shard(tmp_path / "0.tar", {**members, "b.png": png(1), "b.txt": "Fine."}))
    assert refusal(made).startswith(f"sample '0.tar/a' {message}")
    assert answer(made[1]) == "Fine."


def test_a_picture_that_cannot_be_decoded(tmp_path: Path) -> None:
    made = source(shard(tmp_path / "0.tar", {"a.png": png(0)[:45], "a.txt": "A dot."}))
    assert refusal(made).startswith("sample '0.tar/a': image '1' cannot be decoded (")
    assert made.outline(0).messages[-1]["content"][0]["text"] == "A dot."  # the picture was not opened


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:2580], "is not a complete, uncompressed tar"),  # in a member
        (
            lambda data: data[:2048],
            "is damaged at byte 2,048 of 2,048, where a header or the end of the archive is expected",
        ),
        (lambda data: data[:2048] + b"x" * 512 + data[2560:], "is damaged at byte 2,048 of 10,240"),  # a header
        (lambda data: b"x" * 512 + data[512:], "is not a complete, uncompressed tar"),
        (lambda data: b"", "is an empty file; copy it again"),
        (gzip.compress, "is compressed by gzip, so single samples cannot be read; gunzip it"),
    ],
)
def test_a_shard_that_is_cut_or_broken(tmp_path: Path, damage: Any, message: str) -> None:
    # Each member is a header and a block of 512 bytes: 2,048 bytes a key.
    file = caption_shard(tmp_path / "0.tar", 0, 1)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"^shard '.*0\.tar' {message}"):
        source(file)
