"""Images with captions: COCO's JSON (Chen et al. 2015, arXiv:1504.00325), Karpathy's JSON, or records."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vlm.data.annotations import (
    PackedJson,
    Record,
    check_suffix,
    existing_file,
    existing_folder,
    read_json,
    read_jsonl,
    text_of,
)
from vlm.data.conversations import RecordReader, caption_messages
from vlm.data.image_names import open_image, short_name, stored_image
from vlm.data.record_keys import Malformed, as_text, check_columns, renamed
from vlm.data.split import check_split, digest, image_key, in_split
from vlm.data.tables import read_table
from vlm.quote import named, quoted
from vlm.ranges import RatioBelowOne
from vlm.schema import BadKind, BadSample, Sample, Source, Split, StoredImage, hashed

# Keys for an image and for its caption. The first of each is this project's own.
IMAGE_KEYS = (
    "image",
    "file_name",
    "filename",
    "image_name",
    "image_path",
    "img_path",
    "img",
    "file",
    "filepath",
    "path",
)
CAPTION_KEYS = ("caption", "captions", "text", "comment", "sentence", "sentences", "description")
LINES = (".jsonl", ".ndjson")
TABLES = (".csv", ".tsv", ".txt", ".token")
LONGEST_ID = 200  # characters
# restval: 30,000 of COCO's validation images, which are used for training.
KARPATHY = {"train": "train", "restval": "train", "val": "val", "test": "test"}


class Caption(NamedTuple):
    """A caption of an image, or a problem with it and the kind of that problem."""

    id: str
    image: str
    text: str
    problem: str = ""
    kind: BadKind = "other_defect"


class CaptionedImages(Source):
    """One sample per caption in train, and one per image in val.

    `prompt` is the question, or several: each caption gets one by a hash of its id. A validation sample has the image's
    first caption, and all its captions in `meta["references"]`, a JSON list. The split is by a hash of the image's
    name, so that no image is in both splits. If `val_fraction` is None, all images belong to this split. The captions
    of an image are consecutive.

    Raises `ValueError` for an empty list of prompts.
    """

    def __init__(
        self,
        captions: list[Caption],
        *,
        split: Split,
        images: Path,
        where: Path,
        val_fraction: float | None,
        prompt: str | Sequence[str],
    ) -> None:
        self.images, self.prompt = images, prompt
        if not isinstance(prompt, str) and not prompt:
            raise ValueError('data.prompt=[] has no prompt; write at least one, or data.prompt="" for none')
        by_image: dict[str, list[Caption]] = {}
        for caption in captions:
            key = image_key(short_name(caption.image), root=images.absolute()) if caption.image else caption.id
            by_image.setdefault(key, []).append(caption)
        groups = [
            group
            for key, group in by_image.items()
            if val_fraction is None or in_split(key, split=split, val_fraction=val_fraction)
        ]
        if not groups:
            raise ValueError(
                f"none of the {len(by_image)} images in '{where}' falls into {split} with val_fraction {val_fraction}; "
                "set data.val_fraction= to another ratio, or give a separate validation set"
            )
        chosen = [[caption] for group in groups for caption in group] if split == "train" else groups
        self._with_references = split == "val"
        self._records = PackedJson([[c if c.problem else c[:3] for c in captions] for captions in chosen])

    def __len__(self) -> int:
        return len(self._records)

    def fingerprint(self) -> str:
        """A hash of all captions and the names of their images."""
        return hashed(self.prompt, self._records.fingerprint())

    def __getitem__(self, index: int) -> Sample:
        sample, image = self._read(index)
        try:
            return replace(sample, images=[open_image(image, root=self.images)])
        except BadSample as error:
            raise BadSample(f"sample '{sample.id}': {error}", error.kind) from error

    def outline(self, index: int) -> Sample:
        """The sample without its image, which is not opened."""
        return self._read(index)[0]

    def stored_images(self, indices: Sequence[int] | None = None) -> Iterator[StoredImage]:
        """The image files of these samples (None: of all), each once."""
        chosen = range(len(self)) if indices is None else indices
        names = {short_name(Caption(*self._records[index][0]).image): None for index in chosen}
        return (stored_image(name, root=self.images) for name in names if name)

    def _read(self, index: int) -> tuple[Sample, str]:
        """The sample without its image, and the image's name."""
        captions = [Caption(*values) for values in self._records[index]]
        for caption in captions:
            if caption.problem:
                raise BadSample(f"sample '{caption.id}' {caption.problem}", caption.kind)
        first = captions[0]
        meta = {"image": short_name(first.image)}
        if self._with_references:
            meta["references"] = json.dumps([caption.text for caption in captions], ensure_ascii=False)
        messages = caption_messages(self._prompt_of(first.id), first.text)
        return Sample(id=first.id, images=[], messages=messages, meta=meta), first.image

    def _prompt_of(self, name: str) -> str:
        return self.prompt if isinstance(self.prompt, str) else self.prompt[digest(name) % len(self.prompt)]


