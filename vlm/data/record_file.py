"""Records of a large JSON file, of which only the positions are kept in memory.

665,000 conversations are 1 GB of text and several GB of dictionaries, but a run needs one batch at a time. So each
record is parsed once at the start, to find its position, and again whenever it is read.
"""

from __future__ import annotations

import codecs
import json
import re
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from vlm.data.annotations import Record, check_suffix, not_json, to_record

BOM = codecs.BOM_UTF8
CHUNK = 2**20  # bytes read together
LINES = (".jsonl", ".ndjson")
SUFFIXES = (".json", *LINES, ".txt")
HEAD = 2**24  # maximum bytes of the first line of JSON lines
LARGEST = 2**26  # maximum characters of a record
_BETWEEN = re.compile(r"[ \t\n\r]*([\[,\]]?)[ \t\n\r]*")  # the text between two items of a list
_DECODER = json.JSONDecoder()


class Item(NamedTuple):
    """A JSON value, its bytes [start, end) in the file, and its number: its line, or its index in the list."""

    start: int
    end: int
    number: int
    value: Any


class RecordFile:
    """`file[i]` is record i of a JSON list or of JSON lines; memory holds three numbers per record.

    `visit` is called with every record, in order. Raises `ValueError` with the line of the error where the file is
    neither.
    """

    def __init__(self, file: Path, visit: Callable[[Record], None]) -> None:
        check_suffix(file, SUFFIXES)
        self.file, self._name = file, file.name
        self._is_lines = file.suffix.lower() in LINES or _is_lines(file)
        positions = array("q")
        num_wrong = 0
        for item in _lines(file) if self._is_lines else _items(file):
            record = self._record(item.number, item.value)
            num_wrong += bool(record.problem)
            positions.extend(item[:3])
            visit(record)
        self._positions = np.array(positions).reshape(-1, 3)
        if num_wrong and not self._is_lines:
            raise ValueError(f"'{file}' has {num_wrong} of {len(self)} items that are not objects; remove them")

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Record:
        start, end, number = self._positions[index].tolist()
        with self.file.open("rb") as handle:
            handle.seek(start)
            data = handle.read(end - start)
        try:
            return self._record(number, json.loads(data))
        except (ValueError, RecursionError) as error:
            return self._record(number, {})._replace(
                problem=f"changed since the start of the run ({error}); restart the run"
            )

    def _record(self, number: int, value: Any) -> Record:
        return to_record(f"{self._name}:{number}" if self._is_lines else f"{self._name}[{number}]", value)


def _is_lines(file: Path) -> bool:
    """Whether a `.json` or `.txt` file holds JSON lines: its first line is an object, and other lines follow."""
    with file.open("rb") as handle:
        head = handle.read(HEAD).removeprefix(BOM)
    first, _, rest = head.lstrip().partition(b"\n")
    if not first.startswith(b"{") or (not rest.strip() and file.suffix.lower() == ".json"):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _lines(file: Path) -> Iterator[Item]:
    end = 0
    with file.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            start, end = end, end + len(line)
            if line.removeprefix(BOM).strip():
                try:
                    yield Item(start, end, number, json.loads(line))
                except (ValueError, RecursionError) as error:
                    raise not_json(file, number, error) from error


def _items(file: Path) -> Iterator[Item]:
    """The items of a JSON list."""
    with file.open("rb") as handle:
        window = _Window(handle)
        try:
            kind = window.kind()
            if kind == "a list":
                yield from window.items()
        except (ValueError, RecursionError) as error:
            raise not_json(file, window.line_of(error), error) from error
    if kind != "a list":
        raise ValueError(f"'{file}' holds {kind}; give a list of conversations")


class _Window:
    """The part of a file's text that is in memory, read chunk by chunk."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle = handle
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._text, self._at = "", 0  # `_at` is the index of the next character
        self._byte = len(BOM) if handle.read(len(BOM)) == BOM else 0  # the position of that character in the file
        handle.seek(self._byte)

    def kind(self) -> str:
        """The kind of the file's value. Reads the opening bracket of a list."""
        if self.between() == "[":
            return "a list"
        return "one object" if isinstance(self._value(), dict) else "a value that is not a list"

    def items(self) -> Iterator[Item]:
        """The items after the opening bracket of a list. Raises unless the file ends after the list."""
        mark = self.between() if self._text.startswith("]", self._at) else ","
        number = 0
        while mark == ",":
            start, value = self._byte, self._value()
            yield Item(start, self._byte, number, value)
            number += 1
            mark = self.between()
        if mark != "]" or self._at < len(self._text):
            reason = "Extra data" if mark == "]" else "Expecting ',' delimiter"
            raise json.JSONDecodeError(reason, self._text, self._at)

    def between(self) -> str:
        """Advance to the next value. Returns the bracket or comma before it, or an empty string."""
        while (found := _BETWEEN.match(self._text, self._at)) and found.end() == len(self._text) and self._more():
            pass
        assert found is not None
        self._advance(found.end())
        return found[1]

    def _value(self) -> Any:
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                if end < len(self._text) or not self._more():  # a number may continue
                    break
            except json.JSONDecodeError:
                if len(self._text) - self._at > LARGEST or not self._more():
                    raise
        self._advance(end)
        return value

    def _advance(self, end: int) -> None:
        self._byte += end - self._at if self._text.isascii() else len(self._text[self._at : end].encode())
        self._at = end

    def _more(self) -> bool:
        """Read at least as much text as is left in memory. False at the end of the file."""
        data = self._handle.read(max(CHUNK, len(self._text) - self._at))
        new = self._decode(data, final=not data)
        if data:
            self._text, self._at = self._text[self._at :] + new, 0
        return bool(data)

    def line_of(self, error: Exception) -> int:
        """The number of the line in which an error is."""
        self._handle.seek(0)
        line = 1 + self._handle.read(self._byte).count(b"\n")
        if isinstance(error, UnicodeDecodeError):  # the error is after the text in memory
            return line + self._text.count("\n", self._at) + error.object.count(b"\n", 0, error.start)
        return line + self._text.count("\n", self._at, getattr(error, "pos", self._at))
