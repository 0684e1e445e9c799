"""Reads W&B's offline file: records in the log format of LevelDB (its doc/log_format.md), after a header of 7 bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

HEADER, BLOCK = 7, 32_768  # bytes; the first block includes the header
CHUNK_HEADER = 7  # checksum (4), length (2), type (1)
LAST = (1, 4)  # types of a chunk that ends a record: whole, last of several


def records(file: Path) -> list[Any]:
    """All records of a run, as messages of W&B's protocol."""
    return [wandb_internal_pb2.Record.FromString(content) for content in _contents(file.read_bytes())]


def _contents(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    content, position = b"", HEADER
    while position + CHUNK_HEADER <= len(data):
        if BLOCK - position % BLOCK < CHUNK_HEADER:  # the rest of a block is padding
            position += BLOCK - position % BLOCK
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        position += CHUNK_HEADER
        content += data[position : position + length]
        position += length
        if kind in LAST:
            yield content
            content = b""


def kind(found: list[Any], name: str) -> list[Any]:
    """The records of one kind."""
    return [getattr(record, name) for record in found if record.WhichOneof("record_type") == name]


def history(found: list[Any]) -> list[dict[str, Any]]:
    """The logged steps."""
    return [_values(row.item) for row in kind(found, "history")]


def config(found: list[Any]) -> dict[str, Any]:
    """The config of the run."""
    return {key: value for record in kind(found, "config") for key, value in _values(record.update).items()}


def _values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
