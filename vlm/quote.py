"""Values from data quoted in errors: on one line, printable and short."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice
from typing import Any

LONGEST = 80  # characters of a value that are shown
NUM_NAMED = 5  # items of a list of names that are shown
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def quoted(value: Any, *, longest: int = LONGEST) -> str:
    """The `repr` of a value; for a long text its beginning and length, for a list or object its size.

    >>> quoted("data:image/png;base64," + "A" * 8000)
    "'data:image/png;base64,AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA…' (8,022 characters)"
    """
    if isinstance(value, str | bytes):
        if len(value) <= longest:
            return repr(value)
        unit = "characters" if isinstance(value, str) else "bytes"
        shown = repr(value[:longest])
        return f"{shown[:-1]}…{shown[-1]} ({len(value):,} {unit})"
    if isinstance(value, dict):
        return f"an object of {named(value)}" if value else "an empty object"
    if isinstance(value, list | tuple):
        return f"a list of {len(value):,}" if value else "an empty list"
    return repr(value)[:longest]


def named(names: Iterable[Any], *, at_most: int = NUM_NAMED) -> str:
    """The first names, and the number of the others."""
    names = list(names)
    shown = ", ".join(quoted(str(name), longest=LONGEST // 2) for name in islice(names, at_most))
    more = len(names) - at_most
    return f"{shown} and {more:,} more" if more > 0 else shown or "nothing"


def one_line(text: str) -> str:
    r"""The text on one line: control characters, line breaks and lone surrogates are written as `\x1b` or `\n`."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
