r"""Records of conversations -> messages in the common chat form, every slip of a record named.

Every key of a record is read, known to be harmless, or refused by name: what is dropped in silence trains wrongly
without an error. `<image>` in a text is the place of the next image; `\<image>` is the word.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from vlm.quote import named, quoted
from vlm.schema import BadSample, Content, Message

MARK = "<image>"  # in a text, the place of the next image

Role = Literal["system", "user", "assistant"]

# LLaVA and ShareGPT say human and gpt, chat messages user and assistant.
ROLES: dict[str, Role] = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}

_TURNS = ("conversations", "messages")
# A question and its answer; query, response and history are ms-swift's, instruction, input and output Alpaca's.
_PAIRS = (("question", "answer"), ("query", "response"), ("instruction", "output"))
_BESIDE_PAIR = {"query": {"history"}, "instruction": {"input", "history"}, "question": {"history"}}
_IMAGES = ("image", "images")
PAIR_KEYS = (*(key for pair in _PAIRS for key in pair), "input", "history")
RECORD_KEYS = (*_TURNS, *(key for pair in _PAIRS for key in pair), "input", "history", *_IMAGES, "system", "caption")

# Keys that say where a record or a turn is from, and nothing of what is to be learned.
_HARMLESS = """
    id ids _id idx index uid uuid key name number sample_id question_id image_id conversation_id conv_id dialog_id turn
    turn_id model model_name generator source sources data_source dataset dataset_name dataset_id origin subset split
    url license author annotator user_id worker_id category categories type task task_name task_type question_type
    answer_type topic domain tag tags lang language languages width height image_width image_height image_size size hash
    sha256 md5 date time timestamp created created_at updated_at version score scores rating quality difficulty
    similarity length num_turns num_tokens token_count meta metadata __index_level_0__
"""
HARMLESS = frozenset(_HARMLESS.split())
_REMEDIES = {  # of keys that are met often, what to do in their place
    "weight": "write loss: false in the turns that are not to be learned",
    "image_path": "name it image, or set data.columns={image_path: image}",
    "video": "only images can be read",
    "videos": "only images can be read",
    "audio": "only images can be read",
    "audios": "only images can be read",
    "tools": "calls of tools are not rendered",
    "tool_calls": "calls of tools are not rendered",
    "reasoning_content": "write what is to be learned into the turn's text",
}
_MARKS = re.compile(r"\\?(?:<image>|<video>|<audio>|<img>[^<\n]*</img>)")
_PIECE_TEXT = ("text", "input_text", "output_text")
_PIECE_IMAGE = ("image", "image_url", "input_image")
_PIECE_PATHS = ("image", "image_url", "path", "url")  # where a piece names its image


class Malformed(BadSample):
    """What is wrong with a record, in words that follow on "sample 'x'"."""


class Talk(NamedTuple):
    """A conversation, and the names of its images in the order of their placeholders."""

    messages: list[Message]
    images: list[str]


def caption_messages(prompt: str, caption: str) -> list[Message]:
    """A picture, what is asked about it, and its caption; the picture comes first where the prompt has no `<image>`.

    Raises `ValueError` for a prompt with several.
    """
    asked = list(_split_marks(prompt, role="user", where="in data.prompt"))
    num_marks = sum(piece["type"] == "image" for piece in asked)
    if num_marks > 1:
        raise ValueError(f"data.prompt={quoted(prompt)} has {num_marks} {MARK} for one image; leave one of them")
    return [
        {"role": "user", "content": asked if num_marks else [{"type": "image"}, *asked]},
        {"role": "assistant", "content": [{"type": "text", "text": caption}]},
    ]


@dataclass(frozen=True, kw_only=True)
class RecordReader:
    """How the records of a dataset are read.

    `columns` renames keys that this project does not know (theirs -> ours, or -> None for a key to ignore), `role_map`
    roles (theirs -> user, assistant or system). With `image_first` the one image of a user's turn comes before its
    text, on a line of its own, as LLaVA trains; without it each text stays as it is.

    Raises `ValueError` where a name on the right is none of ours.
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

    def __hash__(self) -> int:  # of the dictionaries too, so that what was read with one can be cached
        return hash(repr(self))

    def images(self, record: Mapping[str, Any]) -> list[str]:
        """The images that a record names, in some order, at little cost. Raises `Malformed` where one is no path."""
        if self.columns:
            record = renamed(record, self.columns)
        image = record.get("image")
        if type(image) is str and image and "images" not in record:  # as most of the million that a file may have
            return [image]
        if listed := record_images(record):
            return listed
        turns = record.get("conversations") or record.get("messages")
        return self.conversation(record).images if isinstance(turns, list) and any(map(_is_rich, turns)) else []

    def conversation(self, record: Mapping[str, Any], *, num_images: int | None = None) -> Talk:
        """The turns of a record, its placeholders as many as its images.

        The turns are `conversations` or `messages`: a list of `{"from" or "role", "value" or "content"}`, the content a
        text or a list of pieces, or the_cauldron's `[{"user", "assistant"}]` (Laurençon et al. 2024, arXiv:2405.02246);
        or a pair such as `question` and `answer`. Where no placeholder says otherwise, the images of pairs come before
        the first question. An image's name stands in the record, in a turn or in a piece; where `num_images` is given
        the images are elsewhere, so many, and the names in the record are not read.

        Raises `Malformed` for a key that is not read and may carry content, and where user and assistant do not take
        turns, somebody is silent, or placeholders are too few, too many or not the user's.
        """
        if self.columns:
            record = renamed(record, self.columns)
        listed = [""] * num_images if num_images is not None else record_images(record)
        draft = _Draft(self, [], [])
        draft.read(record, num_images=len(listed))
        messages = _one_system(draft.messages)
        _check_turns(messages)
        return Talk(messages, _match(messages, listed, draft.own, null=_has_null(record)))


