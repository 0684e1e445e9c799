"""The forms in which people keep conversations: what each becomes, and which are refused with the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.sources import picture, refusal, samples, url, write
from tests.helpers.text import byte_tokenizer, encoder
from vlm.data.sources.instruct import Instruct
from vlm.schema import Sample


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for index in range(3):
        picture(tmp_path / "photos" / "a" / f"{index}.png", color=(index, 0, 0))
    return tmp_path / "photos"


def read(images: Path | None, *records: Any, **options: Any) -> Instruct:
    file = write((images.parent if images else Path()) / "a.jsonl", list(records))
    return Instruct(split="train", annotations=file, images=images, val_fraction=0.0, **options)


def shown(sample: Sample) -> list[str]:
    """A line per message, its images as the red of their first pixel."""
    reds = iter([image.getpixel((0, 0))[0] for image in sample.images])
    return [
        message["role"][0]
        + ": "
        + "".join(f"⟨{next(reds)}⟩" if piece["type"] == "image" else piece["text"] for piece in message["content"])
        for message in sample.messages
    ]


def say(*turns: tuple[str, Any], role: str = "role", content: str = "content") -> list[dict[str, Any]]:
    return [{role: who, content: what} for who, what in turns]


ONE = "a/1.png"
TALK = say(("user", "<image>Red?"), ("assistant", "Yes."))
TEXT = say(("user", "Hi"), ("assistant", "Hey"))
RED = ["u: ⟨1⟩Red?", "a: Yes."]
HI = ["u: Hi", "a: Hey"]


def pieces(*content: Any) -> list[dict[str, Any]]:
    return say(("user", list(content)), ("assistant", [{"type": "text", "text": "Yes."}]))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        # who speaks, and what
        ({"image": ONE, "conversations": TALK}, RED),
        ({"image": ONE, "conversations": say(("user", "<image>Red?"), ("assistant", "Yes."), role="from")}, RED),
        ({"image": ONE, "messages": say(("human", "<image>Red?"), ("gpt", "Yes."), role="from", content="value")}, RED),
        ({"conversations": say(("human", "Hi"), ("assistant", "Hey"), role="from", content="value")}, HI),
        (
            {"messages": say(("user", "2+2?"), ("assistant", 4), ("user", 0.5), ("assistant", "?"))},
            ["u: 2+2?", "a: 4", "u: 0.5", "a: ?"],
        ),
        # system texts
        ({"system": "Be brief.", "messages": TEXT}, ["s: Be brief.", *HI]),
        ({"messages": [*say(("system", "A."), ("system", "B.")), *TEXT]}, ["s: A.\n\nB.", *HI]),
        ({"system": "A.", "conversations": [*say(("system", "B.")), *TEXT]}, ["s: A.\n\nB.", *HI]),
        ({"system": "", "messages": TEXT}, HI),
        ({"messages": [*say(("system", " \n")), *TEXT]}, HI),
        ({"messages": [*say(("system", ""), ("system", "B.")), *TEXT]}, ["s: B.", *HI]),
        # pairs
        ({"question": "Hi", "answer": "Hey"}, HI),
        ({"image": ONE, "question": "Red?", "answer": "Yes."}, RED),
        (
            {"images": ["a/1.png", "a/2.png"], "query": "<image>and<image>?", "response": "No."},
            ["u: ⟨1⟩and⟨2⟩?", "a: No."],
        ),
        (
            {"query": "C?", "response": "D.", "history": [["A?", "B."]], "system": "S."},
            ["s: S.", "u: A?", "a: B.", "u: C?", "a: D."],
        ),
        ({"images": [ONE], "query": "Sure?", "response": 7, "history": [["Red?", "Yes."]]}, [*RED, "u: Sure?", "a: 7"]),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, ["u: Add.\n1 2", "a: 3"]),
        ({"instruction": "Hi", "input": "", "output": "Hey", "history": None}, HI),
        ({"images": [ONE], "messages": [{"user": "Red?", "assistant": "Yes.", "source": "x"}]}, RED),
        # images in pieces and in messages
        ({"messages": pieces({"type": "image", "image": ONE}, {"type": "text", "text": "Red?"})}, RED),
        ({"messages": pieces({"image": ONE}, {"text": "Red?"})}, RED),
        ({"messages": pieces({"type": "image", "path": ONE}, "Red?")}, RED),
        ({"messages": pieces({"type": "image", "url": ONE}, {"type": "text", "text": "Red?"})}, RED),
        ({"messages": pieces({"type": "image_url", "image_url": {"url": url(1), "detail": "high"}}, "Red?")}, RED),
        (
            {"messages": pieces({"type": "input_image", "image_url": url(1)}, {"type": "input_text", "text": "Red?"})},
            RED,
        ),
        ({"images": [ONE], "messages": pieces({"type": "image", "image": ONE}, "Red?")}, RED),
        (
            {
                "images": [ONE],
                "messages": pieces({"type": "image", "text": None, "index": 0}, {"type": "text", "text": "Red?"}),
            },
            RED,
        ),
        ({"images": [ONE], "messages": pieces({"type": "text", "text": "<image>Red?"})}, RED),
        ({"messages": [{**TALK[0], "images": [ONE]}, TALK[1]]}, RED),
        ({"messages": [{"role": "user", "content": "Red?", "images": [ONE]}, TALK[1]]}, RED),
        ({"messages": [{"role": "user", "content": "Red?", "image": ONE, "name": "Jo"}, TALK[1], *TEXT]}, [*RED, *HI]),
        # how images are named
        ({"image": url(1), "messages": TALK}, RED),
        ({"image": ["a/1.png", None], "messages": TALK}, RED),
        ({"image": [None], "messages": TEXT}, HI),
        ({"image": ONE, "images": [ONE], "messages": TALK}, RED),
        ({"images": [{"path": ONE, "bytes": None}], "messages": TALK}, RED),
        ({"image": "a\\1.png", "messages": TALK}, RED),
        ({"image": "a\\..\\a\\1.png", "messages": TALK}, RED),
        # the word, and texts that are kept as they are
        (
            {"messages": say(("user", "What is \\<image> in HTML?"), ("assistant", "A \\<image> or <video>."))},
            ["u: What is <image> in HTML?", "a: A <image> or <video>."],
        ),
        (
            {
                "messages": say(
                    ("user", "\\<video> \\<audio> \\<img>a</img> <img src='b'>"), ("assistant", " \n<br>\\n")
                )
            },
            ["u: <video> <audio> <img>a</img> <img src='b'>", "a:  \n<br>\\n"],
        ),
        (
            {
                "image": ["a/1.png", "a/2.png"],
                "messages": say(("user", "Image 1: <image>\nImage 2: <image>\n\nSame? "), ("gpt", "No")),
            },
            ["u: Image 1: ⟨1⟩\nImage 2: ⟨2⟩\n\nSame? ", "a: No"],
        ),
        # keys that say nothing of the content, and keys that are empty
        ({"id": 1, "model": "gpt-4", "source": "web", "tools": None, "videos": [], "note": "", "messages": TEXT}, HI),
        ({"messages": [{"role": "user", "content": "Hi", "tool_calls": None, "weight": None}, TEXT[1]]}, HI),
    ],
)
def test_forms_that_are_read(images: Path, record: dict[str, Any], expected: list[str]) -> None:
    source = read(images, record)
    assert shown(source[0]) == expected
    assert source.outline(0).messages == source[0].messages


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"tools": [{"name": "f"}], "messages": TEXT},
            "has the key 'tools', which is not read (a list of 1); tool calls",
        ),
        ({"video": "a.mp4", "messages": TEXT}, "has the key 'video', which is not read ('a.mp4'); only images can be"),
        ({"videos": ["a.mp4"], "messages": TEXT}, "has the key 'videos', which is not read (a list of 1); only images"),
        ({"audio": "a.wav", "messages": TEXT}, "has the key 'audio', which is not read ('a.wav'); only images can be"),
        ({"audios": ["a.wav"], "messages": TEXT}, "has the key 'audios', which is not read (a list of 1); only images"),
        (
            {"image_path": ONE, "messages": TEXT},
            "has the key 'image_path', which is not read ('a/1.png'); name it image,",
        ),
        (
            {"chosen": "x" * 900, "messages": TEXT},
            f"has the key 'chosen', which is not read ('{'x' * 80}…' (900 characters)); rename or remove it; to ignore "
            "it, set data.columns={chosen: null}",
        ),
        (
            {"image": ONE, "images": ["a/2.png"], "messages": TALK},
            "has images under 'image' and others under 'images'; list",
        ),
        (
            {"messages": TEXT, "conversations": TEXT},
            "has turns under 'conversations' and under 'messages'; keep one",
        ),
        (
            {"messages": TEXT, "question": "Hi"},
            "has turns under 'messages' and under 'question'; keep one of them",
        ),
        ({"question": "Hi"}, "has no text in turn 2; write it as a string or a list of pieces"),
        (
            {"query": "A", "response": "B", "history": ["A?"]},
            "has a list of 1 as 'history'; write it as [[question, answer",
        ),
        (
            {"messages": [{**TEXT[0], "weight": 0}, TEXT[1]]},
            "has the key 'weight' of turn 1, which is not read (0); write loss",
        ),
        (
            {"messages": [TEXT[0], {**TEXT[1], "tool_calls": [1]}]},
            "has the key 'tool_calls' of turn 2, which is not read (a",
        ),
        (
            {"messages": [TEXT[0], {**TEXT[1], "reasoning_content": "So"}]},
            "has the key 'reasoning_content' of turn 2, which",
        ),
        (
            {"messages": [TEXT[0], {**TEXT[1], "loss": "no"}]},
            "has 'no' as 'loss' of turn 2 (assistant); write true or false",
        ),
        (
            {"messages": [{**TEXT[0], "loss": True}, TEXT[1]]},
            "has True as 'loss' of turn 1 (user); write true or false in an",
        ),
        ({"messages": [{**TEXT[0], "from": "gpt"}, TEXT[1]]}, "has 'role' and 'from' in turn 1; keep one of them"),
        ({"messages": [{**TEXT[0], "value": "Ho"}, TEXT[1]]}, "has 'content' and 'value' in turn 1; keep one of them"),
        (
            {"messages": pieces({"type": "text", "text": "Hi", "image": ONE})},
            "has the key 'image' of a text in turn 1, which",
        ),
        (
            {"messages": pieces({"type": "image", "image": ONE, "url": ONE})},
            "names an image under 'image' and 'url' in turn 1; keep one of",
        ),
        (
            {"messages": pieces({"type": "image", "image": 5})},
            "has 5 as an image in turn 1; write its path as a string",
        ),
        (
            {"messages": pieces({"type": "input_audio", "input_audio": {}})},
            "has a piece of type 'input_audio' in turn 1; choose",
        ),
        (
            {"messages": pieces(["Hi"])},
            "has a list of 1 in turn 1; write a string, or a list of pieces such as {type, text}",
        ),
        (
            {"messages": say(("user", True), ("assistant", "No"))},
            "has True in turn 1; write a string, or a list of pieces",
        ),
        (
            {
                "images": ["a/1.png", "a/2.png"],
                "messages": pieces({"type": "image", "index": 1}, {"type": "image", "index": 0}),
            },
            "has index 1 at an image in turn 1 where 0 is expected; list the images in the order of their placeholders",
        ),
        (
            {"images": [ONE], "messages": pieces({"type": "image", "image": "a/2.png"}, "Red?")},
            "lists 1 image and names 1 more in its turns; name all of them in the record or all",
        ),
        (
            {"messages": [{**TALK[0], "images": ["a/1.png", "a/2.png"]}, TALK[1]]},
            "lists 2 images in turn 1, whose text has 1 of <image>; make them equal",
        ),
        (
            {"image": [None], "messages": TALK},
            "holds 0 images (null counts as no image) but its text has 1 image placeholder; add or remove an <image> (",
        ),
        (
            {"image": ONE, "messages": pieces("Is <image> a tag?", {"type": "image"})},
            "holds 1 image but its text has 2 image placeholders; add or remove an <image> (\\<image> is the word)",
        ),
        (
            {"messages": say(("user", "Picture 1: <img>a/1.png</img>Red?"), ("assistant", "Yes."))},
            "has '<img>a/1.png</img>' in turn 1, which is not read; write <image> there and list the path under",
        ),
        (
            {"messages": say(("user", "<video>What?"), ("assistant", "A cat."))},
            "has '<video>' in turn 1, which is not read; remove it, or write \\<video> for the word",
        ),
        (
            {"messages": say(("system", "<audio>"), ("user", "What?"), ("assistant", "A cat."))},
            "has '<audio>' in turn 1, which",
        ),
        (
            {"messages": say(("tool", "7"), ("assistant", "Hey"))},
            "has 'tool' as 'role' of turn 1; choose one of user, human, assistant, gpt, system, or set",
        ),
    ],
)
def test_what_would_be_lost_is_refused_by_name(images: Path, record: dict[str, Any], message: str) -> None:
    said = refusal(read(images, {"id": "x", **record}))
    assert said.startswith(f"sample 'x' {message}")
    assert len(said) < 300


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://x.org/1.png", "is a web address; download the files first and write their paths"),
        ("s3://x/1.png", "is a web address; download the files first and write their paths"),
        ("file:///x/1.png", "is a file: address; write the path without file://"),
        ("~/photos/1.png", "begins with '~', which is not expanded in data; write its path relative to the folder of"),
        ("C:\\photos\\1.png", "is on a Windows drive; write its path on this machine, with slashes"),
        ("photos/a/1.png", "begins with the folder 'photos' a second time: under "),
        ("a/empty.png", "is an empty file (0 bytes); copy it again"),
        ("data:image/png;base64,AAA", "is not base64 (Incorrect padding); encode it again"),
        ("data:image/png,AAA", "is not a base64 data URL; begin it with data:image/png;base64,"),
        ("a/" * 300 + "1.png", f"image '{'a/' * 40}…' does not exist under"),
        ("iVBORw0KGgo" * 9999, "is base64, not a path; begin it with data:image/png;base64,"),
    ],
)
def test_an_image_that_is_not_there_is_told_with_the_cause(images: Path, name: str, message: str) -> None:
    (images / "a" / "empty.png").touch()
    said = refusal(read(images, {"id": "x", "image": name, "messages": TALK}))
    assert said.startswith("sample 'x': image ")
    assert message in said
    assert len(said) < 300 + 2 * len(str(images))


def test_a_damaged_data_url_is_told_without_its_data(images: Path) -> None:
    cut = url(1)[:60] + "A" * 80_000
    said = refusal(read(images, {"id": "x", "image": cut, "messages": TALK}))
    assert said.startswith("sample 'x': image 'data:")
    assert len(said) < 250


def test_data_urls_need_no_folder_and_stay_on_one_side(tmp_path: Path) -> None:
    records = [{"id": f"{red} {n}", "image": url(red), "messages": TALK} for red in range(12) for n in range(2)]
    file = write(tmp_path / "a.jsonl", records)
    train, val = (
        samples(Instruct(split=split, annotations=file, images=None, val_fraction=0.4)) for split in ("train", "val")
    )
    reds = [{sample.id.split()[0] for sample in side} for side in (train, val)]
    assert not reds[0] & reds[1]
    assert len(train) + len(val) == 24
    assert len(val) >= 2
    assert all(sample.meta["image"].startswith("data:") and len(sample.meta["image"]) == 21 for sample in train)


def test_both_separators_name_one_image(images: Path) -> None:
    records = [{"image": f"a{slash}{n}.png", "messages": TALK} for n in range(3) for slash in "/\\"]
    file = write(images.parent / "a.jsonl", records)
    for share in (0.3, 0.5, 0.7):
        train = Instruct(split="train", annotations=file, images=images, val_fraction=share)
        names = [sample.meta["image"].replace("\\", "/") for sample in samples(train)]
        assert all(names.count(name) == 2 for name in names)


def test_a_turn_marked_with_loss_false_is_not_learned(images: Path) -> None:
    turns = [*say(("user", "A?"), ("assistant", "B.")), *say(("user", "C?"), ("assistant", "D."))]
    turns[1]["loss"] = False
    turns[3]["loss"] = True
    sample = read(images, {"messages": turns})[0]
    text = encoder(byte_tokenizer(), "plain")
    assert text.display(text.encode(Sample("x", [], sample.messages))) == "<bos>A?\nB.<eos>C?\n⟦D.<eos>⟧"


def test_names_of_our_keys_and_roles_can_be_given(images: Path) -> None:
    turns = say(("Jo", "<image>Red?"), ("bot", "Yes."))
    record = {"dialog": turns, "photo": ONE, "images": None, "note": "Ask again."}
    columns = {"dialog": "messages", "photo": "images", "note": None}
    source = read(images, record, columns=columns, role_map={"Jo": "user", "bot": "assistant"})
    assert shown(source[0]) == RED
    assert source[0].meta == {"image": ONE}
    both = {**record, "images": ["a/2.png"]}
    assert refusal(read(images, {"id": "x", **both}, columns=columns)) == (
        "sample 'x' has 'photo', which data.columns renames, and 'images' too; remove one"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"columns": {"dialog": "turns"}},
            r"^data\.columns maps 'dialog' to 'turns'; choose one of conversations, messages",
        ),
        ({"role_map": {"bot": "gpt"}}, r"^data\.role_map maps 'bot' to 'gpt'; choose one of system, user, assistant$"),
    ],
)
def test_names_that_are_none_of_ours(images: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(images, {"messages": TEXT}, **options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<image>\nRed?", "u: ⟨1⟩\nRed?"),
        ("Red?\n<image>", "u: ⟨1⟩\nRed?"),
        (" Is <image> red? ", "u: ⟨1⟩\nIs  red?"),
        ("<image>\n", "u: ⟨1⟩"),
        ("<image>", "u: ⟨1⟩"),
    ],
)
def test_image_first_does_as_llava_does(images: Path, text: str, expected: str) -> None:
    """As `preprocess_multimodal` of LLaVA: the mark is taken out, the text stripped, the mark and a line put before."""
    record = {"image": ONE, "messages": say(("user", text), ("assistant", "Yes."))}
    assert shown(read(images, record, image_first=True)[0])[0] == expected


def test_image_first_leaves_several_images_and_none_where_they_are(images: Path) -> None:
    turns = say(("user", "A <image>\nB <image>\n"), ("assistant", "Yes."), ("user", " Sure? "), ("assistant", "No."))
    record = {"image": ["a/1.png", "a/2.png"], "messages": turns}
    assert shown(read(images, record, image_first=True)[0])[0::2] == ["u: A ⟨1⟩\nB ⟨2⟩\n", "u:  Sure? "]


def test_an_id_as_long_as_data_is_replaced_by_the_place(images: Path) -> None:
    source = read(images, *({"id": name, "messages": TEXT} for name in ("x" * 9999, ["x"], {"a": 1}, "ok", 7)))
    assert [sample.id for sample in samples(source)] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "ok", "7"]


@pytest.mark.parametrize("name", ["a.txt", "a.ndjson", "A.JSON", "a.JSONL"])
def test_json_lines_under_other_names(tmp_path: Path, name: str) -> None:
    lines = '{"question": "Hi", "answer": "Hey"}\n' * (1 if name.endswith("txt") else 2)
    source = Instruct(split="train", annotations=write(tmp_path / name, lines), images=None, val_fraction=0.0)
    assert [shown(sample) for sample in samples(source)] == [HI] * lines.count("\n")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("https://x.org/a.json", r"\('https://x\.org/a\.json' is a web address; download the files first and write"),
        ("data\\a.jsonl", r"\(it has backslashes; 'data/a\.jsonl' exists\); set data\.annotations="),
        ("here/data/a.jsonl", r"\(it begins with the folder 'here' a second time; 'data/a\.jsonl' exists\); set data"),
        ("gone.json", r"^there is no file 'gone\.json'; set data\.annotations="),
        ("data/a.json.gz", r"a\.json\.gz' is compressed with gzip; decompress it"),
    ],
)
def test_an_annotation_file_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    (tmp_path / "here" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    write(Path("data/a.jsonl"), [{"messages": TEXT}])
    Path("data/a.json.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(ValueError, match=message):
        Instruct(split="train", annotations=path, images=None)
