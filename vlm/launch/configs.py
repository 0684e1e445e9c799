"""Where the config groups are, and which options each of them has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

# vlm/conf is a link to conf/ of the repository; an installed package holds a copy of it there.
CONF = str((Path(__file__).parents[1] / "conf").resolve())


def options_of(group: str) -> list[str]:
    """The options of a group that a user may choose."""
    return sorted(file.stem for file in Path(CONF, group).glob("[!_]*.yaml"))


def defaults(config: str) -> dict[str, str]:
    """The option that each group has unless the command line names another, in the order of the config files."""
    return dict(_defaults(Path(CONF, f"{config}.yaml")))


def _defaults(file: Path) -> Iterator[tuple[str, str]]:
    text = file.read_text(encoding="utf-8")
    if not (found := re.search(r"^defaults:\n((?:  .*\n)+)", text, re.MULTILINE)):
        return
    for line in found[1].splitlines():
        if pair := re.match(r"  - /?(\w+): (\[.*?\]|\w+)", line):
            group, option = pair[1], pair[2]
            yield group, option
            if not option.startswith("[") and (inner := Path(CONF, group, f"{option}.yaml")).exists():
                yield from _defaults(inner)
        elif (whole := re.fullmatch(r"  - (\w+)", line)) and whole[1] != "_self_":
            yield from _defaults(file.with_name(f"{whole[1]}.yaml"))
