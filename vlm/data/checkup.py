"""Reads every sample of a split as training does, for vlm-doctor: hashes, lengths and defects."""

from __future__ import annotations

import copy
import re
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vlm.data.duplicates import ImageHash, ImageHashes, digest, hash_image
from vlm.data.images import load_image
from vlm.data.sample_reader import SampleReader, read
from vlm.schema import BadSample, Message, Sample, Source

IMAGE_FILES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
DARK = 24  # of 255: 12-bit values in a 16-bit file become at most 15
# Of 256 levels: an image whose channels each have a smaller range, without 0.1 % at each end, has one color.
ONE_COLOR = 8
SHORT_ANSWER = 3  # words; longer answers may differ and still both be right
# A word is a run of letters or digits, or two characters of a script that has no spaces between words.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]{1,2}|[^\W\u3040-\u30ff\u3400-\u9fff]+")


class Entry(NamedTuple):
    """What is known of one sample; only `kind` and `message` if the source cannot read it."""

    id: str | None = None
    kind: str = ""  # the kind of its defect; empty for a good sample
    message: str = ""
    hashes: tuple[ImageHash, ...] = ()
    image_digest: int = 0  # hash of all images; 0 without images
    name_digest: int = 0  # hash of the images' names
    text_digest: int = 0  # hash of the conversation
    characters: int = 0
    answers: tuple[int, ...] = ()  # hashes of the answers
    short_answers: tuple[tuple[int, int], ...] = ()  # of each: hash of images and question, hash of the answer
    image_defect: str = ""  # of an image that shows almost nothing
    language: str | None = None
    tokens: int = 0  # including visual tokens
    visual_tokens: int = 0


class EntryDataset(Dataset[Entry]):
    """The entries of a split. The workers of the loader read, decode and tokenize here."""

    def __init__(self, *, source: Source, reader: SampleReader, language: Callable[[str], str] | None) -> None:
        self.source, self.reader, self.language = source, reader, language
        unlimited = copy.copy(reader.text)
        unlimited.max_length = sys.maxsize
        self._unlimited = replace(reader, text=unlimited)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Entry:
        try:
            sample = read(self.source, index, reading=self.reader.reading)
        except BadSample as error:
            return Entry(kind=error.kind, message=str(error))
        answers = answers_of(sample)
        try:
            entry = self._lengths(sample)
        except BadSample as error:
            return Entry(id=sample.id, kind=error.kind, message=str(error))
        hashes = tuple(hash_image(image) for image in sample.images)
        image_digest = digest(repr([each.pixels for each in hashes]).encode()) if hashes else 0
        return entry._replace(
            hashes=hashes,
            image_digest=image_digest,
            short_answers=tuple(_short_answers(sample, image_digest)) if hashes else (),
            image_defect=next(filter(None, map(image_defect, sample.images)), ""),
            name_digest=digest(sample.meta.get("image", sample.id).encode("utf-8", "replace")),
            text_digest=digest(repr(sample.messages).encode()),
            answers=tuple({hash_answer(answer): None for answer in answers}),
            language=self.language("\n".join(answers)) if self.language else None,
        )

    def _lengths(self, sample: Sample) -> Entry:
        """An entry with the lengths of a sample, which may exceed the maximum. Raises BadSample for other defects."""
        self.reader.check(sample)
        row = self._unlimited.encoded(sample)
        if "" in map(str.strip, answers_of(sample)):
            says = "has an empty answer among its turns; write it or remove the sample"
            raise BadSample(f"sample '{sample.id}' {says}", "empty_text")
        entry = Entry(
            id=sample.id,
            characters=sum(len(text_of(message)) for message in sample.messages),
            tokens=len(row.input_ids),
            visual_tokens=sum(row.image_mask),
        )
        if entry.tokens > self.reader.text.max_length:
            try:
                self.reader.encoded(sample)
            except BadSample as error:
                return entry._replace(kind=error.kind, message=str(error))
        return entry


