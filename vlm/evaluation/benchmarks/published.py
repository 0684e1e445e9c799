"""A benchmark from published files in a local folder: finds them, reads their records, and opens the images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from vlm.data.annotations import Record, existing_file, existing_folder, read_json
from vlm.data.image_names import open_image
from vlm.data.record_keys import as_text
from vlm.evaluation.benchmarks.base import Benchmark
from vlm.quote import named, quoted


class Published(Benchmark):
    """Questions of published files; the names of their images are relative to the folder `images`.

    A record that does not have the published form ends in a ValueError with its position: figures of a part of a
    benchmark could not be compared with published ones.
    """

    def __init__(self, *, images: str, option: str = "images") -> None:
        self._images = self._folder(images, option=option)

    def image(self, name: str) -> Image.Image:
        return open_image(name, root=self._images)

    def _file(self, path: str | Path, *, option: str) -> Path:
        """A file that exists. Raises ValueError with the option to set, and with where to get the file."""
        with self._says_where():
            return existing_file(path, option=option)

    def _folder(self, path: str | Path, *, option: str, holds: str = "the images") -> Path:
        """As `_file`, for a folder."""
        with self._says_where():
            return existing_folder(path, option=option, holds=holds)

    @contextmanager
    def _says_where(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{error}; {self.source} has it") from error


def document_of(file: Path) -> dict[str, Any]:
    """The JSON object that a file holds. Raises ValueError for a list."""
    document = read_json(file)
    if isinstance(document, list):
        raise ValueError(f"'{file}' holds a list where an object is published; check which file it is")
    return document


def records_of(file: Path, document: Any) -> list[Record]:
    """A list in a file, as its records."""
    if not isinstance(document, list):
        raise ValueError(f"'{file}' has no list of records but {quoted(document)}; check which file it is")
    return [
        each if isinstance(each, Record) else Record(f"{file.name}[{number}]", each if isinstance(each, dict) else {})
        for number, each in enumerate(document)
    ]


def text_in(record: Mapping[str, Any], key: str, *, where: str) -> str:
    """A text, or a number as text, that a record must have. Raises ValueError with its position."""
    text = as_text(record.get(key))
    if text is None or not text.strip():
        found = f"has {quoted(record[key])} as '{key}'" if key in record else f"has no '{key}' but {named(record)}"
        raise ValueError(f"{where} {found}; check that the file is the published one")
    return text.strip()
