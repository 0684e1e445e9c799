"""Selection of the encoder layers whose hidden states are the features."""

from __future__ import annotations


def resolve_layers(layer: int | list[int], *, first: int, last: int) -> list[int]:
    """The option `layer` as indices in `first..last`, in the order given; -1 is the last.

    Raises ValueError for an empty list and for a layer that the encoder does not have.
    """
    asked = [layer] if isinstance(layer, int) else layer
    if not asked:
        raise ValueError("encoder.layer=[] selects nothing; name at least one layer, e.g. encoder.layer=-2")
    numbers = [number if number >= 0 else last + 1 + number for number in asked]
    for given, number in zip(asked, numbers, strict=True):
        if not first <= number <= last:
            count = last - first + 1
            raise ValueError(
                f"encoder.layer={given}, but this encoder has {count} layers: choose {first}..{last}, or -{count}..-1"
            )
    return numbers
