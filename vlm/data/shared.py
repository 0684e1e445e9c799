"""Finds images that are in both splits by the bytes of their files, and reads few of the files for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from multiprocessing.pool import ThreadPool
from typing import NamedTuple

from vlm.data.split import content_key
from vlm.schema import BadSample, Source, StoredImage

THREADS = 16  # a network mount is slow, but answers many requests at a time
BATCH = 10_000  # images whose sizes are read together


class Shared(NamedTuple):
    """The number of compared validation images that are also in train, with an example."""

    num_shared: int
    num_compared: int
    example: tuple[str, str] | None  # names in val and in train


def shared_images(train: Source, val: Source, indices: Sequence[int]) -> Shared:
    """Compare the images of these validation samples with all images of train.

    First the sizes of files are compared, then a few kilobytes of files of equal size, and then all bytes. An image
    that cannot be read is equal to no other.
    """
    with ThreadPool(THREADS) as pool:
        sizes: dict[StoredImage, int] = dict(_sized(val.stored_images(indices), pool))
        wanted = set(sizes.values())
        candidates = [image for image, size in _sized(train.stored_images(), pool) if size in wanted]
        by_key: dict[str, list[StoredImage]] = {}
        for image, key in zip(candidates, pool.map(_key, candidates), strict=True):
            by_key.setdefault(key, []).append(image)
        held_out = list(sizes) if candidates else []
        pairs = [(image, by_key.get(key, [])) for image, key in zip(held_out, pool.map(_key, held_out), strict=True)]
        found = {image.name: other for image, other in zip(held_out, pool.starmap(_equal, pairs), strict=True) if other}
    return Shared(len(found), len(sizes), next(iter(found.items()), None))


def _sized(images: Iterator[StoredImage], pool: ThreadPool) -> Iterator[tuple[StoredImage, int]]:
    """The images that exist, with their sizes."""
    while batch := list(islice(images, BATCH)):
        yield from (pair for pair in zip(batch, pool.map(_size, batch), strict=True) if pair[1] >= 0)


def _size(image: StoredImage) -> int:
    try:
        return image.size()
    except (OSError, ValueError):  # missing, or an invalid file name
        return -1


def _key(image: StoredImage) -> str:
    """A hash of some of the image's bytes; empty where they cannot be read."""
    try:
        return content_key(image.size(), image.read)
    except (BadSample, OSError):
        return ""


def _equal(image: StoredImage, candidates: Sequence[StoredImage]) -> str | None:
    """The name of the first candidate with the same bytes."""
    if not candidates:
        return None
    mine = _digest(image)
    return next((other.name for other in candidates if mine is not None and _digest(other) == mine), None)


def _digest(image: StoredImage) -> bytes | None:
    try:
        return blake2b(image.read(0, image.size())).digest()
    except (BadSample, OSError):
        return None
