r"""Records of conversations -> messages in the common chat form.

`<image>` in a text is the placeholder of the next image; `\<image>` is the word itself. A record with a defect, or with
a key that may hold content and is not read, raises `Malformed`: content that is dropped silently makes training wrong
without an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from vlm.data.record_keys import (
    EXTRA_PAIR_KEYS,
    IMAGE_KEYS,
    METADATA_KEYS,
    PAIRS,
    PATH_KEYS,
    RECORD_KEYS,
    TURN_KEYS,
    Malformed,
    as_text,
    check_columns,
    has_null_image,
    image_name,
    is_empty,
    record_images,
    refuse_other_keys,
    renamed,
)
from vlm.quote import named, quoted
from vlm.schema import Content, Message

PLACEHOLDER = "<image>"
CAPTION_PROMPTS = {"en": "Describe the image.", "ja": "画像を説明してください。"}  # others are asked in English

Role = Literal["system", "user", "assistant"]

# LLaVA and ShareGPT use human and gpt; chat messages use user and assistant.
ROLES: dict[str, Role] = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}

_MEDIA_TAGS = re.compile(r"\\?(?:<image>|<video>|<audio>|<img>[^<\n]*</img>)")
_TEXT_TYPES = ("text", "input_text", "output_text")
_IMAGE_TYPES = ("image", "image_url", "input_image")


class Conversation(NamedTuple):
    """Messages, and the names of their images in the order of the placeholders."""

    messages: list[Message]
    images: list[str]


def caption_messages(prompt: str, caption: str) -> list[Message]:
    """The prompt about an image, and its caption; the image comes first unless the prompt has an `<image>`.

    Raises `ValueError` for a prompt with several.
    """
    question = question_content(prompt, num_images=1, where="in data.prompt")
    num_placeholders = sum(piece["type"] == "image" for piece in question)
    if num_placeholders > 1:
        raise ValueError(
            f"data.prompt={quoted(prompt)} has {num_placeholders} {PLACEHOLDER} for one image; leave one of them"
        )
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": caption}]},
    ]


def question_content(text: str, *, num_images: int, where: str) -> list[Content]:
    """A question about `num_images` images; these come first where the text has no `<image>`."""
    content = list(_split_at_placeholders(text, role="user", where=where))
    has_placeholders = any(piece["type"] == "image" for piece in content)
    return content if has_placeholders else [*(Content(type="image") for _ in range(num_images)), *content]


def turns_record(turns: Any) -> dict[str, Any]:
    """A record of turns that come without one, as in a table's column or in a shard's JSON list."""
    return {"messages": turns}


@dataclass(frozen=True, kw_only=True)
class RecordReader:
    """Reads the records of a dataset.

    `columns` renames keys: theirs -> ours, or -> None for a key to ignore. `role_map` renames roles: theirs -> user,
    assistant or system. With `image_first`, the image of a user turn that has one comes before its text, on a line of
    its own, as LLaVA trains; otherwise each text keeps its order.

    Raises `ValueError` where a name on the right is unknown.
    """

    columns: Mapping[str, str | None] | None = None
    role_map: Mapping[str, str] | None = None
    image_first: bool = False

    def __post_init__(self) -> None:
        check_columns(self.columns, known=RECORD_KEYS)
        for theirs, ours in (self.role_map or {}).items():
            if ours not in get_args(Role):
                raise ValueError(
                    f"data.role_map maps '{theirs}' to {quoted(ours)}; choose one of {', '.join(get_args(Role))}"
                )

    def __hash__(self) -> int:  # includes the dictionaries, so that results of a reader can be cached
        return hash(repr(self))

    def images(self, record: Mapping[str, Any]) -> list[str]:
        """The images that a record names, in no particular order. Raises `Malformed` where one is not a path.

        Most records are not read as a conversation, because a file may have millions.
        """
        if self.columns:
            record = renamed(record, self.columns)
        image = record.get("image")
        if type(image) is str and image and "images" not in record:  # the most frequent form
            return [image]
        if listed := record_images(record):
            return listed
        turns = record.get("conversations") or record.get("messages")
        return self.conversation(record).images if isinstance(turns, list) and any(map(_may_name_images, turns)) else []

    def conversation(self, record: Mapping[str, Any], *, num_images: int | None = None) -> Conversation:
        """The conversation of a record, with as many placeholders as images.

        The turns are one of these:

        - `conversations` or `messages`, a list of `{"from" or "role", "value" or "content"}`; the content is a string
          or a list of pieces
        - the same key with `[{"user", "assistant"}]`, as in the_cauldron (Laurençon et al. 2024, arXiv:2405.02246)
        - a pair such as `question` and `answer`

        Pairs without any placeholder have their images before the first question. An image is named in the record, in a
        turn or in a piece. With `num_images`, the record's images are stored elsewhere and names in it are not read.

        Raises `Malformed` for an unknown key with content, for user and assistant turns that do not alternate, for an
        empty turn, and for placeholders that do not match the images or are not in a user turn.
        """
        if self.columns:
            record = renamed(record, self.columns)
        listed = [""] * num_images if num_images is not None else record_images(record)
        draft = _Draft(self, [], [])
        draft.read(record, num_images=len(listed))
        messages = _merge_system(draft.messages)
        _check_turns(messages)
        names = _match_images(listed, draft.image_names, has_null=has_null_image(record))
        return Conversation(messages, names)


@dataclass
class _Draft:
    """A conversation while it is read.

    `image_names` has one entry per placeholder: the name that its turn gives, or None for the record's next image.
    """

    reader: RecordReader
    messages: list[Message]
    image_names: list[str | None]

    def read(self, record: Mapping[str, Any], *, num_images: int) -> None:
        form = _form(record)
        refuse_other_keys(record, {*IMAGE_KEYS, "system", *form}, where="")
        if not is_empty(system := record.get("system")):
            self._add_message("system", system, where="under 'system'")
        if form[0] not in TURN_KEYS:
            return self._add_pairs(list(_pairs_of(record, form)), num_images=num_images)
        turns = record[form[0]]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise Malformed("has turns that are not a list of objects; write them as [{...}, {...}]")
        if turns and "user" in turns[0] and not {"role", "from"} & turns[0].keys():
            for number, turn in enumerate(turns, start=1):
                refuse_other_keys(turn, {"user", "assistant"}, where=f" of turn {number}")
            pairs = [(turn.get("user"), turn.get("assistant")) for turn in turns]
            return self._add_pairs(pairs, num_images=num_images)
        for number, turn in enumerate(turns, start=1):
            self._add_turn(turn, number)
        return None

    def _add_pairs(self, pairs: Sequence[tuple[Any, Any]], *, num_images: int) -> None:
        texts = [(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
        if num_images and isinstance(texts[0][1], str) and not any(_has_placeholder(text) for _, text in texts):
            texts[0] = ("user", PLACEHOLDER * num_images + texts[0][1])
        for number, (role, text) in enumerate(texts, start=1):
            self._add_message(role, text, where=f"in turn {number}")

    def _add_turn(self, turn: Mapping[str, Any], number: int) -> None:
        role_key, role = _either(turn, ("role", "from"), number)
        content_key, content = _either(turn, ("content", "value"), number)
        refuse_other_keys(turn, {role_key, content_key, "loss", *IMAGE_KEYS}, where=f" of turn {number}")
        mapped = (self.reader.role_map or {}).get(role) or ROLES.get(role) if isinstance(role, str) else None
        if mapped is None:
            remedy = f", or set data.role_map={{{role}: user}}" if isinstance(role, str) and role.isidentifier() else ""
            raise Malformed(
                f"has {quoted(role)} as '{role_key}' of turn {number}; choose one of {', '.join(ROLES)}{remedy}"
            )
        names = record_images(turn) if "image" in turn or "images" in turn else ()
        self._add_message(mapped, content, where=f"in turn {number}", turn_images=names)
        if (loss := turn.get("loss")) is not None:
            if loss not in (True, False) or (loss and mapped != "assistant"):
                raise Malformed(
                    f"has {quoted(loss)} as 'loss' of turn {number} ({mapped}); write true or false in an assistant's "
                    "turn"
                )
            if mapped == "assistant" and not loss:
                self.messages[-1]["supervised"] = False

    def _add_message(self, role: Any, value: Any, *, where: str, turn_images: Sequence[str] = ()) -> None:
        """Append a message of a string or of pieces; `turn_images` are the images that its turn lists."""
        if type(value) is str and "<" not in value and not turn_images:  # fast: most messages have no placeholder
            self.messages.append({"role": role, "content": [{"type": "text", "text": value}] if value else []})
            return
        pieces = value if isinstance(value, list) else [value]
        if value is None or not pieces:
            raise Malformed(f"has no text {where}; write it as a string or a list of pieces", "empty_text")
        content: list[Content] = []
        names: list[str | None] = []
        for piece in pieces:
            for part in _parts_of(piece, where=where):
                if isinstance(part, str):
                    content.extend(_split_at_placeholders(part, role=role, where=where))
                else:
                    content.append({"type": "image"})
                num_new = sum(item["type"] == "image" for item in content) - len(names)
                names.extend([None] * num_new if isinstance(part, str) else [part.name])
                if isinstance(part, _Image) and part.position is not None:
                    expected = len(self.image_names) + len(names) - 1
                    if part.position != expected:
                        raise Malformed(
                            f"has index {part.position} at an image {where} where {expected} is expected; list the "
                            "images in the order of their placeholders"
                        )
        if turn_images:
            if not names:
                content[:0] = [{"type": "image"} for _ in turn_images]
                names = list(turn_images)
            elif names == [None] * len(turn_images):
                names = list(turn_images)
            else:
                raise Malformed(
                    f"lists {_num_images(len(turn_images))} {where}, whose text has {len(names)} of {PLACEHOLDER}; "
                    "make them equal"
                )
        if self.reader.image_first and role == "user" and len(names) == 1:
            rest = "".join(item["text"] for item in content if item["type"] == "text").strip()
            content = [{"type": "image"}, *([Content(type="text", text="\n" + rest)] if rest else [])]
        self.messages.append({"role": role, "content": content})
        self.image_names.extend(names)


class _Image(NamedTuple):
    """A piece that is an image: the name and the position among the record's images, where the piece gives them."""

    name: str | None
    position: int | None


