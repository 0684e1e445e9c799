"""How an option is written so that Hydra, and a shell, read it back."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

# An option whose key ends in one of these holds a path (or a hub id), in whichever group it stands.
PATHS = frozenset(
    {
        *("ckpt", "run_dir", "resume", "resume.run", "plan.json", "out", "against", "run.dir", "sweep.dir", "save_dir"),
        *("annotations", "val_annotations", "replay_annotations", "images", "root", "val_root", "shards", "val_shards"),
        *("questions", "rival.cache", "path", "filter", "pretrained", "init_from"),
    }
)
MANY = ("logger", "callbacks", "evaluators", "benchmark")  # groups of which a run has any number of options


def override(key: str, value: Any) -> str:
    """`key=value` as Hydra reads it back."""
    return f"{key}={written(value)}"


def chosen(hydra: Any) -> dict[str, str | None]:
    """The option of each group; of one with several (logger=[csv,wandb]), which Hydra leaves out, the list as given."""
    given = OverridesParser.create().parse_overrides(list(hydra.overrides.task))
    several = {o.key_or_group: o.value() for o in given if o.key_or_group in MANY}
    lists = {
        group: f"[{','.join(map(str, options))}]" for group, options in several.items() if isinstance(options, list)
    }
    return {**hydra.runtime.choices, **lists}


def holds_path(key: str) -> bool:
    """Whether an option's value is a path, by its name."""
    words = key.lstrip("+").split(".")
    return words[-1] in PATHS or ".".join(words[-2:]) in PATHS


def absolute_paths(options: Mapping[str, Any], prefix: str = "data") -> dict[str, Any]:
    """Options with the paths among them from this folder on, for a program that goes to another."""
    return {key: _absolute(value, f"{prefix}.{key}") for key, value in options.items()}


def _absolute(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return absolute_paths(value, key)
    return os.path.abspath(os.path.expanduser(value)) if isinstance(value, str) and holds_path(key) else value


def written(value: Any) -> str:
    """A value in Hydra's grammar; a text is quoted where it would be taken for something else."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{written(each)}' for key, each in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = str(value)
    try:
        same = OverridesParser.create().parse_override(f"x={text}").value() == value
    except HydraException:
        same = False
    # In Hydra's quotes a backslash is one, but those before a quote are written twice.
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + (r"\'" if found[2] else ""), text)
    return text if same else f"'{escaped}'"


def for_shell(word: str) -> str:
    """A word for the shell, which stays readable where Hydra's quotes are in it."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)
