"""Reads every sample of a split as training would, and keeps its hashes, its lengths and its defect."""

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
from vlm.data.judge import Judge, read
from vlm.schema import BadSample, Message, Sample, Source

IMAGE_FILES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
DARK = 24  # of 255: 12-bit values in a 16-bit file become at most 15
ONE_COLOR = 8  # levels of 256 between the darkest and the brightest of a channel, without 0.1 % at each end
SHORT_ANSWER = 3  # words; two longer answers may differ and both be right
# A word is a run of letters or digits, or two characters of a script that puts no space between words.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]{1,2}|[^\W\u3040-\u30ff\u3400-\u9fff]+")


class Entry(NamedTuple):
    """The facts of one sample; only `kind` and `message` for one that the source cannot read."""

    id: str | None = None
    kind: str = ""  # of defect; empty for a good sample
    message: str = ""
    hashes: tuple[ImageHash, ...] = ()
    picture: int = 0  # hash of all images; 0 without images
    name: int = 0  # hash of the images' names
    text: int = 0  # hash of the conversation
    characters: int = 0
    answers: tuple[int, ...] = ()  # hashes of the answers
    claims: tuple[tuple[int, int], ...] = ()  # of short answers: hash of images and question, hash of the answer
    plain: str = ""  # the defect of an image that shows almost nothing
    language: str | None = None
    tokens: int = 0  # including visual tokens
    visual_tokens: int = 0


class Reader(Dataset[Entry]):
    """A split as entries; the loader's workers read, decode and tokenize here."""

    def __init__(self, *, source: Source, judge: Judge, language: Callable[[str], str] | None) -> None:
        self.source, self.judge, self.language = source, judge, language
        unlimited = copy.copy(judge.text)
        unlimited.max_length = sys.maxsize
        self._unlimited = replace(judge, text=unlimited)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Entry:
        try:
            sample = read(self.source, index, reading=self.judge.reading)
        except BadSample as error:
            return Entry(kind=error.kind, message=str(error))
        answers = answers_of(sample)
        try:
            entry = self._lengths(sample)
        except BadSample as error:
            return Entry(id=sample.id, kind=error.kind, message=str(error))
        hashes = tuple(hash_image(image) for image in sample.images)
        picture = digest(repr([each.pixels for each in hashes]).encode()) if hashes else 0
        return entry._replace(
            hashes=hashes,
            picture=picture,
            claims=tuple(_claims(sample, picture)) if hashes else (),
            plain=next(filter(None, map(plainness, sample.images)), ""),
            name=digest(sample.meta.get("image", sample.id).encode("utf-8", "replace")),
            text=digest(repr(sample.messages).encode()),
            answers=tuple({hash_answer(answer): None for answer in answers}),
            language=self.language("\n".join(answers)) if self.language else None,
        )

    def _lengths(self, sample: Sample) -> Entry:
        """The entry of a sample with its lengths, which may be too long. Raises BadSample for any other defect."""
        self.judge.check(sample)
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
        if entry.tokens > self.judge.text.max_length:
            try:
                self.judge.encoded(sample)
            except BadSample as error:
                return entry._replace(kind=error.kind, message=str(error))
        return entry


class Folder(Dataset[ImageHash | None]):
    """A folder's image files, those in its subfolders included, as hashes; None for one that cannot be read.

    `keep` takes them in order; then `hashes` holds what could be read and `kept` the names of these files.
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

    The entries come in the order of the split. `owners[n]` is the sample that hash n belongs to,
    `answerers[n]` the one that gives answer n, and `claimants[n]` the one that gives answer `claims[n]` to
    `questions[n]` about its images. ImageHashes and answers are of good samples only.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.ids: list[str | None] = []
        self.problems: dict[int, tuple[str, str]] = {}  # kind and message
        self.hashes, self.owners = ImageHashes(), array("Q")
        self.pictures, self.names, self.texts = array("Q"), array("Q"), array("Q")
        self.answers, self.answerers = array("Q"), array("Q")
        self.questions, self.claims, self.claimants = array("Q"), array("Q"), array("Q")
        self.plain: dict[int, str] = {}  # the defect of a sample's image
        self.characters, self.tokens, self.visual_tokens = array("Q"), array("Q"), array("Q")
        self.languages: Counter[str] = Counter()
        for entry in entries:
            self._add(entry)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sound(self) -> list[int]:
        """The indices of good samples."""
        return [index for index in range(len(self)) if index not in self.problems]

    def _add(self, entry: Entry) -> None:
        index = len(self)
        self.ids.append(entry.id)
        self.pictures.append(entry.picture)
        self.names.append(entry.name)
        self.texts.append(entry.text)
        self.characters.append(entry.characters)
        self.tokens.append(entry.tokens)
        self.visual_tokens.append(entry.visual_tokens)
        if entry.kind:
            self.problems[index] = (entry.kind, entry.message)
            return
        for each in entry.hashes:
            self.hashes.append(each)
            self.owners.append(index)
        for answer in entry.answers:
            self.answers.append(answer)
            self.answerers.append(index)
        for question, answer in entry.claims:
            self.questions.append(question)
            self.claims.append(answer)
            self.claimants.append(index)
        if entry.plain:
            self.plain[index] = entry.plain
        if entry.language is not None:
            self.languages[entry.language] += 1


def plainness(image: Image.Image) -> str:
    """The defect of an image that shows almost nothing; empty for others."""
    histogram = np.array(image.histogram()).reshape(3, 256).cumsum(1) / (image.width * image.height)
    darkest, brightest = ([int(np.searchsorted(channel, at)) for channel in histogram] for at in (0.001, 0.999))
    if max(brightest) < DARK:
        return f"is very dark: nothing in it is brighter than {max(brightest)} of 255"
    if max(high - low for low, high in zip(darkest, brightest, strict=True)) < ONE_COLOR:
        return "is of nearly one color"
    return ""


def _claims(sample: Sample, picture: int) -> Iterator[tuple[int, int]]:
    """For each short answer the hash of the images with its question, and the hash of the answer."""
    question = ""
    for message in sample.messages:
        text = text_of(message)
        if message["role"] == "user":
            question = text
        elif message["role"] == "assistant" and len(words(text)) <= SHORT_ANSWER:
            yield digest(f"{picture} {' '.join(words(question))}".encode()), hash_answer(text)


def text_of(message: Message) -> str:
    return "".join(item.get("text", "") for item in message["content"])


def answers_of(sample: Sample) -> list[str]:
    return [text_of(message) for message in sample.messages if message["role"] == "assistant"]


def hash_answer(answer: str) -> int:
    """The same for answers that differ only in case and punctuation."""
    return digest((" ".join(words(answer)) or answer.strip()).encode())


def words(text: str) -> list[str]:
    return WORD.findall(text.casefold())