def has_pair(keys: Collection[str]) -> bool:
    """Whether a question and its answer are among the keys of records."""
    return any(set(pair) <= set(keys) for pair in _PAIRS)


def check_columns(columns: Mapping[str, str | None] | None, *, known: Collection[str]) -> None:
    """Raise `ValueError` where a key is renamed to one that is not in `known`."""
    for theirs, ours in (columns or {}).items():
        if ours is not None and ours not in known:
            raise ValueError(
                f"data.columns maps '{theirs}' to {quoted(ours)}; choose one of {', '.join(known)}, or null for a key "
                "to ignore"
            )


def renamed(record: Mapping[str, Any], columns: Mapping[str, str | None]) -> dict[str, Any]:
    """The record under our keys. Raises `Malformed` where two of its keys come to be one."""
    result: dict[str, Any] = {key: value for key, value in record.items() if key not in columns}
    for theirs, ours in columns.items():
        if ours is None or theirs not in record:
            continue
        if not _is_empty(result.get(ours)) and not _is_empty(record[theirs]):
            raise Malformed(f"has '{theirs}', which data.columns renames, and '{ours}' too; remove one")
        result[ours] = result.get(ours) if _is_empty(record[theirs]) and ours in result else record[theirs]
    return result


def turns_record(turns: Any) -> dict[str, Any]:
    """The record of turns that stand alone, as in a table's column or a shard's JSON list, whatever their form."""
    return {"messages": turns}


def record_images(record: Mapping[str, Any]) -> list[str]:
    """The images that a record lists under `image` or `images`, each a path or a list of them; null is none.

    Raises `Malformed` where one is no path, or where both keys list images that differ.
    """
    image, images = record.get("image"), record.get("images")
    if image and images and _listed(image) != _listed(images):
        raise Malformed("has images under 'image' and others under 'images'; list all of them under 'images'")
    listed = _listed(image or images)
    names = [_name(item) for item in listed]
    wrong = [item for item, name in zip(listed, names, strict=True) if not name and item is not None]
    if wrong:
        raise Malformed(
            f"lists {len(listed)} image{'s' * (len(listed) != 1)} of which {len(wrong)} are no path, the first "
            f"{quoted(wrong[0])}; write each as a text"
        )
    return [name for name in names if name]


