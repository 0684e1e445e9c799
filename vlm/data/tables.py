"""Tables in text files -> records. Fields are separated by commas, semicolons, tabs or bars."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path

from vlm.data.annotations import Record
from vlm.quote import named

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
# The first field in Flickr8k.token.txt and in Flickr30k's results.token: `1000092795.jpg#0<tab>Two men ...`.
_NUMBERED = re.compile(r"(.+\.(?:jpe?g|png|webp|gif|bmp|tiff?))(?:#\d+)?", re.IGNORECASE)


def read_table(
    file: Path, text: str, *, names: Sequence[Sequence[str]], columns: Mapping[str, str | None]
) -> Iterator[Record]:
    """The records of a table.

    The header must have a column of each kind; `names` lists the names of each kind, and `columns` renames columns. The
    separator is the first one in `SEPARATORS` with which the header has these columns. A table without a header must
    have two columns separated by a tab: the image, which may be numbered (`a.jpg#0`), and the caption.

    Commas and semicolons follow CSV's rules for quotes. Tabs and bars do not, because their texts often contain quotes:
    there, only quotes around a whole field are removed.

    Raises `ValueError` where no header is found, or a quote is not closed.
    """
    first = text.lstrip("\ufeff\r\n").split("\n", 1)[0].rstrip("\r")
    for separator in SEPARATORS:
        header = [columns.get(name, name) or "" for name in _fields(first, separator)]
        if all(any(name in header for name in kind) for kind in names):
            return _records(file, text, separator, header)
    fields = _fields(first, "\t")
    if len(fields) == len(names) == 2 and _NUMBERED.fullmatch(fields[0]):
        return _records(file, text, "\t", [kind[0] for kind in names], skip=0)
    header = max((_fields(first, separator) for separator in SEPARATORS), key=len)
    missing = next(kind[0] for kind in names if not any(name in header for name in kind))
    raise ValueError(
        f"'{file}' has no column '{missing}' in its first line ({named(header)}); write "
        f"{','.join(kind[0] for kind in names)} there, or rename its columns with data.columns="
    )


def _fields(line: str, separator: str) -> list[str]:
    return [field.strip().strip('"') for field in line.split(separator)]


def _records(file: Path, text: str, separator: str, header: Sequence[str], skip: int = 1) -> Iterator[Record]:
    is_csv = separator in ",;"
    reader = csv.reader(
        StringIO(text, newline=""),
        delimiter=separator,
        quoting=csv.QUOTE_MINIMAL if is_csv else csv.QUOTE_NONE,
        skipinitialspace=True,
        strict=is_csv,
    )
    line = 1
    try:
        for number, values in enumerate(reader):
            location, line = f"{file.name}:{line}", reader.line_num + 1
            if number < skip or not values:
                continue
            if not is_csv:
                values = [_unquoted(value.strip()) for value in values]
            if not skip and (match := _NUMBERED.fullmatch(values[0])):
                values[0] = match[1]
            problem = ""
            if len(values) != len(header):
                remedy = f"put quotes around a caption with {SEPARATORS[separator]}" if is_csv else "correct that line"
                problem = (
                    f"has {len(values)} fields separated by {SEPARATORS[separator]}, but the table has {len(header)} "
                    f"columns; {remedy}"
                )
            yield Record(location, dict(zip(header, values, strict=False)), problem)
    except csv.Error as error:
        raise ValueError(f"'{file}' line {line} is not CSV ({error}); correct that line") from error


def _unquoted(value: str) -> str:
    """A field without the quotes around it, which pandas writes where a text contains quotes."""
    is_quoted = len(value) > 1 and value[0] == value[-1] == '"' and '"' not in value[1:-1].replace('""', "")
    return value[1:-1].replace('""', '"') if is_quoted else value
