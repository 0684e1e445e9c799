"""Pictures with captions: COCO's JSON (Chen et al. 2015, arXiv:1504.00325), or JSONL / CSV of `image, caption`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from vlm.data.annotations import Records, Row, existing_file, existing_folder, read_csv, read_json, read_jsonl
from vlm.data.conversations import caption_messages
from vlm.data.fingerprint import hashed
from vlm.data.images import load_image
from vlm.data.split import check_split, image_key, in_split
from vlm.ranges import RatioBelowOne
from vlm.schema import BadKind, BadSample, Sample, Split


class Caption(NamedTuple):
    """What a text says of an image, or the problem with it and its kind."""

    id: str
    image: str
    text: str
    problem: str = ""
    kind: BadKind = "other_defect"


class CaptionedImages:
    """In train a sample per (image, caption); in val a sample per image, its first caption being the reference.

    All captions of a validation image are in `meta["references"]`, a JSON list. The split is by a hash of the image's
    name, so that no image is in both; a `val_fraction` of None takes everything. An image's captions lie next to each
    other, the first one where the image comes first.
    """

    def __init__(
        self,
        captions: list[Caption],
        *,
        split: Split,
        images: Path,
        where: Path,
        val_fraction: float | None,
        prompt: str,
    ) -> None:
        self.images, self.prompt = images, prompt
        by_image: dict[str, list[Caption]] = {}
        for caption in captions:
            key = image_key(caption.image, root=images.absolute()) if caption.image else caption.id
            by_image.setdefault(key, []).append(caption)
        groups = [
            group
            for key, group in by_image.items()
            if val_fraction is None or in_split(key, split=split, val_fraction=val_fraction)
        ]
        if not groups:
            raise ValueError(
                f"none of the {len(by_image)} images in '{where}' falls into {split} with val_fraction {val_fraction}; "
                "set data.val_fraction= to another share, or name a validation set of its own"
            )
        chosen = [[caption] for group in groups for caption in group] if split == "train" else groups
        self._with_references = split == "val"
        self._records = Records([[c if c.problem else c[:3] for c in captions] for captions in chosen])

    def __len__(self) -> int:
        return len(self._records)

    def fingerprint(self) -> str:
        """A hash of all captions and what they are of."""
        return hashed(self.prompt, self._records.fingerprint())

    def __getitem__(self, index: int) -> Sample:
        sample = self.outline(index)
        try:
            return replace(sample, images=[load_image(sample.meta["image"], root=self.images)])
        except BadSample as error:
            raise BadSample(f"sample '{sample.id}': {error}", error.kind) from error

    def outline(self, index: int) -> Sample:
        """The sample without its image, which is not opened."""
        captions = [Caption(*values) for values in self._records[index]]
        for caption in captions:
            if caption.problem:
                raise BadSample(f"sample '{caption.id}' {caption.problem}", caption.kind)
        first = captions[0]
        meta = {"image": first.image}
        if self._with_references:
            meta["references"] = json.dumps([caption.text for caption in captions], ensure_ascii=False)
        return Sample(id=first.id, images=[], messages=caption_messages(self.prompt, first.text), meta=meta)


class Captions(CaptionedImages):
    """A file of captions. Without `val_annotations` images are held out by name; with it, each file is as it is.

    `left_out` counts COCO images that have none.
    """

    def __init__(
        self,
        *,
        split: Split,
        annotations: str | Path,
        images: str | Path,
        val_annotations: str | Path | None = None,
        val_fraction: RatioBelowOne = 0.05,
        prompt: str = "Describe the image.",
    ) -> None:
        check_split(split=split, val_fraction=val_fraction)
        root = existing_folder(images, option="images")
        if split == "val" and val_annotations is not None:
            file = existing_file(val_annotations, option="val_annotations")
        else:
            file = existing_file(annotations, option="annotations")
        captions, num_without = _read(file)
        self.left_out = {"images without a caption": num_without}
        if not captions:
            raise ValueError(f"'{file}' holds 0 captions; set data.annotations= to a file that has some")
        share = val_fraction if val_annotations is None else None
        super().__init__(captions, split=split, images=root, where=file, val_fraction=share, prompt=prompt)


def _read(file: Path) -> tuple[list[Caption], int]:
    """The file's captions, and how many of its images have none."""
    if file.suffix == ".jsonl":
        return [caption for row in read_jsonl(file) for caption in _of_row(row)], 0
    if file.suffix == ".csv":
        return [caption for row in read_csv(file, columns=("image", "caption")) for caption in _of_row(row)], 0
    if file.suffix != ".json":
        raise ValueError(f"'{file}' ends in '{file.suffix}'; give a .json, .jsonl or .csv file")
    document = read_json(file)
    if isinstance(document, list):
        return [caption for row in document for caption in _of_row(row)], 0
    for name in ("images", "annotations"):
        if not isinstance(document.get(name), list):
            raise ValueError(
                f"'{file}' has no list '{name}' beside its {', '.join(map(repr, document)) or 'nothing'}; give COCO "
                "captions, or a list of objects with image and caption"
            )
    captioned = {str(entry.get("image_id")) for entry in document["annotations"] if isinstance(entry, dict)}
    num_without = sum(isinstance(entry, dict) and str(entry.get("id")) not in captioned for entry in document["images"])
    return list(_of_coco(document, file)), num_without


def _of_row(row: Row) -> Iterator[Caption]:
    """The captions of one row: `caption` is a text or a list of them."""
    image, problem = _image_name(row.record, "image", row.problem)
    texts = row.record.get("caption")
    texts = texts if isinstance(texts, list) else [texts]
    if not texts:
        yield _empty(row.place, image, problem, "has 0 captions; write one or remove the sample")
    for number, text in enumerate(texts):
        yield caption_of(f"{row.place}#{number}" if number else row.place, image, text, problem)


def _of_coco(document: dict[str, Any], file: Path) -> Iterator[Caption]:
    entries = {str(entry["id"]): entry for entry in document["images"] if isinstance(entry, dict) and "id" in entry}
    for index, annotation in enumerate(document["annotations"]):
        place = f"{file.name}[annotations][{index}]"
        if not isinstance(annotation, dict):
            yield Caption(place, "", "", "is not an object; write it as {...}")
            continue
        name = str(annotation.get("id", place))
        wanted = str(annotation.get("image_id"))
        if wanted not in entries:
            yield Caption(name, "", "", f"names image_id {wanted}, which is not in 'images'; add that image")
            continue
        image, problem = _image_name(entries[wanted], "file_name", "")
        yield caption_of(name, image, annotation.get("caption"), problem)


def _image_name(record: dict[str, Any], key: str, problem: str) -> tuple[str, str]:
    name = record.get(key)
    if isinstance(name, str) and name:
        return name, problem
    return "", problem or f"has no image name under '{key}'; write the file's path there"


def caption_of(name: str, image: str, text: Any, problem: str = "") -> Caption:
    """A caption, or the problem that it has no text."""
    if isinstance(text, str) and text.strip():
        return Caption(name, image, text.strip(), problem)
    return _empty(name, image, problem, "has no text as its caption; write one or remove the sample")


def _empty(name: str, image: str, problem: str, says: str) -> Caption:
    return Caption(name, image, "", problem) if problem else Caption(name, image, "", says, "empty_text")
