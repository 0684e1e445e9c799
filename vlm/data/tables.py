"""Tables in text files to records: separated by commas, semicolons, tabs or bars, with a header or as Flickr30k's."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path

from vlm.data.annotations import Record
from vlm.quote import named

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
# Flickr8k.token.txt and Flickr30k's results.token: `1000092795.jpg#0<tab>Two men ...`, without a header.
_NUMBERED = re.compile(r"(.+\.(?:jpe?g|png|webp|gif|bmp|tiff?))(?:#\d+)?", re.IGNORECASE)


def read_table(
    file: Path, text: str, *, names: Sequence[Sequence[str]], columns: Mapping[str, str | None]
) -> Iterator[Record]:
    """The records of a table under its header, which has a column of each kind in `names`.

    The separator is the one with which it has; `columns` renames columns. Without a header, a table of two columns
    separated by tabs is of images, perhaps numbered (`a.jpg#0`), and captions. Quotes are CSV's, except that between
    tabs or bars, where many a file has quotes in its texts, only those around a whole field are.
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
        f"{','.join(kind[0] for kind in names)} there, or name its columns by data.columns="
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
            place, line = f"{file.name}:{line}", reader.line_num + 1
            if number < skip or not values:
                continue
            if not is_csv:
                values = [_unquoted(value.strip()) for value in values]
            if not skip and (match := _NUMBERED.fullmatch(values[0])):
                values[0] = match[1]
            problem = ""
            if len(values) != len(header):
                problem = (
                    f"has {len(values)} fields under a header of {len(header)}; put quotes around a caption with "
                    f"{SEPARATORS[separator]}"
                    if is_csv
                    else f"has {len(values)} fields where there should be {len(header)}, separated by "
                    f"{SEPARATORS[separator]}; correct that line"
                )
            yield Record(place, dict(zip(header, values, strict=False)), problem)
    except csv.Error as error:
        raise ValueError(f"'{file}' line {line} is not CSV ({error}); correct that line") from error


def _unquoted(value: str) -> str:
    """A field without the quotes around it, as pandas writes them where a text has some."""
    is_quoted = len(value) > 1 and value[0] == value[-1] == '"' and '"' not in value[1:-1].replace('""', "")
    return value[1:-1].replace('""', '"') if is_quoted else value
