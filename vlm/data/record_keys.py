"""Keys of a dataset's records: which are read, which are ignored, and which are refused by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from typing import Any

from vlm.quote import quoted
from vlm.schema import BadSample

TURN_KEYS = ("conversations", "messages")
# A question and its answer. query, response and history are ms-swift's; instruction, input and output are Alpaca's.
PAIRS = (("question", "answer"), ("query", "response"), ("instruction", "output"))
EXTRA_PAIR_KEYS = {"query": {"history"}, "instruction": {"input", "history"}, "question": {"history"}}
IMAGE_KEYS = ("image", "images")
PAIR_KEYS = (*(key for pair in PAIRS for key in pair), "input", "history")
RECORD_KEYS = (*TURN_KEYS, *PAIR_KEYS, *IMAGE_KEYS, "system", "caption")
# Where a piece of a message, or an item of a list of images, names its image.
PATH_KEYS = ("image", "image_url", "path", "url")

# Metadata: the origin of a record or a turn, and facts about it, but nothing to learn.
_METADATA = """
    id ids _id idx index uid uuid key name number sample_id question_id image_id conversation_id conv_id dialog_id turn
    turn_id model model_name generator source sources data_source dataset dataset_name dataset_id origin subset split
    url license author annotator user_id worker_id category categories type task task_name task_type question_type
    answer_type topic domain tag tags lang language languages width height image_width image_height image_size size hash
    sha256 md5 date time timestamp created created_at updated_at version score scores rating quality difficulty
    similarity length num_turns num_tokens token_count meta metadata __index_level_0__
"""
METADATA_KEYS = frozenset(_METADATA.split())
_REMEDIES = {  # for frequent keys that are refused
    "weight": "write loss: false in the turns that are not to be learned",
    "image_path": "name it image, or set data.columns={image_path: image}",
    "video": "only images can be read",
    "videos": "only images can be read",
    "audio": "only images can be read",
    "audios": "only images can be read",
    "tools": "tool calls are not supported",
    "tool_calls": "tool calls are not supported",
    "reasoning_content": "write what is to be learned into the turn's text",
}


class Malformed(BadSample):
    """A defect of a record; the message continues a sentence that begins with "sample 'x'"."""


def has_pair(keys: Collection[str]) -> bool:
    """Whether these keys of records include a question and its answer."""
    return any(set(pair) <= set(keys) for pair in PAIRS)


def check_columns(columns: Mapping[str, str | None] | None, *, known: Collection[str]) -> None:
    """Raise `ValueError` where `data.columns` renames a key to one that is not in `known`."""
    for theirs, ours in (columns or {}).items():
        if ours is not None and ours not in known:
            raise ValueError(
                f"data.columns maps '{theirs}' to {quoted(ours)}; choose one of {', '.join(known)}, or null for a key "
                "to ignore"
            )


def renamed(record: Mapping[str, Any], columns: Mapping[str, str | None]) -> dict[str, Any]:
    """The record with its keys renamed by `columns`. Raises `Malformed` where two keys get the same name."""
    result: dict[str, Any] = {key: value for key, value in record.items() if key not in columns}
    for theirs, ours in columns.items():
        if ours is None or theirs not in record:
            continue
        if not is_empty(result.get(ours)) and not is_empty(record[theirs]):
            raise Malformed(f"has '{theirs}', which data.columns renames, and '{ours}' too; remove one")
        result[ours] = result.get(ours) if is_empty(record[theirs]) and ours in result else record[theirs]
    return result


def refuse_other_keys(given: Mapping[str, Any], read: Set[str], *, where: str, ignored: Collection[str] = ()) -> None:
    """Raise `Malformed` for a key with content that is neither in `read`, nor in `ignored`, nor metadata."""
    if read >= given.keys():
        return
    for key, value in given.items():
        if key in read or key in METADATA_KEYS or key in ignored or is_empty(value):
            continue
        remedy = _REMEDIES.get(key, "rename or remove it")
        ignore = "" if where else f"; to ignore it, set data.columns={{{key}: null}}"
        raise Malformed(f"has the key {quoted(key)}{where}, which is not read ({quoted(value)}); {remedy}{ignore}")


def record_images(record: Mapping[str, Any]) -> list[str]:
    """The images under `image` or `images`, each a path or a list of paths; null counts as no image.

    Raises `Malformed` where one is not a path, or where both keys list images that differ.
    """
    image, images = record.get("image"), record.get("images")
    if image and images and _as_list(image) != _as_list(images):
        raise Malformed("has images under 'image' and others under 'images'; list all of them under 'images'")
    listed = _as_list(image or images)
    names = [image_name(item) for item in listed]
    wrong = [item for item, name in zip(listed, names, strict=True) if not name and item is not None]
    if wrong:
        raise Malformed(
            f"lists {len(listed)} image{'s' * (len(listed) != 1)}, {len(wrong)} of which cannot be read as a path, "
            f"the first {quoted(wrong[0])}; write each as a string"
        )
    return [name for name in names if name]


def has_null_image(record: Mapping[str, Any]) -> bool:
    """Whether the record lists null as one of its images."""
    return None in _as_list(record.get("image")) or None in _as_list(record.get("images"))


def image_name(item: Any) -> str | None:
    """The path or address in an item of a list of images: a string, or an object with one under a usual key."""
    if isinstance(item, dict):
        given = [item[key] for key in PATH_KEYS if isinstance(item.get(key), str)]
        item = given[0] if len(given) == 1 else None
    return item if isinstance(item, str) and item else None


def as_text(value: Any) -> str | None:
    """A string, or a number as one (an answer of 7 is a number in JSON and in tables); None for any other type."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def is_empty(value: Any) -> bool:
    """Whether a value is null or has no content."""
    return value is None or value == "" or value == [] or value == {}


def _as_list(value: Any) -> list[Any]:
    if not value:
        return []
    return value if isinstance(value, list) else [value]
