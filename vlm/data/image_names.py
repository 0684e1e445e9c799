"""Opens the image that a record names by a path or data URL; an error says why it cannot be opened."""

from __future__ import annotations

import base64
import binascii
import os
import re
from pathlib import Path

from PIL import Image

from vlm.data.files import open_inside
from vlm.data.images import BadImage, decode_image, load_image
from vlm.data.paths import likely_path, why_not_a_path
from vlm.data.split import digest
from vlm.quote import LONGEST, quoted
from vlm.schema import BadSample, StoredImage

_DATA_URL = re.compile(r"data:[\w.+-]*/?[\w.+-]*(?:;[\w=.-]+)*;base64,", re.ASCII)


def is_data_url(name: str) -> bool:
    """Whether the name holds the image itself, as `data:image/png;base64,...`."""
    return name.startswith("data:")


def short_name(name: str) -> str:
    """The name for reports and splits: a data URL is replaced by its hash."""
    return f"data:{digest(name):016x}" if is_data_url(name) else name


def open_image(name: str, *, root: Path) -> Image.Image:
    """The image of a path relative to `root` (or absolute and under it), or of a data URL.

    A backslash is read as a slash unless a file has the name as it is written. Raises `BadImage` with the cause.
    """
    if is_data_url(name):
        return _decode_url(name)
    cause = why_not_a_path(name)
    if name.startswith("~"):
        cause = "begins with '~', which is not expanded in data; write its path relative to the folder of images"
    if cause:
        raise BadImage(f"image {quoted(name)} {cause}")
    path = _with_slashes(name, root)
    try:
        return load_image(path, root=root)
    except BadSample as error:
        if cause := _cause(path, root):
            raise BadImage(f"image {quoted(name)} {cause}") from error
        if len(path) > LONGEST:
            raise BadSample(str(error).replace(path, path[:LONGEST] + "…"), error.kind) from error
        raise


def stored_image(name: str, *, root: Path) -> StoredImage:
    """The stored bytes of the image that `open_image` opens; of a data URL, the bytes of the URL itself."""
    if is_data_url(name):
        data = name.encode()
        return StoredImage(name, lambda: len(data), lambda start, size: data[start : start + size])

    def num_bytes() -> int:
        return os.stat(os.path.join(root, _with_slashes(name, root))).st_size

    def read(start: int, size: int) -> bytes:
        with open_inside(_with_slashes(name, root), root=root, what="image") as (handle, _):
            handle.seek(start)
            return handle.read(size)

    return StoredImage(name, num_bytes, read)


def _with_slashes(name: str, root: Path) -> str:
    return name if "\\" not in name or os.path.lexists(os.path.join(root, name)) else name.replace("\\", "/")


def _decode_url(name: str) -> Image.Image:
    head = _DATA_URL.match(name)
    if head is None:
        raise BadImage(f"image {quoted(name)} is not a base64 data URL; begin it with data:image/png;base64,")
    try:
        data = base64.b64decode(name[head.end() :], validate=False)
    except (binascii.Error, ValueError) as error:
        raise BadImage(f"image {quoted(name)} is not base64 ({error}); encode it again") from error
    return decode_image(data, name=short_name(name))


def _cause(path: str, root: Path) -> str:
    """Why a file cannot be read, where more is known than the reader's error says; else empty."""
    if found := likely_path(path, root=root):
        return f"{found[1]}: under '{root}' it is '{found[0]}'; change the names, or data.images="
    try:
        file = os.path.realpath(os.path.join(root, path))
        is_inside = file.startswith(os.path.join(os.path.realpath(root), ""))
        is_empty = is_inside and os.path.isfile(file) and os.path.getsize(file) == 0
    except (OSError, ValueError):  # an invalid name, which the reader's error explains
        return ""
    return "is an empty file (0 bytes); copy it again" if is_empty else ""
