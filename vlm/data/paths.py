"""Explains why a path does not exist, and which file was probably meant."""

from __future__ import annotations

import os
import re
from pathlib import Path

LONGEST = 1024  # characters; Linux allows 255 for the name of a file and 4,096 for a path


def why_not_a_path(name: str) -> str:
    """The reason why a name cannot be a path, with a remedy; it continues a sentence. Empty where it can be a path."""
    scheme = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]+):/", name)
    if scheme is not None:
        if scheme[1].lower() == "file":
            return "is a file: address; write the path without file://"
        return "is a web address; download the files first and write their paths"
    if re.match(r"[a-zA-Z]:[\\/]", name):
        return "is on a Windows drive; write its path on this machine, with slashes"
    if len(name) > LONGEST:
        is_base64 = re.fullmatch(r"[A-Za-z0-9+/=\s_-]*", name) is not None
        return f"is {'base64' if is_base64 else 'text'}, not a path" + (
            "; begin it with data:image/png;base64," if is_base64 else "; write a path"
        )
    return ""


def likely_path(name: str, *, root: Path) -> tuple[str, str] | None:
    """The path under `root` of the file that `name` probably means, and what is wrong with the name.

    Two mistakes are recognized: backslashes, and a name that begins with the last folders of `root` itself. None where
    `name` exists or neither mistake explains it.
    """
    path = name.replace("\\", "/")
    try:
        if os.path.exists(os.path.join(root, name)):
            return None
        if path != name and os.path.exists(os.path.join(root, path)):
            return path, "has backslashes"
        parts, home = path.split("/"), root.absolute().parts
        for number in range(1, min(len(parts), len(home))):
            if parts[:number] == list(home[-number:]) and root.joinpath(*parts[number:]).exists():
                return "/".join(parts[number:]), f"begins with the folder '{'/'.join(parts[:number])}' a second time"
    except (OSError, ValueError):  # an invalid file name
        pass
    return None
