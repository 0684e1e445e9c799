"""The split into train and val by a hash of names: the same in all runs, on all machines, and when files are added."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt64

from vlm.schema import Split

PART = 4096  # bytes of each part of a file that `content_key` hashes


def check_split(*, split: Split, val_fraction: float) -> None:
    """Raise `ValueError` unless `split` is train or val and `val_fraction` is in [0, 1)."""
    if split not in ("train", "val"):
        raise ValueError(f"split is '{split}'; choose train or val")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; it must be in [0, 1)")


def in_split(key: str, *, split: Split, val_fraction: float) -> bool:
    """Whether the item named `key` belongs to `split`. With `val_fraction` 0 each item belongs to both."""
    return val_fraction == 0 or (digest(key) < int(val_fraction * 2**64)) == (split == "val")


def of_split(digests: UInt64[np.ndarray, " n"], *, split: Split, val_fraction: float) -> Bool[np.ndarray, " n"]:
    """`in_split` for the digests of many keys at once."""
    held_out = digests < np.uint64(int(val_fraction * 2**64))
    return (held_out == (split == "val")) | (val_fraction == 0)


def digest(key: str) -> int:
    """A 64-bit hash that is the same in every process, unlike Python's `hash`."""
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def image_key(name: str, *, root: Path) -> str:
    """The normal form of an image's path: `./a.jpg`, `x/../a.jpg`, `x\\..\\a.jpg` and `<root>/a.jpg` are `a.jpg`."""
    may_differ = name[:1] in "/." or name[-1:] == "/" or "//" in name or "/." in name or "\\" in name
    if not may_differ:  # fast: nearly all names of a dataset
        return name
    name = name.replace("\\", "/")  # Windows
    if os.path.isabs(name):
        name = os.path.relpath(name, root)
    return os.path.normpath(name).replace(os.sep, "/")


def content_key(size: int, read: Callable[[int, int], bytes]) -> str:
    """A key of an image by the bytes of its file, which `read(start, size)` returns.

    Equal files have equal keys. To be fast, the key of a large file depends only on its size and on three parts of it.
    """
    starts = (0, (size - PART) // 2, size - PART) if size > 3 * PART else (0,)
    parts = [read(start, PART if len(starts) > 1 else size) for start in starts]
    return f"{size} {blake2b(b''.join(parts), digest_size=8).hexdigest()}"


def group_keys(names: Sequence[Sequence[str]]) -> list[str]:
    """A key for every item, equal for items that share a name, directly or through other items.

    The key is the smallest name of the group. A split by these keys puts no name into both train and val, even where a
    sample has several images.
    """
    parent: dict[str, str] = {}

    def find(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for group in names:
        if len(group) > 1:
            roots = sorted(find(name) for name in group)
            for root in roots[1:]:
                parent[root] = roots[0]
    return [find(group[0]) if group[0] in parent else group[0] for group in names]
