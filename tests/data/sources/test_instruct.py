"""Conversations from LLaVA's JSON and chat messages: what they yield, how they split, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.sources import answer, picture, refusal, samples, write
from vlm.data.sources.instruct import Instruct


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for index in range(8):
        picture(tmp_path / "images" / f"{index}.png", color=(index, 0, 0))
    return tmp_path / "images"


def instruct(file: Path, images: Path, **options: Any) -> Instruct:
    return Instruct(**{"split": "train", "annotations": file, "images": images, "val_fraction": 0.0, **options})


def llava(*turns: str, **rest: Any) -> dict[str, Any]:
    names = ("human", "gpt")
    return {"id": "x", "conversations": [{"from": names[i % 2], "value": turn} for i, turn in enumerate(turns)], **rest}


def test_llava_conversations(images: Path, tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.json",
        [
            llava("<image>\nWhat is this?", "A dot.", "Sure?", "Yes.\nVery.", id=7, image="3.png"),
            llava("Compare <image> with\n<image>.", "Equal.", image=["1.png", "2.png"]),
            {
                "image": None,
                "conversations": [{"from": "system", "value": "Be brief."}, *llava("Hi", "Hey")["conversations"]],
            },
        ],
    )
    one, two, none = samples(instruct(file, images))
    assert [one.id, two.id, none.id] == ["7", "x", "a.json[2]"]
    assert one.messages == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dot."}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes.\nVery."}]},
    ]
    assert [piece.get("text", "<image>") for piece in two.messages[0]["content"]] == [
        "Compare ",
        "<image>",
        " with\n",
        "<image>",
        ".",
    ]
    assert [image.getpixel((0, 0))[0] for image in two.images] == [1, 2]
    assert two.meta == {"image": "1.png, 2.png"}
    assert (none.images, none.meta, none.messages[0]["role"]) == ([], {}, "system")


def test_chat_messages(images: Path, tmp_path: Path) -> None:
    pieces = [{"type": "text", "text": "Is \\<image> a tag?"}, {"type": "image"}]
    chat = {"messages": [{"role": "user", "content": pieces}, {"role": "assistant", "content": "Yes."}]}
    marked = [{"role": "user", "content": "<image>Color?"}, {"role": "assistant", "content": "Red."}]
    file = write(
        tmp_path / "a.jsonl", [{"images": ["4.png"], **chat}, {"id": "b", "images": ["5.png"], "messages": marked}]
    )
    first, second = samples(instruct(file, images))
    assert (first.id, second.id) == ("a.jsonl:1", "b")
    assert first.messages[0]["content"] == [{"type": "text", "text": "Is <image> a tag?"}, {"type": "image"}]
    assert second.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "Color?"}]
    assert answer(second) == "Red."
    assert second.images[0].getpixel((0, 0)) == (5, 0, 0)


def test_conversations_that_share_an_image_stay_on_one_side(images: Path, tmp_path: Path) -> None:
    records = [llava("<image>?", "!", id=f"one{i}", image=f"{i}.png") for i in range(8)]
    records += [llava("<image><image>?", "!", id=f"two{i}", image=[f"{i + 4}.png", f"./{i}.png"]) for i in range(4)]
    records += [llava("Hi", "Hey", id=f"text{i}") for i in range(20)]
    file = write(tmp_path / "a.json", records)
    train, val = (samples(instruct(file, images, split=split, val_fraction=0.4)) for split in ("train", "val"))
    shown = [
        {name.removeprefix("./") for s in side for name in s.meta.get("image", "").split(", ")} for side in (train, val)
    ]
    assert (shown[0] & shown[1]) <= {""}
    assert len(shown[1]) > 1
    assert len(train) + len(val) == 32
    assert {"text"} <= {sample.id[:4] for sample in val}

    own = write(tmp_path / "val.json", [llava("Hi", "Hey", id="own")])
    assert [sample.id for sample in samples(instruct(file, images, split="val", val_annotations=own))] == ["own"]
    assert len(instruct(file, images, val_annotations=own, val_fraction=0.4)) == 32


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            llava("<image>?", "!", image=["0.png", "1.png"]),
            "holds 2 images but its text has 1 image placeholder; add or remove an <image>",
        ),
        (llava("<image><image>?", "!", image="0.png"), "holds 1 image but its text has 2 image placeholders; add"),
        (llava("<image>?", "!"), "holds 0 images but its text has 1 image placeholder; add"),
        (llava("?", "!", image="0.png"), "holds 1 image but its text has 0 image placeholders; add"),
        (llava("?", "See <image>", image="0.png"), "has 1 <image> in turn 2 (assistant); move it to a user turn"),
        (
            llava("?", "!", image=["0.png", 3]),
            "lists 2 images, 1 of which cannot be read as a path, the first 3; write each as a string",
        ),
        (llava("?", "!", "More?"), "ends with a user turn (turn 3 of 3); add the answer or remove the turn"),
        (llava("?", " \n"), "has an empty turn 2 of 2 (assistant); write its text"),
        (llava(), "has 0 turns of a conversation; add a user turn and its answer"),
        ({"id": "x", "conversations": [{"from": "system", "value": "s"}]}, "has 0 turns of a conversation; add"),
        (
            {"id": "x", "conversations": [{"from": "gpt", "value": "!"}]},
            "has assistant as turn 1 of 1 where user is expected; let user and assistant alternate, the user first",
        ),
        (
            {"id": "x", "messages": [{"role": role, "content": "t"} for role in ("system", "user", "user")]},
            "has user as turn 3 of 3 where assistant is expected; let user",
        ),
        (
            {"id": "x", "conversations": [{"from": "bot", "value": "!"}]},
            "has 'bot' as 'from' of turn 1; choose one of user, human, assistant, gpt, system, or set data.role_map={",
        ),
        (
            {"id": "x", "messages": [{"role": ["user"], "content": "?"}]},
            "has a list of 1 as 'role' of turn 1; choose one of user, human, assistant, gpt, system",
        ),
        (
            {"id": "x", "conversations": [{"from": "human"}]},
            "has no text in turn 1; write it as a string or a list of pieces",
        ),
        (
            {"id": "x", "messages": [{"role": "user", "content": [{"type": "video"}]}]},
            "has a piece of type 'video' in turn 1; choose text (with its 'text') or image",
        ),
        ({"id": "x", "messages": "hello"}, "has turns that are not a list of objects; write them as"),
        ({"id": "x"}, "has neither 'conversations' nor 'messages'; add its turns under one of them"),
    ],
)
def test_one_bad_conversation(images: Path, tmp_path: Path, record: dict[str, Any], message: str) -> None:
    file = write(tmp_path / "a.jsonl", [record, llava("Hi", "Hey", id="good")])
    source = instruct(file, images)
    assert refusal(source).startswith(f"sample 'x' {message}")
    assert source[1].id == "good"


def test_conversations_whose_images_cannot_be_read(images: Path, tmp_path: Path) -> None:
    (images / "cut.png").write_bytes((images / "0.png").read_bytes()[:45])
    (images / "away.png").symlink_to("/etc/hostname")
    names = ("gone.png", "../a.jsonl", "/etc/hostname", "away.png", "cut.png")
    file = write(tmp_path / "a.jsonl", [llava("<image>?", "!", id=name, image=name) for name in names] + [[1]])
    source = instruct(file, images)
    assert refusal(source, 0).startswith("sample 'gone.png': image 'gone.png' does not exist under")
    for index in (1, 2, 3):
        assert refusal(source, index).startswith(
            f"sample '{names[index]}': image '{names[index]}' is outside the folder"
        )
    assert refusal(source, 4).startswith("sample 'cut.png': image 'cut.png' cannot be decoded (")
    assert refusal(source, 5) == "sample 'a.jsonl:6' is a list where an object is needed; write it as {...}"
    with pytest.raises(IndexError):
        source[6]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"id": 1},\n{"id": 2,}]', r"a\.json' line 2 is not JSON"),
        ("a.jsonl", '{"id": 1}\nnull}\n', r"a\.jsonl' line 2 is not JSON \(Extra data\); correct that line"),
        ("a.jsonl", "", r"a\.jsonl' is an empty file; set data\.annotations="),
        ("a.json", {"id": 1, "messages": []}, r"a\.json' holds one object; give a list of conversations"),
        ("a.csv", "x", r"a\.csv' ends in '\.csv'; give a \.json, \.jsonl, \.ndjson or \.txt file"),
    ],
)
def test_conversation_files_that_cannot_be_read(
    images: Path, tmp_path: Path, name: str, content: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        instruct(write(tmp_path / name, content), images)


def test_conversations_without_a_validation_share(images: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", [llava("Hi", "Hey")])
    with pytest.raises(
        ValueError, match=r"none of the 1 conversations in '.*' falls into val with val_fraction 1e-09; set"
    ):
        instruct(file, images, split="val", val_fraction=1e-9)
    whole = [samples(instruct(file, images, split=split, val_fraction=0.0)) for split in ("train", "val")]
    assert whole[0] == whole[1] != []
