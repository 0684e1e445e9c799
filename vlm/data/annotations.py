"""Annotation files -> records with their position in the file; a compact store of JSON values."""

from __future__ import annotations

import codecs
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm.data.paths import likely_path, why_not_a_path
from vlm.file_kinds import HEAD, kind_of
from vlm.quote import quoted
from vlm.schema import hashed


class Record(NamedTuple):
    """One record of a file. `problem` says why it cannot be used; it is empty for a good record."""

    location: str  # "file.jsonl:12", or "file.json[3]" in a JSON list
    fields: dict[str, Any]
    problem: str = ""


class PackedJson:
    """JSON values in one block of bytes.

    A list of a million dictionaries takes gigabytes, and as much again in every worker process, because reference
    counts are written to memory that the processes would otherwise share.
    """

    def __init__(self, values: Iterable[Any]) -> None:
        buffer = bytearray()
        self._ends = array("Q", [0])
        for value in values:
            buffer += json.dumps(value).encode()
            self._ends.append(len(buffer))
        self._buffer = bytes(buffer)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def fingerprint(self) -> str:
        """A hash of all values in order."""
        return hashed(self._buffer, *self._ends[-1:])

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]
        return json.loads(self._buffer[self._ends[index] : self._ends[index + 1]])


def existing_file(path: str | Path, *, option: str) -> Path:
    """The path as a file that exists and is not empty. Raises `ValueError` with the option to set."""
    file = Path(path).expanduser()
    remedy = f"set data.{option}= to the annotation file"
    if not file.is_file():
        if file.exists():
            raise ValueError(f"'{file}' is {'a folder' if file.is_dir() else 'not a regular file'}; {remedy}")
        raise ValueError(f"there is no file '{file}'{_hint(str(path))}; {remedy}")
    with file.open("rb") as opened:
        if kind := kind_of(opened.read(HEAD)):
            raise ValueError(f"'{file}' {kind}")
    if file.stat().st_size < 4096 and not file.read_bytes().removeprefix(codecs.BOM_UTF8).strip():
        raise ValueError(f"'{file}' is an empty file; {remedy}")
    return file


def existing_folder(path: str | Path, *, option: str, holds: str = "the images") -> Path:
    """The path as a folder that exists. Raises `ValueError` with the option to set."""
    folder = Path(path).expanduser()
    remedy = f"set data.{option}= to the folder that holds {holds}"
    if not folder.is_dir():
        if folder.is_file():
            raise ValueError(f"'{folder}' is a file; {remedy}")
        raise ValueError(f"there is no folder '{folder}'{_hint(str(path))}; {remedy}")
    return folder


def check_suffix(file: Path, suffixes: Sequence[str]) -> None:
    """Raise `ValueError` unless the file's name ends in one of `suffixes`, in lower or upper case."""
    if file.suffix.lower() not in suffixes:
        unpack = " unpack it first, and" if file.suffix.lower() in (".gz", ".zip", ".xz", ".bz2", ".zst") else ""
        given = f"ends in '{file.suffix}'" if file.suffix else "has no ending"
        raise ValueError(f"'{file}' {given};{unpack} give a {', '.join(suffixes[:-1])} or {suffixes[-1]} file")


def _hint(path: str) -> str:
    """The reason why an option's path does not exist, in parentheses; empty where it is unknown."""
    if cause := why_not_a_path(path):
        return f" ({quoted(path)} {cause})"
    found = likely_path(path, root=Path.cwd())
    return f" (it {found[1]}; '{found[0]}' exists)" if found else ""


def read_json(file: Path) -> dict[str, Any] | list[Record]:
    """A `.json` file: its one object, or the records of its list. JSON lines in such a file are read too.

    Raises `ValueError` with file and line where the text is not JSON.
    """
    text = text_of(file)
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and _is_json(text.split("\n", 1)[0]):
            return list(read_jsonl(file))
        raise not_json(file, error.lineno, error) from error
    except (RecursionError, ValueError) as error:  # lists nested too deep, a number of thousands of digits
        raise ValueError(f"'{file}' is JSON that cannot be read ({error}); simplify it") from error
    if isinstance(document, dict):
        return document
    if not isinstance(document, list):
        raise ValueError(f"'{file}' holds {_kind(document)}; give a list of samples or an object that holds them")
    return [to_record(f"{file.name}[{index}]", record) for index, record in enumerate(document)]


def read_jsonl(file: Path) -> Iterator[Record]:
    """One record per line; empty lines are skipped. Raises `ValueError` with file and line where one is not JSON."""
    for number, line in enumerate(text_of(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise not_json(file, number, error) from error
        except (RecursionError, ValueError) as error:
            raise ValueError(f"'{file}' line {number} is JSON that cannot be read ({error}); simplify it") from error
        yield to_record(f"{file.name}:{number}", record)


def to_record(location: str, value: Any) -> Record:
    """A JSON value as a record, with a problem unless it is an object."""
    if isinstance(value, dict):
        return Record(location, value)
    return Record(location, {}, f"is {_kind(value)} where an object is needed; write it as {{...}}")


def not_json(file: Path, line: int, error: Exception) -> ValueError:
    """The error for a line that is not JSON or not UTF-8."""
    if isinstance(error, UnicodeDecodeError):
        return ValueError(f"'{file}' line {line} is not UTF-8 ({error.reason}); save the file as UTF-8")
    return ValueError(f"'{file}' line {line} is not JSON ({getattr(error, 'msg', error)}); correct that line")


def text_of(file: Path) -> str:
    """The text of a UTF-8 file. Raises `ValueError` with the first line that is not UTF-8."""
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise not_json(file, line, error) from error


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (RecursionError, ValueError):
        return False
    return True


def _kind(value: Any) -> str:
    names = {list: "a list", dict: "an object", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
