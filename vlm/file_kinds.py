"""What a file is that was given as another kind of file, by the bytes that it begins with."""

from __future__ import annotations

LFS_POINTER = b"version https://git-lfs"  # how a file begins that stands for another one, in a clone without Git LFS
KINDS = {
    LFS_POINTER: "only points to a file that Git LFS has not fetched; run git lfs pull in its folder",
    b"<!doctype html": "is a web page; download the file itself",
    b"<html": "is a web page; download the file itself",
    b"\x1f\x8b": "is packed by gzip; unpack it",
    b"pk\x03\x04": "is a zip archive, as Excel's files are; unpack it, or save it as CSV",
    b"par1": "is a Parquet file; read it with data=huggingface",
}
HEAD = max(map(len, KINDS))


def kind_of(head: bytes) -> str:
    """What a file is that begins like this, with the remedy; empty where these bytes do not tell."""
    return next((words for first, words in KINDS.items() if head[:HEAD].lower().startswith(first)), "")
