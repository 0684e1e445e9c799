"""Tables of Hugging Face `datasets`: on disk, as Parquet or Arrow files in a folder, or from the hub by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.annotations import existing_folder
from vlm.data.conversations import Malformed, RecordReader, caption_messages, turns_record
from vlm.data.fingerprint import hashed
from vlm.data.image_names import open_image
from vlm.data.images import BadImage, decode_image
from vlm.data.split import check_split, digest, held_out
from vlm.ranges import Name, RatioBelowOne
from vlm.schema import BadSample, Sample, Split


class HuggingFace:
    """A sample per row: its caption in `text_column`, or its turns in `messages_column` where that is named.

    `image_column` holds an image or a list of them. Turns are chat messages, LLaVA's, or the_cauldron's. Exactly one of
    `path` (a folder of `save_to_disk`, or of .parquet or .arrow files, which `datasets` copies into its cache) and
    `name` (a dataset on the hub; only then the network is used) is given.

    With `val_split` each split is taken as it is. Without it the split is by a hash of `group_column`, so that rows
    that share its value, such as an image's id, stay together; without that, by a hash of the row's number, each alone.
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
                f"data.path={path} and data.name={name} are {'both' if path else 'neither'} given; set data.path= to a "
                "folder or data.name= to a dataset on the hub"
            )
        self.root = existing_folder(path, option="path") if path is not None else Path.cwd()
        self.image_column, self.prompt = image_column, prompt
        self.text_column, self.is_messages = messages_column or text_column, messages_column is not None
        self.split_name = val_split if split == "val" and val_split is not None else train_split
        self._table = _load(self.root if name is None else name, config, split=self.split_name)
        for column in filter(None, (image_column, self.text_column, group_column)):
            if column not in self._table.column_names:
                raise ValueError(
                    f"the table has no column '{column}', only {', '.join(self._table.column_names)}; set "
                    "data.image_column=, data.text_column= or data.messages_column="
                )
        # Arrow tables give the bytes of a picture as they are stored; `datasets` would decode them, unchecked.
        self._table = self._table.select_columns([image_column, self.text_column, *filter(None, [group_column])])
        self._table = self._table.with_format("arrow")
        num = len(self._table)
        self._rows = np.arange(num)
        if val_split is None:
            keys = map(str, self._table.with_format(None)[group_column]) if group_column else map(str, range(num))
            is_val = held_out(np.fromiter((digest(key) for key in keys), np.uint64, num), val_fraction=val_fraction)
            self._rows = np.flatnonzero(is_val == (split == "val"))
        if not len(self._rows):
            raise ValueError(
                f"none of the {num} rows of '{self.split_name}' falls into {split} with val_fraction {val_fraction}; "
                "set data.val_fraction= to another share, or data.val_split= to a split of its own"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        sample, pictures = self._read(index)
        try:
            images = [self._image(picture, number) for number, picture in enumerate(pictures, start=1)]
        except BadSample as error:
            raise BadSample(f"sample '{sample.id}': {error}", error.kind) from error
        return replace(sample, images=images)

    def fingerprint(self) -> str:
        """A hash of all texts, and of which of the table's rows these are."""
        starts = range(0, len(self._table), 10_000)
        parts = (self._table[start : start + 10_000].column(self.text_column).to_pylist() for start in starts)
        return hashed(self._rows.tobytes(), *parts)

    def outline(self, index: int) -> Sample:
        """The sample without its images, which are not decoded."""
        return self._read(index)[0]

    def _read(self, index: int) -> tuple[Sample, list[Any]]:
        """The sample without its images, and these as Arrow scalars, whose bytes nobody has copied yet."""
        row = int(self._rows[index])
        table = self._table[row : row + 1]
        picture, text = table.column(self.image_column)[0], table.column(self.text_column)[0].as_py()
        pictures = _pictures(picture)
        name = f"{self.split_name}/{row}"
        if self.is_messages:
            try:
                messages, own = self.reader.conversation(turns_record(text), num_images=len(pictures))
                pictures = pictures or own
            except Malformed as error:
                raise BadSample(f"sample '{name}' {error}", error.kind) from error
        elif not isinstance(text, str) or not text.strip():
            says = f"has no text in column '{self.text_column}'; write one or remove the row"
            raise BadSample(f"sample '{name}' {says}", "empty_text")
        elif len(pictures) != 1:
            raise BadSample(f"sample '{name}' has {len(pictures)} images for 1 caption; give it one")
        else:
            messages = caption_messages(self.prompt, text.strip())
        return Sample(id=name, images=[], messages=messages), pictures

    def _image(self, picture: Any, number: int) -> Any:
        value = picture if isinstance(picture, str) else picture.as_py()
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, value)
        if isinstance(data, bytes):
            return decode_image(data, name=str(number))
        if isinstance(path, str):
            return open_image(path, root=self.root)
        raise BadImage(f"image {number} is neither bytes nor a path; set data.image_column= to a column of images")


def _pictures(value: Any) -> list[Any]:
    """A cell of the image column as a list of scalars: null is none."""
    if not value.is_valid:
        return []
    return list(value) if hasattr(value, "values") and not hasattr(value, "keys") else [value]


def _load(place: str | Path, config: str | None, *, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "data=huggingface needs the package datasets, which is not installed; run pip install -e '.[datasets]'"
        ) from error
    try:
        if isinstance(place, Path) and any((place / f).is_file() for f in ("state.json", "dataset_dict.json")):
            tables: Any = datasets.load_from_disk(str(place))
        else:
            tables = datasets.load_dataset(str(place), config)
    except Exception as error:  # of pyarrow, of the hub's client, of datasets itself
        reason = " ".join(str(error).split())
        raise ValueError(
            f"'{place}' cannot be read as a dataset ({reason}); see data.path=, data.name= and data.config="
        ) from error
    if isinstance(tables, datasets.Dataset):
        tables = {"train": tables}
    if split not in tables:
        raise ValueError(
            f"'{place}' has no split '{split}', only {', '.join(tables)}; set data.train_split= or "
            "data.val_split= to one of them"
        )
    return tables[split]
