"""Conversations about pictures: LLaVA's JSON (Liu et al. 2023, arXiv:2304.08485), or chat messages as JSONL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from vlm.data.annotations import Records, Row, existing_file, existing_folder, read_json, read_jsonl
from vlm.data.images import load_image
from vlm.data.split import check_split, group_keys, image_key, in_split
from vlm.schema import BadSample, Content, Message, Sample, Split

MARK = "<image>"  # in a text, the place of the next image

Role = Literal["system", "user", "assistant"]

_LLAVA_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}
_CHAT_ROLES: dict[str, Role] = {"user": "user", "assistant": "assistant", "system": "system"}


class Instruct:
    """One sample per conversation, with any number of images, none included.

    A record is LLaVA's `{"id", "image": path or list, "conversations": [{"from": human|gpt|system, "value"}]}` or
    `{"id", "images": [paths], "messages": [{"role", "content": text or list of {"type": "text"|"image"}}]}`, in a JSON
    list or one per line. Without `val_annotations` the split is by a hash of the images' names (of the id where there
    are none), and conversations that share an image stay together; with it, each file is taken as it is.
    """

    def __init__(
        self,
        *,
        split: Split,
        annotations: str | Path,
        images: str | Path,
        val_annotations: str | Path | None = None,
        val_fraction: float = 0.05,
    ) -> None:
        check_split(split=split, val_fraction=val_fraction)
        self.images = existing_folder(images, option="images")
        if split == "val" and val_annotations is not None:
            file = existing_file(val_annotations, option="val_annotations")
        else:
            file = existing_file(annotations, option="annotations")
        rows = _read(file)
        if not rows:
            raise ValueError(f"'{file}' holds 0 conversations; set data.annotations= to a file that has some")
        kept = [True] * len(rows)
        if val_annotations is None:
            keys = group_keys([_split_names(row, root=self.images.absolute()) for row in rows])
            kept = [in_split(key, split=split, val_fraction=val_fraction) for key in keys]
        if not any(kept):
            raise ValueError(
                f"none of the {len(rows)} conversations in '{file}' falls into {split} with val_fraction "
                f"{val_fraction}; set data.val_fraction= to another share, or data.val_annotations= to a file"
            )
        self._records = Records(
            [_id(row), row.record, row.problem] for row, keep in zip(rows, kept, strict=True) if keep
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        name, record, problem = self._records[index]
        if problem:
            raise BadSample(f"sample '{name}' {problem}")
        try:
            paths = _images(record)
            messages = _messages(record)
            _check_turns(messages)
            _check_marks(messages, num_images=len(paths))
        except _Malformed as error:
            raise BadSample(f"sample '{name}' {error}") from error
        try:
            images = [load_image(path, root=self.images) for path in paths]
        except BadSample as error:
            raise BadSample(f"sample '{name}': {error}") from error
        return Sample(id=name, images=images, messages=messages, meta={"image": ", ".join(paths)} if paths else {})


class _Malformed(ValueError):
    """What is wrong with a record, in words that follow on "sample 'x'"."""


def _read(file: Path) -> list[Row]:
    if file.suffix == ".jsonl":
        return list(read_jsonl(file))
    if file.suffix != ".json":
        raise ValueError(f"'{file}' ends in '{file.suffix}'; give a .json or .jsonl file")
    document = read_json(file)
    if isinstance(document, dict):
        raise ValueError(f"'{file}' holds one object; give a list of conversations")
    return document


def _id(row: Row) -> str:
    given = row.record.get("id")
    return row.place if given in (None, "") else str(given)


def _split_names(row: Row, *, root: Path) -> list[str]:
    return [image_key(path, root=root) for path in _paths(row.record)] or [f"id:{_id(row)}"]


def _listed(record: dict[str, Any]) -> list[Any]:
    """What the record says its images are: LLaVA's `image` is a path or a list, `images` a list; null is none."""
    value = record.get("image") or record.get("images")
    if not value:
        return []
    return value if isinstance(value, list) else [value]


