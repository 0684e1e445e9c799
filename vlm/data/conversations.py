"""Records of conversations -> messages in the common chat form, every slip of a record named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from vlm.schema import BadSample, Content, Message

MARK = "<image>"  # in a text, the place of the next image

Role = Literal["system", "user", "assistant"]

_LLAVA_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}
_CHAT_ROLES: dict[str, Role] = {"user": "user", "assistant": "assistant", "system": "system"}


class Malformed(BadSample):
    """What is wrong with a record, in words that follow on "sample 'x'"."""


def caption_messages(prompt: str, caption: str) -> list[Message]:
    """A picture, what is asked about it, and its caption."""
    return [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]},
        {"role": "assistant", "content": [{"type": "text", "text": caption}]},
    ]


def conversation(record: dict[str, Any], *, num_images: int) -> list[Message]:
    """The turns of a record, its placeholders as many as its images.

    The turns are LLaVA's `{"conversations": [{"from": human|gpt|system, "value"}]}` or `{"messages": [{"role",
    "content": text or list of {"type": "text"|"image"}}]}`. Raises `Malformed` where they are neither, where user and
    assistant do not take turns, somebody is silent, or placeholders are too few, too many or not the user's.
    """
    messages = _messages(record)
    _check_turns(messages)
    _check_marks(messages, num_images=num_images)
    return messages


def turns_record(turns: Any, *, num_images: int) -> dict[str, Any]:
    """The record of turns that stand alone, as in a table's column, whatever their form.

    Beside LLaVA's and chat turns these are the_cauldron's `[{"user", "assistant"}]` (Laurençon et al. 2024,
    arXiv:2405.02246), whose images come before the first question where no placeholder says otherwise.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns) or not turns:
        return {"messages": turns}
    if "from" in turns[0]:
        return {"conversations": turns}
    if "user" not in turns[0]:
        return {"messages": turns}
    texts = [(role, turn.get(role)) for turn in turns for role in ("user", "assistant")]
    if num_images and isinstance(texts[0][1], str) and not any(MARK in str(text) for _, text in texts):
        texts[0] = ("user", MARK * num_images + texts[0][1])
    return {"messages": [{"role": role, "content": text} for role, text in texts]}


def image_paths(record: dict[str, Any]) -> list[str]:
    """The images that a record names: LLaVA's `image` is a path or a list, `images` a list; null is none.

    Raises `Malformed` where one is no path.
    """
    listed = _listed(record)
    paths = [path for path in listed if isinstance(path, str) and path]
    if len(paths) != len(listed):
        raise Malformed(
            f"lists {len(listed)} images of which {len(listed) - len(paths)} are no path; write each as a text"
        )
    return paths


def _messages(record: dict[str, Any]) -> list[Message]:
    if "conversations" in record:
        turns, roles, role_key, content_key = record["conversations"], _LLAVA_ROLES, "from", "value"
    elif "messages" in record:
        turns, roles, role_key, content_key = record["messages"], _CHAT_ROLES, "role", "content"
    else:
        raise Malformed("has neither 'conversations' nor 'messages'; add its turns under one of them")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Malformed("has turns that are not a list of objects; write them as [{...}, {...}]")
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        role = turn.get(role_key)
        if not isinstance(role, str) or role not in roles:
            raise Malformed(f"has {role!r} as '{role_key}' of turn {number}; choose one of {', '.join(roles)}")
        messages.append({"role": roles[role], "content": _content(turn.get(content_key), number)})
    return messages


def _content(value: Any, number: int) -> list[Content]:
    if isinstance(value, str):
        return _split_marks(value)
    if not isinstance(value, list):
        raise Malformed(f"has no text in turn {number}; write it as a text or a list of pieces", "empty_text")
    pieces: list[Content] = []
    for piece in value:
        kind = piece.get("type") if isinstance(piece, dict) else None
        if kind == "image":
            pieces.append({"type": "image"})
        elif kind == "text" and isinstance(piece.get("text"), str):
            pieces.append({"type": "text", "text": piece["text"]})
        else:
            raise Malformed(f"has a piece of type {kind!r} in turn {number}; choose text (with its 'text') or image")
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
        raise Malformed("has 0 turns of a conversation; add a user turn and its answer")
    for index in range(first, len(roles)):
        expected = ("user", "assistant")[(index - first) % 2]
        if roles[index] != expected:
            raise Malformed(
                f"has {roles[index]} as turn {index + 1} of {len(roles)} where {expected} is due; "
                "let user and assistant take turns, the user first"
            )
    if roles[-1] != "assistant":
        raise Malformed(f"ends with a user turn (turn {len(roles)} of {len(roles)}); add the answer or remove the turn")
    for number, message in enumerate(messages, start=1):
        if not any(piece["type"] == "image" or piece["text"].strip() for piece in message["content"]):
            says = f"has nothing in turn {number} of {len(roles)} ({message['role']}); write its text"
            raise Malformed(says, "empty_text")


def _check_marks(messages: Sequence[Message], *, num_images: int) -> None:
    num_marks = 0
    for number, message in enumerate(messages, start=1):
        num_here = sum(piece["type"] == "image" for piece in message["content"])
        if num_here and message["role"] != "user":
            raise Malformed(f"has {num_here} {MARK} in turn {number} ({message['role']}); move it to a user turn")
        num_marks += num_here
    if num_marks != num_images:
        raise Malformed(
            f"holds {num_images} image{'s' * (num_images != 1)} but its text has {num_marks} image "
            f"placeholder{'s' * (num_marks != 1)}; add or remove an {MARK}",
            "placeholder_mismatch",
        )


def _listed(record: dict[str, Any]) -> list[Any]:
    value = record.get("image") or record.get("images")
    if not value:
        return []
    return value if isinstance(value, list) else [value]
