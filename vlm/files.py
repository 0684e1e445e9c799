"""Safe access to files in untrusted directories: links are not followed, and sizes are limited.

Text that is not valid Unicode, such as a file name in Latin-1, is written escaped.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any

TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}


@contextmanager
def named(file: Path) -> Iterator[None]:
    """Context that adds the name of the file to an OSError while it is written."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # names the file already
            raise
        name = error.filename or str(file).removesuffix(".tmp")
        raise OSError(f"could not write {name}: {error.strerror}") from error


@contextmanager
def create(file: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A new file, which replaces one of that name. A link there is removed; its target stays.

    `mode` is "w" for text in UTF-8 or "wb".
    """
    text: dict[str, Any] = {} if "b" in mode else TEXT
    with named(file):
        file.unlink(missing_ok=True)
        number = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with open(number, mode, **text) as opened:
            yield opened


@contextmanager
def append(file: Path) -> Iterator[IO[str]]:
    """A regular file opened for appending text, created if missing. Raises ValueError for a link or a pipe."""
    with named(file), open(_open_regular(file, os.O_WRONLY | os.O_APPEND), "a", **TEXT) as opened:
        yield opened


def lock_file(file: Path) -> IO[str]:
    """A regular file to lock, read and write, created if missing. Raises ValueError for a link or a pipe."""
    return open(_open_regular(file, os.O_RDWR), "r+", encoding="utf-8", errors="replace")


def _open_regular(file: Path, flags: int) -> int:
    """The descriptor of a regular file; O_NONBLOCK keeps a pipe from blocking."""
    try:
        number = os.open(file, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if not file.is_symlink() and not file.is_fifo():
            raise
        raise ValueError(f"{file} is a link or a pipe and is not written to; remove it") from error
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise ValueError(f"{file} is not a regular file; remove it")
    return number


def read(file: Path, *, max_bytes: int) -> bytes:
    """The content of a regular file. Raises ValueError if it is not a regular file or larger than `max_bytes`."""
    number = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(number, "rb") as opened:
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{file} is not a regular file; replace it with one")
        if status.st_size > max_bytes:
            raise ValueError(f"{file} has {status.st_size:,} bytes, more than the limit of {max_bytes:,}")
        return opened.read(max_bytes)


def refuse_links(folder: Path, *, within: Path | None = None) -> None:
    """Raise ValueError if a link in the folder points outside `within`, by default the folder itself.

    Such a link would let a run write elsewhere. The folder itself may be a link, because the user gave it. W&B's link
    from a run directory to the logs in its cache is allowed.
    """
    logs = os.path.join(os.environ.get("WANDB_CACHE_DIR") or os.path.expanduser("~/.cache/wandb"), "logs")
    homes = tuple(os.path.join(os.path.realpath(home), "") for home in (within or folder, logs))
    top: list[tuple[str, list[str], list[str]]] = [(str(folder.parent), [folder.name], [])] if within else []
    for place, folders, names in chain(top, os.walk(folder)):
        for name in (*folders, *names):
            path = os.path.join(place, name)
            if os.path.islink(path) and not os.path.realpath(path).startswith(homes):
                raise ValueError(
                    f"{path} is a link to {os.path.realpath(path)}, outside {within or folder}; remove it, or replace "
                    "it with a copy"
                )


def escape_controls(text: str) -> str:
    r"""The text with control characters, direction marks and lone surrogates written as `\x1b` or `\udce9`.

    Line breaks and tabs stay; `vlm.quote.one_line` escapes them too.
    """
    return CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