class Captions(CaptionedImages):
    """A file of captions, in one of these forms:

    - COCO's JSON
    - Karpathy's JSON (Karpathy and Fei-Fei 2015, arXiv:1412.2306), with its own splits
    - LLaVA's conversations of one question and one answer; the answer is the caption
    - records of an image and its caption or list of captions, as JSON, JSON lines, or a table (see `read_table`)

    Without `val_annotations`, some images are held out for validation by their name; with it, each file is one split.
    `columns` renames keys and columns: theirs -> image or caption, or -> None for a key to ignore.

    `left_out` counts images without a caption, and those of Karpathy's test split. Raises `ValueError` where images of
    COCO share an id.
    """

    def __init__(
        self,
        *,
        split: Split,
        annotations: str | Path,
        images: str | Path,
        val_annotations: str | Path | None = None,
        val_fraction: RatioBelowOne = 0.05,
        prompt: str | list[str] = "Describe the image.",
        columns: Mapping[str, str | None] | None = None,
    ) -> None:
        check_split(split=split, val_fraction=val_fraction)
        check_columns(columns, known=("image", "caption"))
        root = existing_folder(images, option="images")
        if split == "val" and val_annotations is not None:
            file = existing_file(val_annotations, option="val_annotations")
        else:
            file = existing_file(annotations, option="annotations")
        captions, self.left_out, is_split = read_captions(file, split, columns or {})
        if not captions:
            whose = f" of the split {split}" if is_split else ""
            raise ValueError(f"'{file}' holds 0 captions{whose}; set data.annotations= to a file with captions")
        fraction = val_fraction if val_annotations is None and not is_split else None
        super().__init__(captions, split=split, images=root, where=file, val_fraction=fraction, prompt=prompt)


def read_captions(
    file: Path, split: Split | Literal["test"], columns: Mapping[str, str | None]
) -> tuple[list[Caption], dict[str, int], bool]:
    """The file's captions, the counts for `left_out`, and whether the file itself defines the splits.

    `split` counts only where it does.
    """
    check_suffix(file, (".json", *LINES, *TABLES))
    suffix, left_out = file.suffix.lower(), {"images without a caption": 0}
    if suffix in TABLES and (text := text_of(file)).lstrip()[:1] not in ("{", "["):
        records = read_table(file, text, names=(IMAGE_KEYS, CAPTION_KEYS), columns=columns)
        return [caption for record in records for caption in _of_record(record, {})], left_out, False
    document = list(read_jsonl(file)) if suffix in LINES else read_json(file)
    if isinstance(document, list):
        return [caption for record in document for caption in _of_record(record, columns)], left_out, False
    entries = document.get("images")
    if isinstance(entries, list) and any(isinstance(entry, dict) and "sentences" in entry for entry in entries):
        splits = [KARPATHY.get(str(entry.get("split"))) if isinstance(entry, dict) else split for entry in entries]
        left_out["images of the test split"] = sum(each not in ("train", "val") for each in splits)
        mine = [index for index, its_split in enumerate(splits) if its_split == split]
        return [caption for index in mine for caption in _of_karpathy(file, index, entries[index])], left_out, True
    for name in ("images", "annotations"):
        if not isinstance(document.get(name), list):
            raise ValueError(
                f"'{file}' has no list '{name}' but {named(document)}; give COCO captions, or a list of objects with "
                "image and caption"
            )
    captioned = {str(entry.get("image_id")) for entry in document["annotations"] if isinstance(entry, dict)}
    num_without = sum(isinstance(entry, dict) and str(entry.get("id")) not in captioned for entry in document["images"])
    return list(_of_coco(document, file)), {"images without a caption": num_without}, False


def _of_record(record: Record, columns: Mapping[str, str | None]) -> Iterator[Caption]:
    """The captions of one record: a string, a list of strings, or the answer of a conversation of two turns."""
    try:
        fields = renamed(record.fields, columns)
        if not record.problem and ("conversations" in fields or "messages" in fields):
            yield _of_conversation(record.location, fields)
            return
        image_key, caption_key = _key(fields, IMAGE_KEYS), _key(fields, CAPTION_KEYS)
    except Malformed as error:
        yield Caption(record.location, "", "", str(error), error.kind)
        return
    image, problem = _image_name(fields, image_key, record.problem)
    yield from _of_texts(record.location, image, fields.get(caption_key), problem)


