"""How errors quote values from data."""

from __future__ import annotations

import pytest

from vlm.quote import named, quoted


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("cat.jpg", "'cat.jpg'"),
        ("赤い\n丸", "'赤い\\n丸'"),
        ("\x1b[31mred\x9b", "'\\x1b[31mred\\x9b'"),
        ("half \ud83d", "'half \\ud83d'"),
        ("a" * 81, f"'{'a' * 80}…' (81 characters)"),
        ("a" * 80, f"'{'a' * 80}'"),
        (b"\x89PNG", "b'\\x89PNG'"),
        (None, "None"),
        (10**100, "1" + "0" * 79),
        ([], "an empty list"),
        (["x" * 10_000] * 7, "a list of 7"),
        ({}, "an empty object"),
        ({"x" * 100: 1}, f"an object of '{'x' * 40}…' (100 characters)"),
        (dict.fromkeys(range(5000)), "an object of '0', '1', '2', '3', '4' and 4,995 more"),
    ],
)
def test_a_value_is_quoted_on_one_short_line(value, shown):
    assert quoted(value) == shown


def test_names_are_few():
    assert named(["a", "b"]) == "'a', 'b'"
    assert named([]) == "nothing"
    assert named(range(7), at_most=2) == "'0', '1' and 5 more"
