"""Hugging Face `datasets`: a folder of `save_to_disk`, Parquet or Arrow files in a folder, or a dataset on the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.annotations import existing_folder
from vlm.data.conversations import RecordReader, caption_messages, turns_record
from vlm.data.image_names import open_image, stored_image
from vlm.data.images import BadImage, decode_image
from vlm.data.record_keys import PAIR_KEYS, Malformed, as_text, has_pair
from vlm.data.split import check_split, content_key, digest, group_keys, of_split
from vlm.quote import named, quoted
from vlm.ranges import Name, RatioBelowOne
from vlm.schema import BadSample, Sample, Source, Split, StoredImage, hashed

BATCH = 256  # table rows that are read together


class HuggingFace(Source):
    """One sample per table row.

    Exactly one of `path` and `name` is given. `path` is a folder of `save_to_disk`, or of .parquet or .arrow files,
    which `datasets` copies into its cache. `name` is a dataset on the hub; only then is the network used.

    Columns:

    - `image_column` holds an image or a list of images.
    - `text_column` holds the caption. Each caption of a list is a sample of train; the first one is the sample of val,
      with all of them as references. A class label is replaced by its name.
    - `messages_column`, if given, holds conversations in place of captions: chat messages, LLaVA's or the_cauldron's
      turns. A column `system` holds their system texts.
    - A table without `text_column` may have columns such as `question` and `answer` (see `RecordReader`).

    With `val_split`, the two splits are `train_split` and `val_split`. Without it, `val_fraction` of `train_split` is
    held out. Table rows with the same image (the same bytes) then stay in one split, or with `group_column` those with
    the same value there, such as a patient's id. Table rows without an image are split by their number.
    """

    def __init__(
        self,
        *,
        split: Split,
        path: Name | Path | None = None,
        name: Name | None = None,
        config: Name | None = None,
        train_split: Name = "train",
        val_split: Name | None = None,
        val_fraction: RatioBelowOne = 0.05,
        image_column: Name = "image",
        text_column: Name = "text",
        messages_column: Name | None = None,
        group_column: Name | None = None,
        prompt: str = "Describe the image.",
        role_map: Mapping[str, str] | None = None,
        image_first: bool = False,
    ) -> None:
        check_split(split=split, val_fraction=val_fraction)
        self.reader = RecordReader(role_map=role_map, image_first=image_first)
        if (path is None) == (name is None):
            raise ValueError(
                f"data.path={path} and data.name={name}, but exactly one must be given; set data.path= to a folder or "
                "data.name= to a dataset on the hub"
            )
        holds = "the dataset, or data.name= to a dataset on the hub"
        self.root = existing_folder(path, option="path", holds=holds) if path is not None else Path.cwd()
        self.image_column, self.prompt = image_column, prompt
        self.text_column, self.is_messages = messages_column or text_column, messages_column is not None
        self.split_name = val_split if split == "val" and val_split is not None else train_split
        self._table = _load(self.root if name is None else name, config, split=self.split_name)
        names = self._table.column_names
        self._is_conversation = self.is_messages
        self._texts = [self.text_column, *(["system"] if self.is_messages and "system" in names else [])]
        if not self.is_messages and text_column not in names and has_pair(names):
            self._is_conversation, self._texts = True, [name for name in (*PAIR_KEYS, "system") if name in names]
        for column in filter(None, (image_column, *self._texts, group_column)):
            if column not in self._table.column_names:
                raise ValueError(
                    f"the table has no column '{column}', only {named(names, at_most=20)}; set "
                    "data.image_column=, data.text_column= or data.messages_column="
                )
        # Arrow tables return the stored bytes of an image; `datasets` itself would decode them without any limit.
        self._table = self._table.select_columns(
            list(dict.fromkeys([image_column, *self._texts, *filter(None, [group_column])]))
        )
        self._labels = getattr(self._table.features[self._texts[0]], "names", None)  # of a column of class labels
        self._table = self._table.with_format("arrow")
        num = len(self._table)
        self._rows = np.arange(num)
        if val_split is None:
            keys = map(str, self._table.with_format(None)[group_column]) if group_column else self._contents()
            digests = np.fromiter((digest(key) for key in keys), np.uint64, num)
            self._rows = np.flatnonzero(of_split(digests, split=split, val_fraction=val_fraction))
        if not len(self._rows):
            raise ValueError(
                f"none of the {num} rows of '{self.split_name}' falls into {split} with val_fraction {val_fraction}; "
                "set data.val_fraction= to another ratio, or data.val_split= to a separate split"
            )
        self._is_val = split == "val"
        self._captions = np.zeros(len(self._rows), dtype=np.int64)  # the index of a sample's caption in its row
        one_per_caption = not self._is_val and not self._is_conversation
        if one_per_caption and (lengths := _lengths(self._table, self.text_column)) is not None:
            numbers = np.maximum(lengths[self._rows], 1)
            starts = np.repeat(np.cumsum(numbers) - numbers, numbers)
            self._rows, self._captions = np.repeat(self._rows, numbers), np.arange(numbers.sum()) - starts

    def _contents(self) -> list[str]:
        """A key for every table row, the same for rows with a common image."""
        names: list[list[str]] = []
        for first in range(0, len(self._table), BATCH):
            column = self._table[first : first + BATCH].column(self.image_column)
            for row, cell in enumerate(column, start=first):
                names.append([_content(scalar) for scalar in _image_scalars(cell)] or [f"row {row}"])
        return group_keys(names)

    def stored_images(self, indices: Sequence[int] | None = None) -> Iterator[StoredImage]:
        """The images of these samples (None: of all). Those of a table row come once."""
        rows = np.unique(self._rows if indices is None else self._rows[np.asarray(indices, dtype=np.int64)])
        for first in range(0, len(self._table), BATCH):  # slices, which copy nothing
            wanted = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + BATCH)].tolist()
            column = self._table[first : first + BATCH].column(self.image_column) if wanted else ()
            for row in wanted:
                for number, scalar in enumerate(_image_scalars(column[row - first]), start=1):
                    if (stored := _stored(scalar)) is not None:
                        yield self._stored_image(f"{self.split_name}/{row} (image {number})", stored)

    def _stored_image(self, name: str, stored: Any) -> StoredImage:
        if "string" in str(stored.type):
            return stored_image(stored.as_py(), root=self.root)
        buffer = stored.as_buffer()
        return StoredImage(name, partial(int, buffer.size), partial(_part, buffer))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        sample, scalars = self._read(index)
        try:
            images = [self._image(scalar, number) for number, scalar in enumerate(scalars, start=1)]
        except BadSample as error:
            raise BadSample(f"sample '{sample.id}': {error}", error.kind) from error
        return replace(sample, images=images)

    def fingerprint(self) -> str:
        """A hash of all texts and of the indices of this split's table rows."""
        starts = range(0, len(self._table), 10_000)
        parts = (
            self._table[start : start + 10_000].column(column).to_pylist() for column in self._texts for start in starts
        )
        return hashed(self._rows.tobytes(), *parts)

    def outline(self, index: int) -> Sample:
        """The sample without its images, which are not decoded."""
        return self._read(index)[0]

    def _read(self, index: int) -> tuple[Sample, list[Any]]:
        """The sample without its images, and the images as Arrow scalars, whose bytes are not copied."""
        row = int(self._rows[index])
        table = self._table[row : row + 1]
        record = {column: table.column(column)[0].as_py() for column in self._texts}
        scalars = _image_scalars(table.column(self.image_column)[0])
        number = int(self._captions[index])
        name = f"{self.split_name}/{row}" + (f"#{number}" if number else "")
        meta: dict[str, str] = {}
        try:
            if self._is_conversation:
                if self.is_messages:
                    record = {**turns_record(record[self.text_column]), "system": record.get("system")}
                messages, own = self.reader.conversation(record, num_images=len(scalars))
                scalars = scalars or own
            else:
                captions = self._captions_of(record[self.text_column])
                if len(scalars) != 1:
                    raise Malformed(f"has {len(scalars)} images for 1 caption; give it one")
                messages = caption_messages(self.prompt, captions[number])
                if self._is_val and len(captions) > 1:
                    meta["references"] = json.dumps(captions, ensure_ascii=False)
        except Malformed as error:
            raise BadSample(f"sample '{name}' {error}", error.kind) from error
        return Sample(id=name, images=[], messages=messages, meta=meta), scalars

    def _captions_of(self, cell: Any) -> list[str]:
        """The captions in a cell. Raises `Malformed` where one is empty or not text."""
        captions = []
        for value in cell if isinstance(cell, list) else [cell]:
            labels = self._labels or ()
            text = labels[value] if isinstance(value, int) and 0 <= value < len(labels) else as_text(value)
            if text is None or not text.strip():
                found = "" if value is None or isinstance(value, str) else f" but {quoted(value)}"
                says = f"has no text in column '{self.text_column}'{found}; write one or remove the row"
                raise Malformed(says, "empty_text")
            captions.append(text.strip())
        if not captions:
            raise Malformed(
                f"has an empty list in column '{self.text_column}'; write a caption or remove the row", "empty_text"
            )
        return captions

    def _image(self, scalar: Any, number: int) -> Any:
        value = scalar if isinstance(scalar, str) else scalar.as_py()
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, value)
        if isinstance(data, bytes):
            return decode_image(data, name=str(number))
        if isinstance(path, str):
            return open_image(path, root=self.root)
        raise BadImage(f"image {number} is neither bytes nor a path; set data.image_column= to a column of images")