def _parts_of(piece: Any, *, where: str) -> Iterator[str | _Image]:
    """A piece of a message as a string, which may hold placeholders, or as an image."""
    if (text := as_text(piece)) is not None:
        yield text
        return
    if not isinstance(piece, dict):
        raise Malformed(f"has {quoted(piece)} {where}; write a string, or a list of pieces such as {{type, text}}")
    given = {key: value for key, value in piece.items() if value is not None}
    kind = given.get("type", "text" if "text" in given else "image" if "image" in given else None)
    if kind in _TEXT_TYPES and (text := as_text(given.get("text"))) is not None:
        ignored = {"annotations", "cache_control"}
        refuse_other_keys(given, {"type", "text"}, where=f" of a text {where}", ignored=ignored)
        yield text
    elif kind in _IMAGE_TYPES:
        paths = [key for key in PATH_KEYS if not is_empty(given.get(key))]
        if len(paths) > 1:
            raise Malformed(f"names an image under '{paths[0]}' and '{paths[1]}' {where}; keep one of them")
        ignored = {"detail", "cache_control"}
        refuse_other_keys(given, {"type", *paths}, where=f" of an image {where}", ignored=ignored)
        name = image_name(given[paths[0]]) if paths else None
        if paths and not name:
            raise Malformed(f"has {quoted(given[paths[0]])} as an image {where}; write its path as a string")
        yield _Image(name, given.get("index"))
    else:
        raise Malformed(f"has a piece of type {quoted(kind)} {where}; choose text (with its 'text') or image")


