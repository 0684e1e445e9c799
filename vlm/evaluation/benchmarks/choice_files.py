"""Multiple-choice questions as they are published: ScienceQA, MMBench, MMMU, SEED-Bench, and JSON lines."""

from __future__ import annotations

import ast
import csv
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from vlm.data.annotations import Record, existing_file, existing_folder, read_jsonl, text_of
from vlm.data.image_names import open_image
from vlm.data.images import BadImage
from vlm.data.record_keys import Malformed, as_text, record_images
from vlm.evaluation.benchmarks.dataset_table import DatasetTable
from vlm.evaluation.benchmarks.published import document_of, records_of, text_in
from vlm.evaluation.scorers.letter import LETTERS
from vlm.quote import named, quoted

Layout = Literal["scienceqa", "mmbench", "mmmu", "seed", "jsonl"]
SPLITS = {"scienceqa": "test", "mmmu": "validation"}  # by default
SHOWN = {"scienceqa": "train", "mmmu": "dev"}  # splits of the demonstrations
LONGEST = 100_000  # characters of a list of options
REFERENCE = 64  # characters: a shorter cell under `image` is the index of the row that has the image
ROTATED = 1_000_000  # MMBench's files number the rotations of question i as i + k * 1,000,000
_MMMU_ID = re.compile(r"(?:dev|validation|test)_(.+)_\d+")


@dataclass(frozen=True)
class Item:
    """A question with its options; `answer` is the index of the right one, None if it is not published."""

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int | None
    images: tuple[str, ...] = ()
    type: str | None = None
    hint: str = ""


class Items(NamedTuple):
    """The questions of files, what opens their images, and how many questions are not of a kind that can be asked."""

    items: list[Item]
    open: Callable[[str], Image.Image]
    num_left_out: int = 0


def read_items(path: str, *, layout: Layout, split: str | None, images: str | None) -> Items:
    """The questions of a file or folder. Raises ValueError for a record that does not have the published form."""
    if split is not None and layout not in SPLITS:
        raise ValueError(f"data.split={split} is for {' and '.join(SPLITS)}, and '{path}' is {layout}; leave it out")
    folder = None if images is None else existing_folder(images, option="images")
    if layout in SPLITS:
        root = existing_folder(path, option="path", holds=f"the files of {layout}")
        wanted = split or SPLITS[layout]
        return _science_qa(root, wanted, folder) if layout == "scienceqa" else _mmmu(root, wanted)
    file = existing_file(path, option="path")
    if layout == "mmbench":
        return _mmbench(file)
    if layout == "seed":
        return _seed(file, folder or file.parent / "SEED-Bench-image")
    return Items(list(items_of(read_jsonl(file))), Files(folder or file.parent))


def layout_of(path: str) -> Layout:
    """The layout that the name of a file or the files in a folder tell. Raises ValueError if they do not."""
    if (folder := Path(path).expanduser()).is_dir():
        return "scienceqa" if (folder / "problems.json").is_file() else "mmmu"
    file = existing_file(path, option="path")
    suffixes: dict[str, Layout] = {".tsv": "mmbench", ".json": "seed", ".jsonl": "jsonl", ".ndjson": "jsonl"}
    if file.suffix.lower() not in suffixes:
        raise ValueError(f"the layout of '{file}' is not known by its name; set data.layout=")
    return suffixes[file.suffix.lower()]


@dataclass(frozen=True)
class Files:
    """Opens images by their path in a folder."""

    root: Path

    def __call__(self, name: str) -> Image.Image:
        return open_image(name, root=self.root)


def _science_qa(root: Path, split: str, images: Path | None) -> Items:
    """ScienceQA (Lu et al. 2022, arXiv:2209.09513): problems.json, pid_splits.json, images/<split>/<id>/image.png."""
    problems, splits = (document_of(existing_file(root / name, option="path")) for name in _SCIENCE_QA)
    if not isinstance(splits.get(split), list):
        raise ValueError(f"'{root / _SCIENCE_QA[1]}' has no split '{split}', only {named(splits)}; set data.split=")
    items = []
    for number in splits[split]:
        where = f"problems.json[{number}]"
        record = problems.get(str(number))
        if not isinstance(record, dict):
            raise ValueError(f"{where} is missing, and pid_splits.json names it; check that both are of one version")
        image = record.get("image")
        items.append(
            Item(
                id=str(number),
                question=text_in(record, "question", where=where),
                choices=choices_in(record.get("choices"), where=where),
                answer=answer_in(record.get("answer"), record.get("choices") or (), where=where),
                images=(f"{text_in(record, 'split', where=where)}/{number}/{image}",) if image else (),
                type=as_text(record.get("subject")),
                hint=as_text(record.get("hint")) or "",
            )
        )
    return Items(items, Files(images or root / "images"))


