"""A benchmark from published files, or a dataset of the hub, on disk: finds and reads them, and opens the images."""

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
from vlm.evaluation.benchmarks.dataset_table import DatasetTable, is_dataset
from vlm.quote import named, quoted


class Published(Benchmark):
    """Questions of published files, or of a dataset of the hub.

    The names of images are relative to the folder `images`. If that holds a dataset with the columns `id` and `image`,
    `<id>.jpg` is the image of that row. It may be None for a `table` that has the images itself.

    A record that does not have the published form ends in a ValueError with its position: figures of a part of a
    benchmark could not be compared with published ones.
    """

    def __init__(self, *, images: str | None, option: str = "images", table: DatasetTable | None = None) -> None:
        self._table, self._names = table, dict[str, str]()
        if images is None:
            if table is None or "image" not in table.columns:
                raise ValueError(f"data.{option} is not given; set data.{option}= to the folder that holds the images")
            return
        self._images = self._folder(images, option=option)
        self._table = DatasetTable(self._images, split=None) if is_dataset(self._images) else None
        if self._table is not None:
            if "id" not in self._table.columns:
                raise ValueError(
                    f"'{images}' has no column 'id' but {named(self._table.columns)}; leave data.{option} out"
                )
            self._names = {
                f"{fields['id']}.jpg": text_in(fields, "image", where=where)
                for where, fields, _ in self._table.records()
            }

    def image(self, name: str) -> Image.Image:
        if self._table is None:
            return open_image(name, root=self._images)
        return self._table.image(self._names.get(name, name))

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
