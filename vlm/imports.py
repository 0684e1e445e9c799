"""How the programs import their libraries."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Import without garbage collection.

    It would look through the half a million objects of the libraries a dozen times, for a quarter of the import's time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def without_package(name: str) -> Iterator[None]:
    """Import as if this package were not installed, for a library that imports it for a purpose that is not ours.

    Nothing changes if the package is imported already.
    """
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # Python's way of saying that it cannot be imported
    try:
        yield
    finally:
        del sys.modules[name]
