"""A piece of work for benchmarks.turns, in a module without libraries: each of its processes imports it."""

from __future__ import annotations

import os
from collections.abc import Iterator


def counting() -> Iterator[tuple[int, int]]:
    """Its process, and how often it was called."""
    number = 0
    while True:
        yield os.getpid(), number
        number += 1
