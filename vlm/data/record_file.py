"""Records of a large JSON file, found by where they begin and end and parsed when they are read.

A list of 665,000 conversations is 1 GB of text and several of dictionaries, of which a run needs a batch at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, UInt8

from vlm.data.annotations import Row, read_json, to_row

CHUNK = 2**18  # bytes looked at together: few enough for a core's cache
HEAD = 2**24  # bytes that the first of several lines may have
_QUOTE, _BACKSLASH, _OPEN, _CLOSE, _LINE = (ord(character) for character in '"\\{}\n')
_LOWER = 0x20  # the bit in which { differs from [ and } from ]
_IMAGE = re.compile(rb'"images?"\s*:\s*(?:"([^"\\]*)")?')  # within a text its quotes would be escaped


class RecordFile:
    """`file[i]` is the row of record i of a JSON list, or of JSON lines; in memory are two numbers a record.

    Raises `ValueError` where the file is neither; that a record is JSON in itself is seen when it is read.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.is_lines = file.suffix == ".jsonl" or _is_lines(file)
        self.starts, self.ends = _lines(file) if self.is_lines else _items(file)
        self.numbers = np.arange(len(self.starts))
        if self.is_lines:  # places count every line, the empty ones are no records
            self.numbers += 1
            filled = np.array([bool(data.strip()) for data in self.raw()], dtype=bool)
            self.starts, self.ends, self.numbers = (a[filled] for a in (self.starts, self.ends, self.numbers))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Row:
        start, end = int(self.starts[index]), int(self.ends[index])
        with self.file.open("rb") as handle:
            handle.seek(start)
            return self.row(index, handle.read(end - start))

    def row(self, index: int, data: bytes) -> Row:
        """The row of a record whose bytes are at hand. Raises `ValueError` naming the line where they are not JSON."""
        number = int(self.numbers[index])
        place = f"{self.file.name}:{number}" if self.is_lines else f"{self.file.name}[{number}]"
        try:
            return to_row(place, json.loads(data))
        except (ValueError, RecursionError) as error:
            before = self.file.read_bytes()[: int(self.starts[index]) + getattr(error, "pos", 0)]
            line, reason = before.count(b"\n") + 1, getattr(error, "msg", error)
            raise ValueError(f"'{self.file}' line {line} is not JSON ({reason}); correct that line") from error

    def raw(self) -> Iterator[bytes]:
        """The bytes of every record in turn."""
        with self.file.open("rb", buffering=2**20) as handle:  # mapped, all of the file would count as memory in use
            for start, end in zip(self.starts.tolist(), self.ends.tolist(), strict=True):
                handle.seek(start)
                yield handle.read(end - start)


def plain_image(data: bytes) -> str | None:
    """A record's one image where a look at its bytes tells it for sure, else None: then the record has to be parsed."""
    if data.count(b'"image') != 1:
        return None
    match = _IMAGE.search(data)
    if match is None or not match[1] or b"{" in data[1 : match.start()]:
        return None
    try:
        return match[1].decode()
    except UnicodeDecodeError:
        return None


def _is_lines(file: Path) -> bool:
    """Whether a `.json` file holds JSON lines: its first line is an object, and not its last."""
    with file.open("rb") as handle:
        head = handle.read(HEAD).removeprefix(b"\xef\xbb\xbf")
    first, _, rest = head.lstrip().partition(b"\n")
    if not first.startswith(b"{") or not rest.strip():
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _chunks(file: Path) -> Iterator[tuple[int, UInt8[np.ndarray, " n"]]]:
    """The file's bytes and where they begin; none ends between a backslash and what it escapes."""
    first = 0
    with file.open("rb") as handle:
        if handle.read(3) == b"\xef\xbb\xbf":
            first = 3
        handle.seek(first)
        while data := handle.read(CHUNK):
            while data.endswith(b"\\") and (more := handle.read(1)):
                data += more
            yield first, np.frombuffer(data, dtype=np.uint8)
            first += len(data)


def _lines(file: Path) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    breaks = [np.empty(0, np.int64)]
    begin = end = 0
    for first, data in _chunks(file):
        begin = first if not end else begin
        breaks.append(np.flatnonzero(data == _LINE) + first)
        end = first + len(data)
    at = np.concatenate(breaks)
    return np.concatenate([[begin], at + 1]), np.concatenate([at, [end]])


def _items(file: Path) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Where the items of a JSON list begin and end, from its brackets outside of texts alone."""
    starts, ends = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    in_text = depth = 0
    for first, data in _chunks(file):
        quotes = np.flatnonzero(data == _QUOTE)
        quotes = quotes[~_escaped(data, quotes)]
        folded = data | _LOWER
        brackets = np.flatnonzero((folded == _OPEN) | (folded == _CLOSE))
        brackets = brackets[(np.searchsorted(quotes, brackets) + in_text) % 2 == 0]
        steps = np.where(folded[brackets] == _OPEN, 1, -1)
        depths = depth + np.cumsum(steps)
        starts.append(brackets[(steps == 1) & (depths == 2)] + first)
        ends.append(brackets[(steps == -1) & (depths == 1)] + first + 1)
        in_text = (in_text + len(quotes)) % 2
        depth = int(depths[-1]) if len(depths) else depth
    start, end = np.concatenate(starts), np.concatenate(ends)
    if in_text or depth or len(start) != len(end) or not _only_commas(file, start, end):
        document = read_json(file)  # tells the line of a slip
        if isinstance(document, dict):
            raise ValueError(f"'{file}' holds one object; give a list of conversations")
        if num_wrong := sum(bool(row.problem) for row in document):
            raise ValueError(f"'{file}' has {num_wrong} of {len(document)} items that are no objects; remove them")
    return start, end


def _escaped(data: UInt8[np.ndarray, " n"], quotes: Int[np.ndarray, " m"]) -> Bool[np.ndarray, " m"]:
    """Which quotes stand behind an odd number of backslashes."""
    escaped = np.zeros(len(quotes), dtype=bool)
    run = np.arange(len(quotes))
    back = 1
    while len(run := run[(quotes[run] >= back) & (data[quotes[run] - back] == _BACKSLASH)]):
        escaped[run] ^= True
        back += 1
    return escaped


def _only_commas(file: Path, starts: Int[np.ndarray, " n"], ends: Int[np.ndarray, " n"]) -> bool:
    """Whether there is nothing but one comma between the items, and the list's brackets around them."""
    gaps = zip([0, *ends.tolist()], [*starts.tolist(), file.stat().st_size], strict=True)
    with file.open("rb", buffering=2**20) as handle:
        found = []
        for start, end in gaps:
            handle.seek(start)
            found.append(handle.read(end - start).removeprefix(b"\xef\xbb\xbf").strip())
    return found == [b"[", *[b","] * (len(starts) - 1), b"]"] if len(starts) else found == [b"[]"]