class Folder(Dataset[ImageHash | None]):
    """The hashes of a folder's image files, subfolders included; None for a file that cannot be read.

    `keep` receives them in order. Then `hashes` holds those of the files that could be read, and `kept` their names.
    """

    def __init__(self, folder: str) -> None:
        self.root = Path(folder).expanduser()
        files = (path for path in self.root.rglob("*") if path.suffix.lower() in IMAGE_FILES)
        self.names = sorted(str(path.relative_to(self.root)) for path in files)
        if not self.names:
            raise ValueError(f"doctor.against={folder} holds 0 image files; set it to a folder of a benchmark's images")
        self.hashes, self.kept = ImageHashes(), list[str]()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> ImageHash | None:
        try:
            return hash_image(load_image(self.names[index], root=self.root))
        except BadSample:
            return None

    def keep(self, hashes: Iterable[ImageHash | None]) -> None:
        for name, each in zip(self.names, hashes, strict=True):
            if each is not None:
                self.hashes.append(each)
                self.kept.append(name)

    @property
    def num_unreadable(self) -> int:
        return len(self.names) - len(self.kept)


class Checkup:
    """Hashes, lengths and defects of a split's samples, in arrays; images and texts are not kept.

    `entries` are in the order of the split. Hashes and answers are of good samples only; the index of their sample is
    in `hash_owners[n]` for hash n, in `answer_owners[n]` for answer n, and in `short_answer_owners[n]` for the answer
    `short_answers[n]` to `questions[n]` (hashes, the images included in that of the question).
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.ids: list[str | None] = []
        self.problems: dict[int, tuple[str, str]] = {}  # kind and message
        self.hashes, self.hash_owners = ImageHashes(), array("Q")
        self.image_digests, self.name_digests, self.text_digests = array("Q"), array("Q"), array("Q")
        self.answers, self.answer_owners = array("Q"), array("Q")
        self.questions, self.short_answers, self.short_answer_owners = array("Q"), array("Q"), array("Q")
        self.image_defects: dict[int, str] = {}  # by sample
        self.characters, self.tokens, self.visual_tokens = array("Q"), array("Q"), array("Q")
        self.languages: Counter[str] = Counter()
        for entry in entries:
            self._add(entry)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def good(self) -> list[int]:
        """The indices of good samples."""
        return [index for index in range(len(self)) if index not in self.problems]

    def _add(self, entry: Entry) -> None:
        index = len(self)
        self.ids.append(entry.id)
        self.image_digests.append(entry.image_digest)
        self.name_digests.append(entry.name_digest)
        self.text_digests.append(entry.text_digest)
        self.characters.append(entry.characters)
        self.tokens.append(entry.tokens)
        self.visual_tokens.append(entry.visual_tokens)
        if entry.kind:
            self.problems[index] = (entry.kind, entry.message)
            return
        for each in entry.hashes:
            self.hashes.append(each)
            self.hash_owners.append(index)
        for answer in entry.answers:
            self.answers.append(answer)
            self.answer_owners.append(index)
        for question, answer in entry.short_answers:
            self.questions.append(question)
            self.short_answers.append(answer)
            self.short_answer_owners.append(index)
        if entry.image_defect:
            self.image_defects[index] = entry.image_defect
        if entry.language is not None:
            self.languages[entry.language] += 1


def image_defect(image: Image.Image) -> str:
    """The defect of an image that shows almost nothing; empty for other images."""
    histogram = np.array(image.histogram()).reshape(3, 256).cumsum(1) / (image.width * image.height)
    darkest, brightest = ([int(np.searchsorted(channel, at)) for channel in histogram] for at in (0.001, 0.999))
    if max(brightest) < DARK:
        return f"is very dark: nothing in it is brighter than {max(brightest)} of 255"
    if max(high - low for low, high in zip(darkest, brightest, strict=True)) < ONE_COLOR:
        return "is of nearly one color"
    return ""


def _short_answers(sample: Sample, image_digest: int) -> Iterator[tuple[int, int]]:
    """For each short answer the hash of the images with its question, and the hash of the answer."""
    question = ""
    for message in sample.messages:
        text = text_of(message)
        if message["role"] == "user":
            question = text
        elif message["role"] == "assistant" and len(words(text)) <= SHORT_ANSWER:
            yield digest(f"{image_digest} {' '.join(words(question))}".encode()), hash_answer(text)


def text_of(message: Message) -> str:
    return "".join(item.get("text", "") for item in message["content"])


def answers_of(sample: Sample) -> list[str]:
    return [text_of(message) for message in sample.messages if message["role"] == "assistant"]


def hash_answer(answer: str) -> int:
    """The same for answers that differ only in case and punctuation."""
    return digest((" ".join(words(answer)) or answer.strip()).encode())


def words(text: str) -> list[str]:
    return WORD.findall(text.casefold())
