"""A hash of a split's rows, by which a run sees that annotations were edited or put in another order."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm.schema import BadSample, Source

SAMPLES = 256  # that are looked at, evenly spaced, of a source that cannot hash all its rows
READ = 16  # of one that has to open its images for them


def fingerprint(source: Source) -> str:
    """Of all rows where the source has a `fingerprint` of its own, else of some; pictures are not looked at."""
    own = getattr(source, "fingerprint", None)
    if own is not None:
        return own()
    outline: Any = getattr(source, "outline", None)
    read = outline or source.__getitem__
    wanted = min(len(source), SAMPLES if outline else READ)
    return hashed(len(source), *(row_text(read, number * len(source) // wanted) for number in range(wanted)))


def hashed(*parts: Any) -> str:
    """A hash of texts, numbers and bytes in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


def hashed_file(file: Path) -> str:
    """A hash of a file's bytes."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def row_text(read: Any, index: int) -> str:
    """A row without its images, or why it cannot be read."""
    try:
        return repr(replace(read(index), images=[]))
    except BadSample as error:
        return str(error)
