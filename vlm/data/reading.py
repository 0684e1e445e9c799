"""How data are read: how much of one thing is taken at most, and how a deep picture becomes one of 8 bits."""

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
    """The options `data.reading`. What is beyond a limit is refused by name, before it costs time or memory.

    Args:
        image_range: what is white in a picture of 16 bits: 65,535 (`full`), or its own brightest value, its darkest
            being black (`found`), as X-rays need that hold 12-bit values.
        max_image_bytes: bytes of an image file.
        max_image_pixels: pixels of a picture, 3 bytes each once it is decoded.
        max_image_scans: scans of a progressive JPEG, each of which goes through the whole picture; cameras write 10.
        max_text_bytes: bytes of a text file that belongs to one sample.
        max_characters: characters of a sample's messages.
        max_turns: messages of a sample.
        max_files: files, or names of shards, that a source looks through.
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
    """What holds where this is called: the defaults outside of `applied`."""
    return _CURRENT.get()


@contextmanager
def applied(reading: Reading) -> Iterator[None]:
    """Sources that are made or read in here keep to `reading`; theirs is the code that opens files."""
    token = _CURRENT.set(reading)
    try:
        yield
    finally:
        _CURRENT.reset(token)