def _content(scalar: Any) -> str:
    """A key of an image by its bytes, else by its path. Nothing is decoded, and little is copied."""
    stored = _stored(scalar)
    if stored is None:
        return "nothing"
    buffer = stored.as_buffer()
    return content_key(buffer.size, partial(_part, buffer))


def _stored(scalar: Any) -> Any:
    """The Arrow scalar of an image's bytes, else of its path, else None."""
    parts = [scalar.get("bytes"), scalar.get("path")] if hasattr(scalar, "keys") else [scalar]
    return next((part for part in parts if hasattr(part, "as_buffer") and part.is_valid), None)


def _part(buffer: Any, start: int, size: int) -> bytes:
    return buffer.slice(start, size).to_pybytes()


def _image_scalars(value: Any) -> list[Any]:
    """The images in a cell of the image column, as Arrow scalars; null counts as no image."""
    if not value.is_valid:
        return []
    is_list = hasattr(value, "values") and not hasattr(value, "keys")
    return [item for item in (value if is_list else [value]) if item.is_valid]


def _lengths(table: Any, column: str) -> Any:
    """The number of items in each cell of a column of lists; None for any other column."""
    import pyarrow as pa
    import pyarrow.compute as pc

    batch = 10_000  # rows, so that a table larger than memory can be read
    chunks = [table[start : start + batch].column(column) for start in range(0, len(table), batch)]
    if not chunks or not (pa.types.is_list(chunks[0].type) or pa.types.is_large_list(chunks[0].type)):
        return None
    return np.concatenate([pc.fill_null(pc.list_value_length(chunk), 0).to_numpy() for chunk in chunks])


def _load(dataset: str | Path, config: str | None, *, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "data=huggingface needs the package datasets, which is not installed; run pip install -e '.[datasets]'"
        ) from error
    try:
        if isinstance(dataset, Path) and any((dataset / f).is_file() for f in ("state.json", "dataset_dict.json")):
            tables: Any = datasets.load_from_disk(str(dataset))
        else:
            tables = datasets.load_dataset(str(dataset), config)
    except Exception as error:  # from pyarrow, the hub's client, or datasets itself
        reason = " ".join(str(error).split())
        raise ValueError(
            f"'{dataset}' cannot be read as a dataset ({reason}); see data.path=, data.name= and data.config="
        ) from error
    if isinstance(tables, datasets.Dataset):
        tables = {"train": tables}
    if split not in tables:
        raise ValueError(
            f"'{dataset}' has no split '{split}', only {', '.join(tables)}; set data.train_split= or "
            "data.val_split= to one of them"
        )
    return tables[split]