def as_text(value: Any) -> str | None:
    """A text, or a number as text (JSON and tables have an answer of 7 as a number); None for all else."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


@dataclass
class _Draft:
    """A conversation while it is read: `own` has the name of each placeholder's image, None for the record's next."""

    reader: RecordReader
    messages: list[Message]
    own: list[str | None]

    def read(self, record: Mapping[str, Any], *, num_images: int) -> None:
        form = _form(record)
        _refuse_others(record, {*_IMAGES, "system", *form}, where="")
        if not _is_empty(system := record.get("system")):
            self.add("system", system, where="under 'system'")
        if form[0] not in _TURNS:
            return self._pairs(list(_pairs_of(record, form)), num_images=num_images)
        turns = record[form[0]]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise Malformed("has turns that are not a list of objects; write them as [{...}, {...}]")
        if turns and "user" in turns[0] and not {"role", "from"} & turns[0].keys():
            for number, turn in enumerate(turns, start=1):
                _refuse_others(turn, {"user", "assistant"}, where=f" of turn {number}")
            return self._pairs([(turn.get("user"), turn.get("assistant")) for turn in turns], num_images=num_images)
        for number, turn in enumerate(turns, start=1):
            self._turn(turn, number)
        return None

    def _pairs(self, pairs: Sequence[tuple[Any, Any]], *, num_images: int) -> None:
        texts = [(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
        if num_images and isinstance(texts[0][1], str) and not any(_num_marks(text) for _, text in texts):
            texts[0] = ("user", MARK * num_images + texts[0][1])
        for number, (role, text) in enumerate(texts, start=1):
            self.add(role, text, where=f"in turn {number}")

    def _turn(self, turn: Mapping[str, Any], number: int) -> None:
        role_key, role = _either(turn, ("role", "from"), number)
        content_key, content = _either(turn, ("content", "value"), number)
        _refuse_others(turn, {role_key, content_key, "loss", *_IMAGES}, where=f" of turn {number}")
        mapped = (self.reader.role_map or {}).get(role) or ROLES.get(role) if isinstance(role, str) else None
        if mapped is None:
            remedy = f", or set data.role_map={{{role}: user}}" if isinstance(role, str) and role.isidentifier() else ""
            raise Malformed(
                f"has {quoted(role)} as '{role_key}' of turn {number}; choose one of {', '.join(ROLES)}{remedy}"
            )
        own = record_images(turn) if "image" in turn or "images" in turn else ()
        self.add(mapped, content, where=f"in turn {number}", own=own)
        if (loss := turn.get("loss")) is not None:
            if loss not in (True, False) or (loss and mapped != "assistant"):
                raise Malformed(
                    f"has {quoted(loss)} as 'loss' of turn {number} ({mapped}); write true or false in an assistant's "
                    "turn"
                )
            if mapped == "assistant" and not loss:
                self.messages[-1]["supervised"] = False

    def add(self, role: Any, value: Any, *, where: str, own: Sequence[str] = ()) -> None:
        """A message of a text or of pieces; `own` are the images that its turn lists."""
        if type(value) is str and "<" not in value and not own:  # no mark: as most of the millions that a file may have
            self.messages.append({"role": role, "content": [{"type": "text", "text": value}] if value else []})
            return
        pieces = value if isinstance(value, list) else [value]
        if value is None or not pieces:
            raise Malformed(f"has no text {where}; write it as a text or a list of pieces", "empty_text")
        content: list[Content] = []
        names: list[str | None] = []
        for piece in pieces:
            for text in _texts(piece, where=where):
                if isinstance(text, str):
                    content.extend(_split_marks(text, role=role, where=where))
                else:
                    content.append({"type": "image"})
                new = sum(item["type"] == "image" for item in content) - len(names)
                names.extend([None] * new if isinstance(text, str) else [text.name])
                if isinstance(text, _Image) and text.place not in (None, len(self.own) + len(names) - 1):
                    raise Malformed(
                        f"has index {text.place} at an image {where} where {len(self.own) + len(names) - 1} is due; "
                        "list the images in the order of their places"
                    )
        if own:
            if not names:
                content[:0] = [{"type": "image"} for _ in own]
                names = list(own)
            elif names == [None] * len(own):
                names = list(own)
            else:
                raise Malformed(
                    f"lists {_count(len(own))} {where}, whose text has {len(names)} of {MARK}; make them equal"
                )
        if self.reader.image_first and role == "user" and len(names) == 1:
            rest = "".join(item["text"] for item in content if item["type"] == "text").strip()
            content = [{"type": "image"}, *([Content(type="text", text="\n" + rest)] if rest else [])]
        self.messages.append({"role": role, "content": content})
        self.own.extend(names)


class _Image(NamedTuple):
    """A piece that is an image: its name where it has one, and which of the record's images it says that it is."""

    name: str | None
    place: int | None