def _split_at_placeholders(text: str, *, role: str, where: str) -> Iterator[Content]:
    """The text split at its image placeholders. Raises `Malformed` for tags of other media, except in answers."""
    at, kept = 0, ""
    for found in _MEDIA_TAGS.finditer(text):
        kept, tag, at = kept + text[at : found.start()], found[0], found.end()
        if tag == PLACEHOLDER:
            if kept:
                yield {"type": "text", "text": kept}
            yield {"type": "image"}
            kept = ""
        elif tag[0] == "\\":
            kept += tag[1:]
        elif role == "assistant":  # an answer may contain HTML
            kept += tag
        else:
            remedy = f"write {PLACEHOLDER} there and list the path under 'images'" if tag[:4] == "<img" else "remove it"
            raise Malformed(
                f"has {quoted(tag)} {where}, which is not read; {remedy}, or write \\{tag[:7]} for the word"
            )
    if kept := kept + text[at:]:
        yield {"type": "text", "text": kept}


def _has_placeholder(value: Any) -> bool:
    return isinstance(value, str) and re.search(rf"(?<!\\){PLACEHOLDER}", value) is not None


def _form(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys under which a record has its turns."""
    forms: list[tuple[str, ...]] = [(key,) for key in TURN_KEYS if not is_empty(record.get(key))]
    forms += [pair for pair in PAIRS if any(not is_empty(record.get(key)) for key in pair)]
    if not forms:
        forms = [(key,) for key in TURN_KEYS if record.get(key) is not None]
    if not forms:
        keys = [key for key in record if key not in METADATA_KEYS]
        but = f" but {named(keys)}" if keys else ""
        raise Malformed(
            f"has neither 'conversations' nor 'messages'{but}; add its turns under one of them, or name their key by "
            "data.columns="
        )
    if len(forms) > 1:
        raise Malformed(f"has turns under {forms[0][0]!r} and under {forms[1][0]!r}; keep one of them")
    return (*forms[0], *EXTRA_PAIR_KEYS.get(forms[0][0], ()))


def _pairs_of(record: Mapping[str, Any], form: Sequence[str]) -> Iterator[tuple[Any, Any]]:
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Malformed(f"has {quoted(history)} as 'history'; write it as [[question, answer], ...]")
    yield from map(tuple, history)
    question, answer = (record.get(key) for key in form[:2])
    extra = record.get("input")
    yield question if "input" not in form or is_empty(extra) else f"{question}\n{extra}", answer


def _either(turn: Mapping[str, Any], keys: Sequence[str], number: int) -> tuple[str, Any]:
    """The one of these keys that a turn has, and its value."""
    given = [key for key in keys if turn.get(key) is not None] or [key for key in keys if key in turn] or keys[:1]
    if len(given) > 1:
        raise Malformed(f"has '{given[0]}' and '{given[1]}' in turn {number}; keep one of them")
    return given[0], turn.get(given[0])


def _merge_system(messages: Sequence[Message]) -> list[Message]:
    """The messages with the system turns at their start joined by an empty line; empty system turns are left out."""
    num_system = 0
    while num_system < len(messages) and messages[num_system]["role"] == "system":
        num_system += 1
    contents = [message["content"] for message in messages[:num_system] if _has_content(message)]
    merged = list(contents[0]) if contents else []
    for content in contents[1:]:
        merged += [Content(type="text", text="\n\n"), *content]
    return [*([Message(role="system", content=merged)] if contents else []), *messages[num_system:]]


def _has_content(message: Message) -> bool:
    return any(piece["type"] == "image" or piece["text"].strip() for piece in message["content"])


def _check_turns(messages: Sequence[Message]) -> None:
    """Raise `Malformed` unless user and assistant alternate after an optional system turn, none of them empty."""
    roles = [message["role"] for message in messages]
    first = 1 if roles[:1] == ["system"] else 0
    if len(roles) == first:
        raise Malformed("has 0 turns of a conversation; add a user turn and its answer")
    for index in range(first, len(roles)):
        expected = ("user", "assistant")[(index - first) % 2]
        if roles[index] != expected:
            raise Malformed(
                f"has {roles[index]} as turn {index + 1} of {len(roles)} where {expected} is expected; "
                "let user and assistant alternate, the user first"
            )
    if roles[-1] != "assistant":
        raise Malformed(f"ends with a user turn (turn {len(roles)} of {len(roles)}); add the answer or remove the turn")
    for number, message in enumerate(messages, start=1):
        if not _has_content(message):
            says = f"has an empty turn {number} of {len(roles)} ({message['role']}); write its text"
            raise Malformed(says, "empty_text")
        num_placeholders = sum(piece["type"] == "image" for piece in message["content"])
        if num_placeholders and message["role"] != "user":
            raise Malformed(
                f"has {num_placeholders} {PLACEHOLDER} in turn {number} ({message['role']}); move it to a user turn, "
                f"or write \\{PLACEHOLDER} for the word"
            )


def _match_images(listed: Sequence[str], names: Sequence[str | None], *, has_null: bool) -> list[str]:
    """The image name of each placeholder: from `names`, or the next of the images that the record lists."""
    num_named = sum(name is not None for name in names)
    if num_named and listed:
        if list(names) == list(listed):
            return list(listed)
        raise Malformed(
            f"lists {_num_images(len(listed))} and names {num_named} more in its turns; name all of them in the record "
            "or all of them in the turns"
        )
    if len(names) - num_named != len(listed):
        null = " (null counts as no image)" if has_null else ""
        raise Malformed(
            f"holds {_num_images(len(listed) + num_named)}{null} but its text has {len(names)} image "
            f"placeholder{'s' * (len(names) != 1)}; add or remove an {PLACEHOLDER}"
            + (f" (\\{PLACEHOLDER} is the word)" * (len(names) > 0)),
            "placeholder_mismatch",
        )
    rest = iter(listed)
    return [next(rest) if name is None else name for name in names]


def _may_name_images(turn: Any) -> bool:
    return isinstance(turn, dict) and (
        isinstance(turn.get("value"), list | dict)
        or isinstance(turn.get("content"), list | dict)
        or bool(turn.get("images") or turn.get("image"))
    )


def _num_images(number: int) -> str:
    return f"{number} image{'s' * (number != 1)}"