_SCIENCE_QA = ("problems.json", "pid_splits.json")


@dataclass(frozen=True)
class Base64:
    """Opens images that a table holds in base64."""

    data: Mapping[str, str]

    def __call__(self, name: str) -> Image.Image:
        if name not in self.data:
            raise BadImage(f"image '{name}' is not in the table, and a row names it; check that the file is complete")
        return open_image(f"data:image/jpeg;base64,{self.data[name]}", root=Path())


def _mmbench(file: Path) -> Items:
    """MMBench (Liu et al. 2023, arXiv:2307.06281): a table with the images in base64; a question without options C, D
    has two. Of the rotations of a question, which some files list too, only the first row is taken.
    """
    csv.field_size_limit(sys.maxsize)  # an image is one field
    lines = csv.reader(StringIO(text_of(file), newline=""), delimiter="\t")
    try:
        (_, header), *rows = ((lines.line_num, cells) for cells in lines)
    except csv.Error as error:
        raise ValueError(f"'{file}' line {lines.line_num} is not a table ({error}); download it again") from error
    for column in ("index", "question", "A", "B", "image"):
        if column not in header:
            found = named(header)
            raise ValueError(f"'{file}' has no column '{column}' in its first line ({found}); check the file")
    items: dict[str, Item] = {}
    images: dict[str, str] = {}
    for line, cells in rows:
        where = f"'{file.name}' line {line}"
        if len(cells) != len(header):
            raise ValueError(f"{where} has {len(cells)} fields and the first line {len(header)}; check the file")
        row = dict(zip(header, cells, strict=True))
        index, image = text_in(row, "index", where=where), row["image"]
        if len(image) > REFERENCE:
            images[index] = image
        number = str(int(index) % ROTATED) if index.isdecimal() else index
        if number in items:
            continue
        letters = [letter for letter in LETTERS if row.get(letter)]
        if letters != list(LETTERS[: len(letters)]):
            raise ValueError(f"{where} has the options {', '.join(letters)}, some of which are missing; check the file")
        choices = choices_in([row[letter] for letter in letters], where=where)
        items[number] = Item(
            id=number,
            question=text_in(row, "question", where=where),
            choices=choices,
            answer=letter_in(row.get("answer"), choices, where=where),
            images=(index if len(image) > REFERENCE else image,) if image else (),
            type=row.get("category") or None,
            hint=row.get("hint") or "",
        )
    return Items(list(items.values()), Base64(images))


def _seed(file: Path, images: Path) -> Items:
    """SEED-Bench (Li et al. 2023, arXiv:2307.16125): one JSON object. Questions about videos are left out."""
    document = document_of(file)
    kinds = document.get("question_type")
    names = {number: name for name, number in kinds.items()} if isinstance(kinds, dict) else {}
    items, num_left_out = [], 0
    for where, record, problem in records_of(file, document.get("questions")):
        if problem:
            raise ValueError(f"{where} {problem}")
        if record.get("data_type", "image") != "image":
            num_left_out += 1
            continue
        given = [record.get(f"choice_{letter}") for letter in "abcd"]
        choices = choices_in([choice for choice in given if choice not in (None, "")], where=where)
        items.append(
            Item(
                id=text_in(record, "question_id", where=where),
                question=text_in(record, "question", where=where),
                choices=choices,
                answer=letter_in(record.get("answer"), choices, where=where),
                images=(text_in(record, "data_id", where=where),),
                type=names.get(record.get("question_type_id")),
            )
        )
    return Items(items, Files(images), num_left_out)


