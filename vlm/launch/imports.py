"""How the programs import their libraries."""

from __future__ import annotations

import gc
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
