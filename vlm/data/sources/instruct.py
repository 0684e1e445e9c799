"""Conversations about pictures: LLaVA's JSON (Liu et al. 2023, arXiv:2304.08485), or chat messages as JSONL."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vlm.data.annotations import Records, Row, existing_file, existing_folder, read_json, read_jsonl
from vlm.data.conversations import Malformed, conversation, image_paths
from vlm.data.images import load_image
from vlm.data.split import check_split, group_keys, image_key, in_split
from vlm.schema import BadSample, Sample, Split


class Instruct:
    """One sample per conversation, with any number of images, none included.

    A record is LLaVA's `{"id", "image": path or list, "conversations": [{"from": human|gpt|system, "value"}]}` or
    `{"id", "images": [paths], "messages": [{"role", "content": text or list of {"type": "text"|"image"}}]}`, in a JSON
    list or one per line. Without `val_annotations` the split is by a hash of the images' names (of the id where there
    are none), and conversations that share an image stay together; with it, each file is taken as it is.
    """

    def __init__(
        self,
        *,
        split: Split,
        annotations: str | Path,
        images: str | Path,
        val_annotations: str | Path | None = None,
        val_fraction: float = 0.05,
    ) -> None:
        check_split(split=split, val_fraction=val_fraction)
        self.images = existing_folder(images, option="images")
        if split == "val" and val_annotations is not None:
            file = existing_file(val_annotations, option="val_annotations")
        else:
            file = existing_file(annotations, option="annotations")
        rows = _read(file)
        if not rows:
            raise ValueError(f"'{file}' holds 0 conversations; set data.annotations= to a file that has some")
        kept = [True] * len(rows)
        if val_annotations is None:
            keys = group_keys([_split_names(row, root=self.images.absolute()) for row in rows])
            kept = [in_split(key, split=split, val_fraction=val_fraction) for key in keys]
        if not any(kept):
            raise ValueError(
                f"none of the {len(rows)} conversations in '{file}' falls into {split} with val_fraction "
                f"{val_fraction}; set data.val_fraction= to another share, or data.val_annotations= to a file"
            )
        self._records = Records(
            [_id(row), row.record, row.problem] for row, keep in zip(rows, kept, strict=True) if keep
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        sample, paths = self._read(index)
        try:
            return replace(sample, images=[load_image(path, root=self.images) for path in paths])
        except BadSample as error:
            raise BadSample(f"sample '{sample.id}': {error}") from error

    def outline(self, index: int) -> Sample:
        """The sample without its images, which are not opened."""
        return self._read(index)[0]

    def _read(self, index: int) -> tuple[Sample, list[str]]:
        name, record, problem = self._records[index]
        if problem:
            raise BadSample(f"sample '{name}' {problem}")
        try:
            paths = image_paths(record)
            messages = conversation(record, num_images=len(paths))
        except Malformed as error:
            raise BadSample(f"sample '{name}' {error}") from error
        return Sample(id=name, images=[], messages=messages, meta={"image": ", ".join(paths)} if paths else {}), paths


def _read(file: Path) -> list[Row]:
    if file.suffix == ".jsonl":
        return list(read_jsonl(file))
    if file.suffix != ".json":
        raise ValueError(f"'{file}' ends in '{file.suffix}'; give a .json or .jsonl file")
    document = read_json(file)
    if isinstance(document, dict):
        raise ValueError(f"'{file}' holds one object; give a list of conversations")
    return document


def _id(row: Row) -> str:
    given = row.record.get("id")
    return row.place if given in (None, "") else str(given)


def _split_names(row: Row, *, root: Path) -> list[str]:
    try:
        paths = image_paths(row.record)
    except Malformed:  # a bad sample: it is refused when read, in whichever split
        paths = []
    return [image_key(path, root=root) for path in paths] or [f"id:{_id(row)}"]
