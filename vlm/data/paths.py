"""Diagnosis of paths that do not exist: why, and which file was probably meant."""

from __future__ import annotations

import os
import re
from pathlib import Path

LONGEST = 1024  # characters; Linux takes 255 for a file and 4,096 for a path


def no_path(name: str) -> str:
    """Why a name cannot be a path, with the remedy, as a phrase to follow the name; empty where it may be one."""
    scheme = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]+):/", name)
    if scheme is not None:
        if scheme[1].lower() == "file":
            return "is a file's address; write its path alone"
        return "is a web address; download the files first and write their paths"
    if re.match(r"[a-zA-Z]:[\\/]", name):
        return "is on a Windows drive; write its path on this machine, with slashes"
    if len(name) > LONGEST:
        is_base64 = re.fullmatch(r"[A-Za-z0-9+/=\s_-]*", name) is not None
        return f"is {'base64' if is_base64 else 'text'} and no path" + (
            "; begin it with data:image/png;base64," if is_base64 else "; write a path"
        )
    return ""


def likely_path(name: str, *, root: Path) -> tuple[str, str] | None:
    """The path under `root` of a file that exists where `name` does not, and what is wrong with the name.

    The name may have backslashes, or begin with the last folders of `root` itself.
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
