"""Limits on what is read from a dataset, and how 16-bit images become 8-bit images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Literal

from vlm.ranges import Range

Limit = Annotated[int, Range(1, 2**40)]


@dataclass(frozen=True)
class Reading:
    """The options `data.reading`. Data beyond a limit is refused before it takes time or memory.

    Args:
        image_range: the range of a 16-bit image that is mapped to 0 to 255: 0 to 65,535 (`full`), or from the image's
            minimum to its maximum (`found`), for example for X-rays with 12-bit values.
        max_image_bytes: bytes of an image file.
        max_image_pixels: pixels of an image, 3 bytes each once it is decoded.
        max_image_scans: scans of a progressive JPEG, each of which decodes the whole image; cameras write 10.
        max_text_bytes: bytes of a text file that belongs to one sample.
        max_characters: characters of a sample's messages.
        max_turns: messages of a sample.
        max_files: files, or names of shards, that a source lists.
    """

    image_range: Literal["full", "found"] = "full"
    max_image_bytes: Limit = 2**26
    max_image_pixels: Limit = 2**26
    max_image_scans: Limit = 64
    max_text_bytes: Limit = 2**22
    max_characters: Limit = 500_000
    max_turns: Limit = 1000
    max_files: Limit = 2_000_000


_CURRENT: ContextVar[Reading] = ContextVar("reading", default=Reading())  # noqa: B039, frozen


def current() -> Reading:
    """The options of the enclosing `applied`, else the defaults."""
    return _CURRENT.get()


@contextmanager
def applied(reading: Reading) -> Iterator[None]:
    """Sources that are built or read inside this context use `reading`."""
    token = _CURRENT.set(reading)
    try:
        yield
    finally:
        _CURRENT.reset(token)
