"""How an option is written so that Hydra, and a shell, read it back."""

from __future__ import annotations

import json
import shlex
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException


def override(key: str, value: Any) -> str:
    """`key=value` as Hydra reads it back."""
    return f"{key}={_written(value)}"


def _written(value: Any) -> str:
    """A value in Hydra's grammar; a text is quoted where it would be taken for something else."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_written(each)}' for key, each in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = str(value)
    try:
        same = OverridesParser.create().parse_override(f"x={text}").value() == value
    except HydraException:
        same = False
    escaped = text.replace("'", r"\'")
    return text if same else f"'{escaped}'"


def for_shell(word: str) -> str:
    """A word for the shell, which stays readable where Hydra's quotes are in it."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)
