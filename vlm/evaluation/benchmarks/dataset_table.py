"""A dataset of the hub on disk: Parquet files as they are published, or a folder of `datasets` (`save_to_disk`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from vlm.data.annotations import Record
from vlm.data.images import BadImage, decode_image
from vlm.quote import named

# Columns of captions in datasets of the hub: NoCaps, COCO, Flickr30k; and of the id of an image.
CAPTIONS = ("annotations_captions", "answer", "captions", "caption", "text")
IMAGE_IDS = ("file_name", "image_file_name", "filename", "question_id", "image_id", "id")
BATCH = 1024  # rows that are read together


class DatasetTable:
    """The rows of one split.

    A record has the columns of its row, but those of lists of images. In place of an image it has the name by which
    `image` opens it, or None.

    Args:
        path: a Parquet file, or a folder with Parquet files or folders of `save_to_disk` at any depth. The split of a
            file is the start of its name (`test-00000-of-00001.parquet`), that of a folder its name.
        split: may be None where there is only one.
        image_id: a column with the same value in all rows with the same image, which then has the same name in all.

    Raises ValueError for a split that is not there, and for a table that cannot be read.
    """

    def __init__(self, path: Path, *, split: str | None, image_id: str | None = None) -> None:
        self.parts, self._image_id = _parts(path, split), image_id
        self._root = path.parent
        self.columns: Mapping[str, Any] = _schema(self.parts[0])
        for part in self.parts[1:]:
            if (other := _schema(part)).keys() != self.columns.keys():
                raise ValueError(
                    f"'{part}' has the columns {named(other)} and '{self.parts[0]}' {named(self.columns)}; give the "
                    "folder that holds one of them"
                )

    def records(self) -> Iterator[Record]:
        """All rows in order, with their position below the folder that holds the dataset."""
        first: dict[tuple[str, str], str] = {}  # the name of an image by its column and id
        images = [name for name, kind in self.columns.items() if _is_image(kind)]
        for number, part in enumerate(self.parts):
            for row, fields in enumerate(_rows(part, self.columns, images)):
                for column in images:
                    if fields[column] is not None:
                        name, same = f"{number}#{row}#{column}", fields.get(self._image_id or "")
                        fields[column] = name if same is None else first.setdefault((column, str(same)), name)
                yield Record(f"{part.relative_to(self._root)} row {row}", fields)

    def captions(self) -> Iterator[tuple[str, str, list[str]]]:
        """Of each row its id, the name of its image and its captions. Raises ValueError for a row without one."""
        column = next((name for name in CAPTIONS if name in self.columns), None)
        if column is None:
            raise ValueError(f"the dataset has no column of captions ({named(CAPTIONS)}) but {named(self.columns)}")
        key = next((name for name in IMAGE_IDS if name in self.columns), None)
        for where, fields, _ in self.records():
            texts = fields[column] if isinstance(fields[column], list) else [fields[column]]
            found = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
            if not found or fields.get("image") is None:
                raise ValueError(f"{where} has no {'caption' if not found else 'image'}; choose a split that has them")
            yield where if key is None else str(fields[key]), fields["image"], found

    def image(self, name: str) -> Image.Image:
        """The image of a record. Raises BadSample if it cannot be read."""
        part, row, column = name.split("#", 2)
        value = _cell(str(self.parts[int(part)]), int(row), column)
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise BadImage(f"image '{name}' holds no bytes; save the dataset with its images")
        return decode_image(data, name=name)


def is_dataset(path: Path) -> bool:
    """Whether a path is a Parquet file, or a folder that holds what `DatasetTable` reads."""
    if not path.is_dir():
        return path.suffix == ".parquet" and path.is_file()
    return any(next(path.rglob(pattern), None) for pattern in ("*.parquet", "state.json"))


def table_at(path: str, *, split: str | None, image_id: str | None = None) -> DatasetTable | None:
    """The dataset at a path; None for other files. Raises ValueError where these are to have a split."""
    found = Path(path).expanduser()
    if is_dataset(found):
        return DatasetTable(found, split=split, image_id=image_id)
    if split is not None:
        raise ValueError(f"data.split={split} is for a dataset of the hub, and '{path}' is none; leave it out")
    return None


def _parts(path: Path, split: str | None) -> list[Path]:
    """The files or folders of a split."""
    if path.is_file():
        return [path]
    found: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*.parquet")):
        found.setdefault(re.split(r"[-.]", file.name)[0], []).append(file)
    for file in sorted(path.rglob("state.json")):
        found.setdefault(file.parent.name, []).append(file.parent)
    if split is None and len(found) == 1:
        return next(iter(found.values()))
    if split in found:
        return found[split]
    if split is None:
        raise ValueError(f"'{path}' has the splits {named(found)}; set data.split= to one of them")
    there = f"there are {named(found)}" if found else "there is no split"
    raise ValueError(
        f"'{path}' has neither {split}-*.parquet nor a folder '{split}' of datasets, {there}; set data.split=, or give "
        "the folder of the dataset"
    )


def _schema(part: Path) -> dict[str, Any]:
    """The Arrow type of each column."""
    found = _opened(str(part))
    schema = found.schema_arrow if part.suffix == ".parquet" else found.features.arrow_schema
    kinds = dict(zip(schema.names, schema.types, strict=True))
    return {name: kind for name, kind in kinds.items() if _is_image(kind) or "binary" not in str(kind)}


def _is_image(kind: Any) -> bool:
    """Whether cells of this type hold the bytes of an image, as those of `datasets.Image` do."""
    return "binary" in str(kind) and not hasattr(kind, "value_type")


def _rows(part: Path, columns: Mapping[str, Any], images: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows, with True or None in place of an image. Of Parquet files, images with a path are not read."""
    found = _opened(str(part))
    if part.suffix == ".parquet":
        leaves = [f"{name}.path" if name in images and "path" in str(columns[name]) else name for name in columns]
        batches: Iterator[Any] = found.iter_batches(batch_size=BATCH, columns=leaves)
    else:
        batches = (found[start : start + BATCH] for start in range(0, len(found), BATCH))
    for batch in batches:
        is_there = {name: batch.column(name).is_valid().to_pylist() for name in images}
        texts = batch.select([name for name in columns if name not in images])
        for number, fields in enumerate(texts.to_pylist()):
            yield fields | {name: True if there[number] else None for name, there in is_there.items()}