def _texts(piece: Any, *, where: str) -> Iterator[str | _Image]:
    """A piece of a message as a text, whose marks are still in it, or as an image."""
    if (text := as_text(piece)) is not None:
        yield text
        return
    if not isinstance(piece, dict):
        raise Malformed(f"has {quoted(piece)} {where}; write a text, or a list of pieces such as {{type, text}}")
    given = {key: value for key, value in piece.items() if value is not None}
    kind = given.get("type", "text" if "text" in given else "image" if "image" in given else None)
    if kind in _PIECE_TEXT and (text := as_text(given.get("text"))) is not None:
        _refuse_others(given, {"type", "text"}, where=f" of a text {where}", more={"annotations", "cache_control"})
        yield text
    elif kind in _PIECE_IMAGE:
        paths = [key for key in _PIECE_PATHS if not _is_empty(given.get(key))]
        if len(paths) > 1:
            raise Malformed(f"names an image under '{paths[0]}' and '{paths[1]}' {where}; keep one of them")
        _refuse_others(given, {"type", *paths}, where=f" of an image {where}", more={"detail", "cache_control"})
        name = _name(given[paths[0]]) if paths else None
        if paths and not name:
            raise Malformed(f"has {quoted(given[paths[0]])} as an image {where}; write its path as a text")
        yield _Image(name, given.get("index"))
    else:
        raise Malformed(f"has a piece of type {quoted(kind)} {where}; choose text (with its 'text') or image")


def _split_marks(text: str, *, role: str, where: str) -> Iterator[Content]:
    """The text cut at its marks, and nothing else of it changed."""
    at, kept = 0, ""
    for found in _MARKS.finditer(text):
        kept, mark, at = kept + text[at : found.start()], found[0], found.end()
        if mark == MARK:
            if kept:
                yield {"type": "text", "text": kept}
            yield {"type": "image"}
            kept = ""
        elif mark[0] == "\\":
            kept += mark[1:]
        elif role == "assistant":  # speaks of HTML
            kept += mark
        else:
            remedy = f"write {MARK} there and list the path under 'images'" if mark[:4] == "<img" else "remove it"
            raise Malformed(
                f"has {quoted(mark)} {where}, which is not read; {remedy}, or write \\{mark[:7]} for the word"
            )
    if kept := kept + text[at:]:
        yield {"type": "text", "text": kept}


