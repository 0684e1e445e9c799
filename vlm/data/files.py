"""Reads untrusted files of a dataset: only regular files, inside their folder, of limited size."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

from vlm.data.reading import current
from vlm.schema import BadKind, BadSample


def read_text(path: str | Path, *, root: Path) -> str:
    """The text of a UTF-8 file under `root`. Raises BadSample, as `read_inside` does."""
    data = read_inside(path, root=root, what="text", option="max_text_bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample(f"text '{path}' is not UTF-8 ({error.reason}); save it as UTF-8") from error


def read_inside(path: str | Path, *, root: Path, what: str, option: str, limit: int | None = None) -> bytes:
    """The bytes of a regular file under `root`.

    `path` is relative to `root`, or absolute; either way it must be under `root` once symlinks are followed. `what` is
    what errors call the file (image, text). The file may have at most `limit` bytes, by default the value of `option`
    in data.reading. Raises BadSample.
    """
    with open_inside(path, root=root, what=what) as (handle, size):
        check_bytes(f"{what} '{path}'", size, option=option, kind=_kind(what), limit=limit)
        return handle.read(size)  # a larger number would allocate a larger buffer


@contextmanager
def open_inside(path: str | Path, *, root: Path, what: str) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file under `root`, open for reading, and its size in bytes; checked as by `read_inside`."""
    kind = _kind(what)
    try:
        home = _resolved(root)
        file = os.path.realpath(os.path.join(home, path))  # takes half the time of pathlib
        if not os.path.join(file, "").startswith(os.path.join(home, "")):
            raise BadSample(
                f"{what} '{path}' is outside the folder '{root}'; put a copy of the file under that folder", kind
            )
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would block, reading a device would not end
            file_kind = "an image file" if what == "image" else f"a {what} file"
            raise BadSample(f"{what} '{path}' under '{root}' is not a regular file; replace it with {file_kind}", kind)
        with open(file, "rb") as handle:
            yield handle, status.st_size
    except BadSample:
        raise
    except FileNotFoundError as error:
        says = f"{what} '{path}' does not exist under '{root}'; add the file or remove its sample"
        raise BadSample(says, kind) from error
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise BadSample(f"{what} '{path}' cannot be read ({reason}); replace the file", kind) from error
    except ValueError as error:  # the name has a null byte or half a surrogate pair
        raise BadSample(f"{what} {str(path)!r} is not a usable path ({error}); rename the file", kind) from error


def _kind(what: str) -> BadKind:
    return "unreadable_image" if what == "image" else "other_defect"


def check_bytes(
    what: str, size: int, *, option: str, kind: BadKind = "unreadable_image", limit: int | None = None
) -> None:
    """Raise BadSample where `what` has more bytes than `limit`, by default the value of `option` in data.reading."""
    limit = getattr(current(), option) if limit is None else limit
    if size > limit:
        says = f"{what} has {size:,} bytes, more than the limit of {limit:,}; make it smaller, or set data.reading."
        raise BadSample(f"{says}{option}={size}", kind)


@cache
def _resolved(root: Path) -> str:
    return os.path.realpath(root)