def _cell(part: str, row: int, column: str) -> Any:
    found = _opened(part)
    if not part.endswith(".parquet"):
        return found[row : row + 1].column(column)[0].as_py()
    for group in range(found.num_row_groups):
        num = found.metadata.row_group(group).num_rows
        if row < num:
            return _group(part, group, column).column(column)[row].as_py()
        row -= num
    raise AssertionError(f"'{part}' has no row {row}")


@lru_cache(maxsize=2)  # questions about one image follow each other
def _group(part: str, group: int, column: str) -> Any:
    return _opened(part).read_row_group(group, columns=[column], use_threads=False)


@lru_cache(maxsize=64)
def _opened(part: str) -> Any:
    """A Parquet file, or an Arrow table in mapped memory. Raises ValueError if it cannot be read."""
    try:
        if part.endswith(".parquet"):
            from pyarrow import parquet

            return parquet.ParquetFile(part)
        import datasets

        return datasets.load_from_disk(part).with_format("arrow")
    except ImportError as error:
        raise ValueError(f"'{part}' needs the package datasets; run pip install -e '.[datasets]'") from error
    except (OSError, ValueError) as error:  # pyarrow's errors are of these
        reason = " ".join(str(error).split())
        raise ValueError(f"'{part}' cannot be read as a table ({reason}); download it again") from error