def _form(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys under which a record has its turns."""
    forms: list[tuple[str, ...]] = [(key,) for key in _TURNS if not _is_empty(record.get(key))]
    forms += [pair for pair in _PAIRS if any(not _is_empty(record.get(key)) for key in pair)]
    if not forms:
        forms = [(key,) for key in _TURNS if record.get(key) is not None]
    if not forms:
        keys = [key for key in record if key not in HARMLESS]
        but = f" but {named(keys)}" if keys else ""
        raise Malformed(
            f"has neither 'conversations' nor 'messages'{but}; add its turns under one of them, or name their key by "
            "data.columns="
        )
    if len(forms) > 1:
        raise Malformed(f"has its turns under {forms[0][0]!r} and under {forms[1][0]!r} too; keep one of them")
    return (*forms[0], *_BESIDE_PAIR.get(forms[0][0], ()))


def _pairs_of(record: Mapping[str, Any], form: Sequence[str]) -> Iterator[tuple[Any, Any]]:
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Malformed(f"has {quoted(history)} as 'history'; write it as [[question, answer], ...]")
    yield from map(tuple, history)
    question, answer = (record.get(key) for key in form[:2])
    more = record.get("input")
    yield question if "input" not in form or _is_empty(more) else f"{question}\n{more}", answer


def _either(turn: Mapping[str, Any], keys: Sequence[str], number: int) -> tuple[str, Any]:
    given = [key for key in keys if turn.get(key) is not None] or [key for key in keys if key in turn] or keys[:1]
    if len(given) > 1:
        raise Malformed(f"has '{given[0]}' and '{given[1]}' in turn {number}; keep one of them")
    return given[0], turn.get(given[0])


def _refuse_others(given: Mapping[str, Any], read: Set[str], *, where: str, more: Collection[str] = ()) -> None:
    """Raise `Malformed` for a key that is not read, is not known to be harmless, and is not empty."""
    if read >= given.keys():
        return
    for key, value in given.items():
        if key in read or key in HARMLESS or key in more or _is_empty(value):
            continue
        remedy = _REMEDIES.get(key, "rename or remove it")
        ignore = "" if where else f"; to ignore it, set data.columns={{{key}: null}}"
        raise Malformed(f"has the key {quoted(key)}{where}, which is not read ({quoted(value)}); {remedy}{ignore}")


def _one_system(messages: Sequence[Message]) -> list[Message]:
    """The messages, the system turns at their start made one, an empty line between them; empty ones are left out."""
    opening = 0
    while opening < len(messages) and messages[opening]["role"] == "system":
        opening += 1
    said = [message["content"] for message in messages[:opening] if _says_something(message)]
    content = list(said[0]) if said else []
    for more in said[1:]:
        content += [Content(type="text", text="\n\n"), *more]
    return [*([Message(role="system", content=content)] if said else []), *messages[opening:]]


def _says_something(message: Message) -> bool:
    return any(piece["type"] == "image" or piece["text"].strip() for piece in message["content"])


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
        if not _says_something(message):
            says = f"has nothing in turn {number} of {len(roles)} ({message['role']}); write its text"
            raise Malformed(says, "empty_text")
        num_here = sum(piece["type"] == "image" for piece in message["content"])
        if num_here and message["role"] != "user":
            raise Malformed(
                f"has {num_here} {MARK} in turn {number} ({message['role']}); move it to a user turn, or write "
                f"\\{MARK} for the word"
            )


def _match(messages: Sequence[Message], listed: Sequence[str], own: Sequence[str | None], *, null: bool) -> list[str]:
    """The name of each placeholder's image: its own, or the next of those that the record lists."""
    num_own = sum(name is not None for name in own)
    if num_own and listed:
        if list(own) == list(listed):
            return list(listed)
        raise Malformed(f"lists {_count(len(listed))} and names {num_own} more in its turns; keep them in one place")
    if len(own) - num_own != len(listed):
        num_marks = len(own)
        but = " (null is none)" if null else ""
        raise Malformed(
            f"holds {_count(len(listed) + num_own)}{but} but its text has {num_marks} image "
            f"placeholder{'s' * (num_marks != 1)}; add or remove an {MARK}"
            + (f" (\\{MARK} is the word)" * (num_marks > 0)),
            "placeholder_mismatch",
        )
    rest = iter(listed)
    return [next(rest) if name is None else name for name in own]


def _is_rich(turn: Any) -> bool:
    """Whether a turn may name images of its own."""
    return isinstance(turn, dict) and (
        isinstance(turn.get("value"), list | dict)
        or isinstance(turn.get("content"), list | dict)
        or bool(turn.get("images") or turn.get("image"))
    )


def _name(item: Any) -> str | None:
    """The path or address that an item of a list of images holds: a text, or an object with one under a usual key."""
    if isinstance(item, dict):
        given = [item[key] for key in _PIECE_PATHS if isinstance(item.get(key), str)]
        item = given[0] if len(given) == 1 else None
    return item if isinstance(item, str) and item else None


def _listed(value: Any) -> list[Any]:
    if not value:
        return []
    return value if isinstance(value, list) else [value]


def _has_null(record: Mapping[str, Any]) -> bool:
    return None in _listed(record.get("image")) or None in _listed(record.get("images"))


def _num_marks(value: Any) -> int:
    return len(re.findall(rf"(?<!\\){MARK}", value)) if isinstance(value, str) else 0


def _is_empty(value: Any) -> bool:
    return value is None or value == "" or value == [] or value == {}


def _count(number: int) -> str:
    return f"{number} image{'s' * (number != 1)}"
