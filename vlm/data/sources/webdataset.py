"""WebDataset's tar shards (Aizman et al. 2020, arXiv:2001.01858), such as img2dataset's, read without unpacking."""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from vlm.data.annotations import PackedJson
from vlm.data.conversations import RecordReader, caption_messages, turns_record
from vlm.data.files import check_bytes
from vlm.data.images import decode_image
from vlm.data.reading import current
from vlm.data.record_keys import PAIR_KEYS, TURN_KEYS, Malformed, as_text, renamed
from vlm.data.split import check_split, content_key, digest, group_keys, of_split
from vlm.quote import quoted
from vlm.ranges import RatioBelowOne
from vlm.schema import BadSample, Sample, Source, Split, StoredImage, hashed

SUFFIXES = {"jpg": "image", "jpeg": "image", "png": "image", "webp": "image", "txt": "txt", "json": "json"}
KINDS = ("image", "txt", "json")
_CONVERSATION_KEYS = frozenset((*TURN_KEYS, *PAIR_KEYS))
GZIP = b"\x1f\x8b"
WINDOW = 4  # shards whose samples are shuffled together
BLOCK = 512  # bytes of a tar header, and of the zeros at the end of an archive


class WebDataset(Source):
    """One sample per key of a shard.

    A key is the path of a member up to the first dot of its file name: `KEY.jpg` and `KEY.txt` are one sample. Several
    images of a key (`KEY.0.jpg`, `KEY.1.png`) have the order of the archive. The text is `KEY.txt`, which holds a
    caption, or else `KEY.json`, which holds a LLaVA record, chat messages or a `{"caption"}`. `num_ignored` counts
    members of other kinds.

    `shards` is a path with `{000..009}`, `{a,b}`, `*` and `?`. At the start, the headers of all shards are read, and
    parts of their images. With `val_shards`, each set of shards is one split. Without it, the split is by the bytes of
    the images, so that no image is in both splits; a sample without images is split by shard and key.

    Raises ValueError for an archive that is cut or not a plain tar. A sample without text is bad.
    """

    num_hashed = 256

    def __init__(
        self,
        *,
        split: Split,
        shards: str,
        val_shards: str | None = None,
        val_fraction: RatioBelowOne = 0.05,
        prompt: str = "Describe the image.",
        columns: Mapping[str, str | None] | None = None,
        role_map: Mapping[str, str] | None = None,
        image_first: bool = False,
    ) -> None:
        check_split(split=split, val_fraction=val_fraction)
        self.reader = RecordReader(columns=columns, role_map=role_map, image_first=image_first)
        self.prompt = prompt
        option = "val_shards" if split == "val" and val_shards is not None else "shards"
        pattern = val_shards if split == "val" and val_shards is not None else shards
        self.shards = shard_files(pattern, option=option)
        samples = [sample for number, file in enumerate(self.shards) for sample in _samples(file, number)]
        num_found = len(samples)
        self.num_ignored = sum(member.kind < 0 for _, _, members in samples for member in members)
        if val_shards is None:
            keys = group_keys(list(self._contents(samples)))
            digests = np.fromiter(map(digest, keys), dtype=np.uint64, count=len(keys))
            mine = of_split(digests, split=split, val_fraction=val_fraction)
            samples = [sample for sample, keep in zip(samples, mine, strict=True) if keep]
        if not samples:
            raise ValueError(
                f"none of the {num_found} samples in {len(self.shards)} shards of '{pattern}' falls into {split} with "
                f"val_fraction {val_fraction}; set data.val_fraction= to another ratio, or change data.{option}="
            )
        # Arrays and one block of bytes, because every worker would get its own copy of a list.
        self._keys = PackedJson(key for _, key, _ in samples)
        self._shard = np.array([number for number, _, _ in samples], dtype=np.int32)
        self._first = np.cumsum([0, *(len(members) for _, _, members in samples)])
        self._members = np.array([member for _, _, members in samples for member in members], dtype=np.int64)

    def _contents(self, samples: Sequence[tuple[int, str, list[_Member]]]) -> Iterator[list[str]]:
        """For each sample, the keys of its images by their bytes; its shard and key where it has none."""
        for number, of_shard in itertools.groupby(samples, key=lambda sample: sample[0]):
            with open(self.shards[number], "rb") as file:

                def read(start: int, size: int, offset: int, handle: int = file.fileno()) -> bytes:
                    return os.pread(handle, size, offset + start)

                for _, key, members in of_shard:
                    images = [m for m in members if m.kind == KINDS.index("image")]
                    keys = [content_key(m.size, partial(read, offset=m.offset)) for m in images]
                    yield keys or [f"{self.shards[number].name}/{key}"]

    def __len__(self) -> int:
        return len(self._keys)

    def fingerprint(self) -> str:
        """A hash of all keys, of the positions of their members, and of some texts."""
        texts = map(self.outline_text, range(0, len(self), -(-len(self) // self.num_hashed)))
        return hashed(self._keys.fingerprint(), self._shard.tobytes(), self._members.tobytes(), *texts)

    def __getitem__(self, index: int) -> Sample:
        sample, image_members = self._read(index)
        try:
            images = []
            for number, (_, offset, size) in enumerate(image_members, start=1):
                check_bytes(f"image {number}", size, option="max_image_bytes")
                images.append(decode_image(self._bytes(index, offset, size), name=str(number)))
        except BadSample as error:
            raise BadSample(f"sample '{sample.id}': {error}", error.kind) from error
        return replace(sample, images=images)

    def outline(self, index: int) -> Sample:
        """The sample without its images, which are not read."""
        return self._read(index)[0]

    def stored_images(self, indices: Sequence[int] | None = None) -> Iterator[StoredImage]:
        """The image members of these samples (None: of all)."""
        for index in range(len(self)) if indices is None else indices:
            _, image_members = self._members_of(index)
            for number, (_, offset, size) in enumerate(image_members, start=1):
                name = f"{self._name(index)} (image {number})"
                yield StoredImage(name, partial(int, size), partial(self._part, index, offset))

    def order(self, epoch: int, *, seed: int) -> Int[np.ndarray, " n"]:
        """Every sample once: shards in random order, and the samples of a few consecutive shards shuffled together.

        Reading few files at a time is faster on disks and network mounts than random access.
        """
        rng = np.random.default_rng((seed, epoch))
        starts = np.searchsorted(self._shard, np.arange(len(self.shards) + 1))
        shards = rng.permutation(len(self.shards))
        windows = [shards[first : first + WINDOW] for first in range(0, len(shards), WINDOW)]
        return np.concatenate(
            [rng.permutation(np.concatenate([np.arange(starts[s], starts[s + 1]) for s in w])) for w in windows]
        )

    def _read(self, index: int) -> tuple[Sample, list[list[int]]]:
        """The sample without its images, and the members that hold its images."""
        index = range(len(self))[index]
        name = self._name(index)
        members, image_members = self._members_of(index)
        texts = {KINDS[kind]: (offset, size) for kind, offset, size in members if kind > 0}
        try:
            if not texts:
                raise Malformed("has neither a txt nor a json member; add its text or remove its images")
            kind = "txt" if "txt" in texts else "json"
            what = f"sample '{name}': its {kind}"
            check_bytes(what, texts[kind][1], option="max_text_bytes", kind="other_defect")
            record = _record(self._bytes(index, *texts[kind]), kind)
            record = renamed(record, self.reader.columns or {})
            text = record.get("caption")
            caption = as_text(text) or ""
            if not _CONVERSATION_KEYS.isdisjoint(record):
                messages = self.reader.conversation(record, num_images=len(image_members)).messages
            elif not caption.strip():
                found = "" if text is None or isinstance(text, str) else f" but {quoted(text)}"
                says = f"has no text in its {kind}{found}; write a caption or a conversation there"
                raise Malformed(says, "empty_text")
            elif len(image_members) != 1:
                raise Malformed(f"has {len(image_members)} images for 1 caption; give it one")
            else:
                messages = caption_messages(self.prompt, caption.strip())
        except Malformed as error:
            raise BadSample(f"sample '{name}' {error}", error.kind) from error
        return Sample(id=name, images=[], messages=messages, meta={}), image_members

    def _name(self, index: int) -> str:
        return f"{self.shards[self._shard[index]].name}/{self._keys[index]}"

    def _members_of(self, index: int) -> tuple[list[list[int]], list[list[int]]]:
        """All members of a sample, and those that are images."""
        members = self._members[self._first[index] : self._first[index + 1]].tolist()
        return members, [member for member in members if KINDS[member[0]] == "image"]

    def _part(self, index: int, offset: int, start: int, size: int) -> bytes:
        return self._bytes(index, offset + start, size)

    def _bytes(self, index: int, offset: int, size: int) -> bytes:
        try:
            with open(self.shards[self._shard[index]], "rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise BadSample(f"shard '{self.shards[self._shard[index]]}' cannot be read ({error.strerror})") from error


class _Member(NamedTuple):
    kind: int  # an index into KINDS, or -1
    offset: int
    size: int


def shard_files(pattern: str, *, option: str) -> list[Path]:
    """The files that match a pattern, in order.

    Raises `ValueError` where nothing matches, or where a file that `{000..009}` or `{a,b}` names does not exist.
    """
    files: list[Path] = []
    limit = current().max_files
    expanded = str(Path(pattern).expanduser())
    names = list(itertools.islice(_braces(expanded), limit + 1))
    if len(names) > limit:
        raise ValueError(
            f"data.{option}='{pattern}' names more than {limit:,} shards; name fewer, or set "
            f"data.reading.max_files={2 * limit}"
        )
    for name in names:
        if "**" in name:
            _check_depth(name.partition("**")[0], limit, f"data.{option}='{pattern}'")
        found = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else [name]
        files += [Path(file) for file in found]
    missing = [file for file in files if not file.is_file()]
    if not files or missing:
        what = f"{len(missing)} of the {len(files)} shards, first '{missing[0]}'" if missing else "no shard"
        raise ValueError(
            f"data.{option}='{pattern}' finds {what + ' missing' if missing else what}; name existing .tar files"
        )
    return files


def _check_depth(start: str, limit: int, option: str) -> None:
    """Raise ValueError where `**` would list more than `limit` files; it follows links, which can form loops."""
    num, folders = 0, [os.path.dirname(start) or "."]
    while folders:
        with suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                num += 1
                if num > limit:
                    raise ValueError(
                        f"{option} lists more than {limit:,} files; let it begin with the folder of the shards, or set "
                        f"data.reading.max_files={2 * limit}"
                    )
                if not entry.name.startswith(".") and entry.is_dir():
                    folders.append(entry.path)


def _braces(pattern: str) -> Iterator[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    span = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", match[1])
    numbers = range(int(span[1]), int(span[2]) + 1) if span else ()
    for word in (f"{n:0{len(span[1])}d}" for n in numbers) if span else match[1].split(","):
        yield from _braces(pattern[: match.start()] + word + pattern[match.end() :])


def _samples(file: Path, number: int) -> list[tuple[int, str, list[_Member]]]:
    """The shard's keys with their members, in the order of the archive."""
    found: dict[str, list[_Member]] = {}
    for name, offset, size in _members(file):
        folder, slash, base = name.rpartition("/")
        stem, _, suffix = base.partition(".")
        kind = SUFFIXES.get(suffix.rpartition(".")[2].lower())
        found.setdefault(folder + slash + stem, []).append(_Member(KINDS.index(kind) if kind else -1, offset, size))
    return [(number, key, members) for key, members in found.items()]


def _members(file: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every file in an archive, from its headers alone."""
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                if member.isfile():
                    yield member.name.removeprefix("./"), member.offset_data, member.size
            with open(file, "rb") as raw:  # tarfile takes a broken header for the end of the archive
                raw.seek(archive.offset)
                end = raw.read(BLOCK)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"shard '{file}' {_no_tar(file, error)}") from error
    if end != bytes(BLOCK):
        raise ValueError(
            f"shard '{file}' is damaged at byte {archive.offset:,} of {file.stat().st_size:,}, where a header or the "
            "end of the archive is expected; copy it again, or leave it out of data.shards="
        )


def _no_tar(file: Path, error: Exception) -> str:
    """Why a file cannot be read as a tar."""
    with suppress(OSError), open(file, "rb") as raw:
        head = raw.read(len(GZIP))
        if not head:
            return "is an empty file; copy it again"
        if head == GZIP:
            return "is compressed by gzip, so single samples cannot be read; gunzip it"
    return f"is not a complete, uncompressed tar ({error}); copy it again"


def _record(data: bytes, kind: str) -> dict[str, Any]:
    try:
        text = data.decode("utf-8-sig")
        record = {"caption": text} if kind == "txt" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"has a {kind} that cannot be read ({error}); save it as UTF-8") from error
    if isinstance(record, list):
        return turns_record(record)
    if not isinstance(record, dict):
        raise Malformed("has a json that is not an object; write it as {...}")
    return record