def _of_texts(location: str, image: str, texts: Any, problem: str = "") -> Iterator[Caption]:
    texts = texts if isinstance(texts, list) else [texts]
    if not texts:
        yield _empty(location, image, problem, "has 0 captions; write one or remove the sample")
    for number, text in enumerate(texts):
        yield caption_of(f"{location}#{number}" if number else location, image, text, problem)


def _of_conversation(location: str, record: Mapping[str, Any]) -> Caption:
    """The answer as the caption, as in LLaVA's file for its first stage."""
    messages, images = RecordReader().conversation(record)
    if len(messages) != 2 or len(images) != 1:
        raise Malformed(
            f"has {len(messages)} turns and {len(images)} images where a caption needs 2 turns (a question and its "
            "answer) and 1 image; read the file with data=instruct"
        )
    return caption_of(location, images[0], "".join(piece["text"] for piece in messages[1]["content"]))


def _of_karpathy(file: Path, index: int, entry: Any) -> Iterator[Caption]:
    location = f"{file.name}[images][{index}]"
    if not isinstance(entry, dict):
        yield Caption(location, "", "", "is not an object; write it as {...}")
        return
    image, problem = _image_name(entry, "filename", "")
    folder = entry.get("filepath")
    image = f"{folder}/{image}" if image and isinstance(folder, str) and folder else image
    sentences = entry.get("sentences")
    texts = [each.get("raw") if isinstance(each, dict) else each for each in sentences or []]
    yield from _of_texts(location, image, texts, problem)


def _of_coco(document: dict[str, Any], file: Path) -> Iterator[Caption]:
    entries: dict[str, dict[str, Any]] = {}
    for entry in document["images"]:
        if isinstance(entry, dict) and "id" in entry:
            other = entries.setdefault(str(entry["id"]), entry)
            if other.get("file_name") != entry.get("file_name"):
                raise ValueError(
                    f"'{file}' has two images of id {quoted(entry['id'])}, {quoted(other.get('file_name'))} and "
                    f"{quoted(entry.get('file_name'))}, so a caption may belong to either; give each its own id "
                    "(renumber the images of merged files)"
                )
    names: set[str] = set()
    for index, annotation in enumerate(document["annotations"]):
        location = f"{file.name}[annotations][{index}]"
        if not isinstance(annotation, dict):
            yield Caption(location, "", "", "is not an object; write it as {...}")
            continue
        given = as_text(annotation.get("id"))
        name = given if given and len(given) <= LONGEST_ID and given not in names else location
        names.add(name)
        wanted = str(annotation.get("image_id"))
        if wanted not in entries:
            yield Caption(name, "", "", f"names image_id {quoted(wanted)}, which is not in 'images'; add that image")
            continue
        image, problem = _image_name(entries[wanted], "file_name", "")
        yield from _of_texts(name, image, annotation.get("caption"), problem)


def _key(record: Mapping[str, Any], names: Sequence[str]) -> str:
    """The key among `names` that the record uses; the first one, which is ours, if the record has it."""
    if names[0] in record:
        return names[0]
    given = [name for name in names if record.get(name) not in (None, "", [])]
    if len(given) > 1:
        raise Malformed(
            f"has no '{names[0]}' but both '{given[0]}' and '{given[1]}'; choose one, for example with "
            f"data.columns={{{given[0]}: {names[0]}}}"
        )
    return given[0] if given else names[0]


def _image_name(record: Mapping[str, Any], key: str, problem: str) -> tuple[str, str]:
    name = record.get(key)
    if isinstance(name, list) and len(name) == 1:
        name = name[0]
    if isinstance(name, str) and name:
        return name, problem
    found = "" if name in (None, "") else f" but {quoted(name)}"
    return "", problem or f"has no image name under '{key}'{found}; write the file's path there"


def caption_of(name: str, image: str, value: Any, problem: str = "") -> Caption:
    """A caption; one without text has a problem."""
    text = (as_text(value) or "").strip()
    if text:
        return Caption(name, image, text, problem)
    found = "" if value is None or isinstance(value, str) else f" but {quoted(value)}"
    return _empty(name, image, problem, f"has no text as its caption{found}; write one or remove the sample")


def _empty(name: str, image: str, problem: str, says: str) -> Caption:
    return Caption(name, image, "", problem) if problem else Caption(name, image, "", says, "empty_text")
