"""Conversations about images: LLaVA's JSON (Liu et al. 2023, arXiv:2304.08485), chat messages, or questions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, UInt64

from vlm.data.annotations import PackedJson, Record, existing_file, existing_folder
from vlm.data.conversations import Conversation, RecordReader
from vlm.data.image_names import is_data_url, open_image, short_name, stored_image
from vlm.data.record_file import RecordFile
from vlm.data.record_keys import Malformed
from vlm.data.split import check_split, digest, group_keys, image_key, of_split
from vlm.ranges import RatioBelowOne
from vlm.schema import BadSample, Sample, Source, Split, StoredImage, hashed

LONGEST_ID = 200  # characters


@runtime_checkable
class Reader(Protocol):
    """Reads the records of a file. It raises `Malformed` for a record that it cannot read."""

    def __hash__(self) -> int:
        """Equal for readers that read alike, because what they read is cached."""

    def images(self, record: Mapping[str, Any]) -> list[str]:
        """The names of the record's images."""

    def conversation(self, record: Mapping[str, Any]) -> Conversation:
        """The messages of the record, and its images in their order."""


class Conversations(Source):
    """One sample per record of a file, a JSON list or JSON lines, with any number of images or none.

    An image is a path or a data URL. `images`, the folder of the paths, may be None where no record has a path.

    With `val_annotations`, each file is one split. Without it, the split is by a hash of the images' names, or of the
    id where there is no image; records with a common image stay in one split.
    """

    def __init__(
        self,
        *,
        split: Split,
        reader: Reader,
        annotations: str | Path,
        images: str | Path | None,
        val_annotations: str | Path | None,
        val_fraction: float,
    ) -> None:
        check_split(split=split, val_fraction=val_fraction)
        self.reader = reader
        self.images = existing_folder(images, option="images") if images is not None else None
        if split == "val" and val_annotations is not None:
            file = existing_file(val_annotations, option="val_annotations")
        else:
            file = existing_file(annotations, option="annotations")
        status = file.stat()
        root = self.images.absolute() if self.images is not None else Path()
        self._records, self._names, digests, num_with_files = _index(
            file, root, self.reader, status.st_mtime_ns, status.st_size
        )
        if images is None and num_with_files:
            raise ValueError(
                f"{num_with_files} of {len(digests)} conversations in '{file}' have images and data.images is null; "
                "set data.images= to the folder that holds them"
            )
        self._indices = np.arange(len(digests))
        if val_annotations is None:
            self._indices = np.flatnonzero(of_split(digests, split=split, val_fraction=val_fraction))
        if not len(self._indices):
            raise ValueError(
                f"none of the {len(digests)} conversations in '{file}' falls into {split} with val_fraction "
                f"{val_fraction}; set data.val_fraction= to another ratio, or data.val_annotations= to a file"
            )

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        sample, names = self._read(index)
        try:
            return replace(sample, images=[open_image(name, root=self.images or Path()) for name in names])
        except BadSample as error:
            raise BadSample(f"sample '{sample.id}': {error}", error.kind) from error

    def fingerprint(self) -> str:
        """A hash of the whole file and of the indices of this split's records."""
        with self._records.file.open("rb") as file:
            of_file = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        return hashed(of_file, self._indices.tobytes())

    def outline(self, index: int) -> Sample:
        """The sample without its images, which are not opened."""
        return self._read(index)[0]

    def has_images(self) -> Bool[np.ndarray, " n"]:
        """Whether each conversation has images."""
        return np.array([bool(self._names[index]) for index in self._indices.tolist()])

    def stored_images(self, indices: Sequence[int] | None = None) -> Iterator[StoredImage]:
        """The image files of these samples (None: of all), each once."""
        chosen = self._indices if indices is None else self._indices[np.asarray(indices, dtype=np.int64)]
        names = {name: None for index in chosen.tolist() for name in self._names[index] or ()}
        return (stored_image(name, root=self.images or Path()) for name in names)

    def _read(self, index: int) -> tuple[Sample, list[str]]:
        record = self._records[int(self._indices[index])]
        name = _id(record)
        if record.problem:
            raise BadSample(f"sample '{name}' {record.problem}")
        try:
            messages, names = self.reader.conversation(record.fields)
        except Malformed as error:
            raise BadSample(f"sample '{name}' {error}", error.kind) from error
        meta = {"image": ", ".join(map(short_name, names))} if names else {}
        return Sample(id=name, images=[], messages=messages, meta=meta), names


class Instruct(Conversations):
    """One sample per conversation. A record is one of these (see `RecordReader`):

    - LLaVA's `{"id", "image": path or list, "conversations": [{"from": human|gpt|system, "value"}]}`
    - chat messages, `{"id", "images": [paths], "messages": [{"role", "content": string or list of pieces}]}`
    - a pair such as `question` and `answer`

    `columns`, `role_map` and `image_first` are those of `RecordReader`, and the others those of `Conversations`.
    """

    def __init__(
        self,
        *,
        split: Split,
        annotations: str | Path,
        images: str | Path | None,
        val_annotations: str | Path | None = None,
        val_fraction: RatioBelowOne = 0.05,
        columns: Mapping[str, str | None] | None = None,
        role_map: Mapping[str, str] | None = None,
        image_first: bool = False,
    ) -> None:
        super().__init__(
            split=split,
            reader=RecordReader(columns=columns, role_map=role_map, image_first=image_first),
            annotations=annotations,
            images=images,
            val_annotations=val_annotations,
            val_fraction=val_fraction,
        )


@lru_cache(maxsize=2)  # train and val read a file only once
def _index(
    file: Path, root: Path, reader: Reader, changed: int, size: int
) -> tuple[RecordFile, PackedJson, UInt64[np.ndarray, " n"], int]:
    """The records of a file, the images (None if malformed) and the hash of each, and the number with image files.

    The hash decides the split of a record. `changed` and `size` of the file are part of the key of the cache.
    """
    names: list[tuple[str, ...]] = []  # tuples, because the garbage collector stops tracking them
    images: list[list[str] | None] = []
    num_with_files = 0

    def visit(record: Record) -> None:
        nonlocal num_with_files
        try:
            paths = reader.images(record.fields)
        except Malformed:  # raised again when the sample is read
            images.append(None)
            names.append((f"id:{_id(record)}",))
            return
        short = [short_name(path) for path in paths]
        images.append(short)
        if short:
            num_with_files += not all(map(is_data_url, paths))
            names.append(tuple([image_key(name, root=root) for name in short]))
        else:
            names.append((f"id:{_id(record)}",))

    records = RecordFile(file, visit)
    if not len(records):
        raise ValueError(f"'{file}' holds 0 conversations; set data.annotations= to a file with conversations")
    digests = np.fromiter(map(digest, group_keys(names)), dtype=np.uint64, count=len(names))
    return records, PackedJson(images), digests, num_with_files


def _id(record: Record) -> str:
    """The record's own id if it is a number or a short string, else its position in the file."""
    given = record.fields.get("id")
    is_name = isinstance(given, str | int) and 0 < len(str(given)) <= LONGEST_ID
    return str(given) if is_name else record.location
