"""Detects the kind of a file from its first bytes, for errors about wrong files."""

from __future__ import annotations

LFS_POINTER = b"version https://git-lfs"  # start of a pointer file in a clone without Git LFS
KINDS = {
    LFS_POINTER: "is a Git LFS pointer, not the file itself; run git lfs pull in its folder",
    b"<!doctype html": "is a web page; download the file itself",
    b"<html": "is a web page; download the file itself",
    b"\x1f\x8b": "is compressed with gzip; decompress it",
    b"pk\x03\x04": "is a zip archive, as Excel's files are; unpack it, or save it as CSV",
    b"par1": "is a Parquet file; read it with data=huggingface",
}
HEAD = max(map(len, KINDS))


def kind_of(head: bytes) -> str:
    """The kind of a file with these first bytes, and the remedy; empty if unknown."""
    return next((words for first, words in KINDS.items() if head[:HEAD].lower().startswith(first)), "")