def _paths(record: dict[str, Any]) -> list[str]:
    return [path for path in _listed(record) if isinstance(path, str) and path]


def _images(record: dict[str, Any]) -> list[str]:
    listed, paths = _listed(record), _paths(record)
    if len(paths) != len(listed):
        raise _Malformed(
            f"lists {len(listed)} images of which {len(listed) - len(paths)} are no path; write each as a text"
        )
    return paths


def _messages(record: dict[str, Any]) -> list[Message]:
    if "conversations" in record:
        turns, roles, role_key, content_key = record["conversations"], _LLAVA_ROLES, "from", "value"
    elif "messages" in record:
        turns, roles, role_key, content_key = record["messages"], _CHAT_ROLES, "role", "content"
    else:
        raise _Malformed("has neither 'conversations' nor 'messages'; add its turns under one of them")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise _Malformed("has turns that are not a list of objects; write them as [{...}, {...}]")
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        role = turn.get(role_key)
        if not isinstance(role, str) or role not in roles:
            raise _Malformed(f"has {role!r} as '{role_key}' of turn {number}; choose one of {', '.join(roles)}")
        messages.append({"role": roles[role], "content": _content(turn.get(content_key), number)})
    return messages


def _content(value: Any, number: int) -> list[Content]:
    if isinstance(value, str):
        return _split_marks(value)
    if not isinstance(value, list):
        raise _Malformed(f"has no text in turn {number}; write it as a text or a list of pieces")
    pieces: list[Content] = []
    for piece in value:
        kind = piece.get("type") if isinstance(piece, dict) else None
        if kind == "image":
            pieces.append({"type": "image"})
        elif kind == "text" and isinstance(piece.get("text"), str):
            pieces.append({"type": "text", "text": piece["text"]})
        else:
            raise _Malformed(f"has a piece of type {kind!r} in turn {number}; choose text (with its 'text') or image")
    return pieces


def _split_marks(text: str) -> list[Content]:
    """The text cut at its marks. A line break that sets a mark apart, as LLaVA writes it, is not part of the text."""
    pieces: list[Content] = []
    parts = text.split(MARK)
    for index, part in enumerate(parts):
        if index > 0:
            pieces.append({"type": "image"})
            part = part.removeprefix("\n")
        if index < len(parts) - 1:
            part = part.removesuffix("\n")
        if part:
            pieces.append({"type": "text", "text": part})
    return pieces


def _check_turns(messages: Sequence[Message]) -> None:
    """System (or not), then user and assistant in turn, the assistant last, and nobody silent."""
    roles = [message["role"] for message in messages]
    first = 1 if roles[:1] == ["system"] else 0
    if len(roles) == first:
        raise _Malformed("has 0 turns of a conversation; add a user turn and its answer")
    for index in range(first, len(roles)):
        expected = ("user", "assistant")[(index - first) % 2]
        if roles[index] != expected:
            raise _Malformed(
                f"has {roles[index]} as turn {index + 1} of {len(roles)} where {expected} is due; "
                "let user and assistant take turns, the user first"
            )
    if roles[-1] != "assistant":
        raise _Malformed(
            f"ends with a user turn (turn {len(roles)} of {len(roles)}); add the answer or remove the turn"
        )
    for number, message in enumerate(messages, start=1):
        if not any(piece["type"] == "image" or piece["text"].strip() for piece in message["content"]):
            raise _Malformed(f"has nothing in turn {number} of {len(roles)} ({message['role']}); write its text")


def _check_marks(messages: Sequence[Message], *, num_images: int) -> None:
    num_marks = 0
    for number, message in enumerate(messages, start=1):
        num_here = sum(piece["type"] == "image" for piece in message["content"])
        if num_here and message["role"] != "user":
            raise _Malformed(f"has {num_here} {MARK} in turn {number} ({message['role']}); move it to a user turn")
        num_marks += num_here
    if num_marks != num_images:
        raise _Malformed(
            f"holds {num_images} image{'s' * (num_images != 1)} but its text has {num_marks} image "
            f"placeholder{'s' * (num_marks != 1)}; add or remove an {MARK}"
        )