def _mmmu(root: Path, split: str) -> Items:
    """MMMU (Yue et al. 2023, arXiv:2311.16502): Parquet files or folders of `datasets`, by subject, with up to seven
    images a question. Questions without options are left out.
    """
    table = DatasetTable(root, split=split)
    columns = [name for name in table.columns if re.fullmatch(r"image_\d+", name)]
    items, num_left_out = [], 0
    for where, record, _ in table.records():
        name = text_in(record, "id", where=where)
        options = _literal_list(record.get("options"), where=where)
        if not options:
            num_left_out += 1
            continue
        choices, subject = choices_in(options, where=where), _MMMU_ID.fullmatch(name)
        items.append(
            Item(
                id=name,
                question=text_in(record, "question", where=where),
                choices=choices,
                answer=letter_in(record.get("answer"), choices, where=where),
                images=tuple(record[column] for column in columns if record[column] is not None),
                type=subject[1] if subject else None,
            )
        )
    return Items(items, table.image, num_left_out)


def _literal_list(value: Any, *, where: str) -> list[Any]:
    """A list that is written as text in Python's syntax; nothing is executed."""
    try:
        found = ast.literal_eval(value) if isinstance(value, str) and len(value) <= LONGEST else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise ValueError(f"{where} has {quoted(value)} as 'options'; check that it is a list in Python's syntax")
    return found


def items_of(records: Iterable[Record]) -> Iterator[Item]:
    """The questions of records {question, choices, answer, image or images, type}; all but the first three may lack.

    The names of ARC (`answerKey`, choices as {text, label}) and of HellaSwag (`ctx`, `endings`, `label`) are read too.
    """
    return map(_item_of, records)


def _item_of(record: Record) -> Item:
    where, fields, problem = record
    try:
        if problem:
            raise Malformed(problem)
        images = tuple(record_images(fields))
    except Malformed as error:
        raise ValueError(f"{where} {error}") from error
    given = _first(fields, ("choices", "endings"))
    answer = _first(fields, ("answer", "answerKey", "label"))
    if isinstance(given, dict):
        labels, given = given.get("label"), given.get("text")
        answer = labels.index(answer) if isinstance(labels, list) and answer in labels else answer
    choices = choices_in(given, where=where)
    return Item(
        id=as_text(fields.get("id")) or where,
        question=text_in(fields, "ctx" if "question" not in fields and "ctx" in fields else "question", where=where),
        choices=choices,
        answer=answer_in(answer, choices, where=where),
        images=images,
        type=as_text(_first(fields, ("type", "category", "subject"))),
    )


def _first(record: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((record[key] for key in keys if record.get(key) not in (None, "")), None)


def choices_in(value: Any, *, where: str) -> tuple[str, ...]:
    """Two to 26 options as texts."""
    texts = [as_text(each) for each in value] if isinstance(value, list | tuple) else []
    choices = tuple(text.strip() for text in texts if text is not None)
    if not 2 <= len(choices) <= len(LETTERS) or len(choices) != len(texts):
        raise ValueError(f"{where} has {quoted(value)} as its options, where 2 to {len(LETTERS)} texts are needed")
    return choices


def answer_in(value: Any, choices: Sequence[str], *, where: str) -> int | None:
    """The index of the right option: given from 0 on, as the option's text, or as its letter; None if not given."""
    if value in (None, ""):
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value < len(choices):
            return value
    elif isinstance(value, str):
        if value.strip() in choices:
            return list(choices).index(value.strip())
        if value.isdecimal() and int(value) < len(choices):
            return int(value)
        if len(value) == 1 and value in LETTERS[: len(choices)]:
            return LETTERS.index(value)
    raise ValueError(f"{where} has the answer {quoted(value)}, which is none of its {len(choices)} options")


def letter_in(value: Any, choices: Sequence[str], *, where: str) -> int | None:
    """The index of the right option, given as a letter; None if it is not published (no answer, or "?")."""
    if value in (None, "", "?"):
        return None
    if isinstance(value, str) and len(value) == 1 and value in LETTERS[: len(choices)]:
        return LETTERS.index(value)
    raise ValueError(f"{where} has the answer {quoted(value)}, which is none of its {len(choices)} options")
