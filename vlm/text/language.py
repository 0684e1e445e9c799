"""Identifies the language of a text with py3langid (139 languages; the package contains its model)."""

from __future__ import annotations

from collections.abc import Callable

SHORT = 32  # bytes of UTF-8 (32 Latin letters or about 11 Japanese characters), below which the result is unreliable
LONGEST = 1000  # characters that are read


def identifier() -> Callable[[str], str]:
    """A function from a text to its ISO 639 code, or "short". Raises ValueError where the package is missing."""
    try:
        import py3langid
    except ImportError as error:
        raise ValueError(
            "the language histogram needs py3langid, which is not installed; "
            "run pip install 'vlm-template[doctor]', or set doctor.languages=false"
        ) from error
    py3langid.classify("")  # read the model now, once for all worker processes

    def identify(text: str) -> str:
        text = text.strip()[:LONGEST]
        return "short" if len(text.encode("utf-8", "replace")) < SHORT else py3langid.classify(text)[0]

    return identify
