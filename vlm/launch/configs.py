"""The files of conf/: where they are, which options and defaults the groups have, and their keys with comments."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

# vlm/conf is a link to conf/ of the repository; an installed package holds a copy of it there.
CONF = str((Path(__file__).parents[1] / "conf").resolve())


OF_EVAL = ("benchmark", "rival")  # groups of eval.py alone


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


def keys_of(path: Path) -> list[tuple[str, str | None, str | None]]:
    """Every key of a file: its dotted name, its value as it is written, and its comment.

    A section with a comment stands for those of its keys that have none; its value is None.
    """
    text = path.read_text(encoding="utf-8")
    if text.startswith("# @package _global_"):  # a choice of other options
        return []
    return list(_walk(yaml.compose(text), text.splitlines(), ""))


def _walk(
    node: yaml.Node, lines: Sequence[str], prefix: str, explained: bool = False
) -> Iterator[tuple[str, str | None, str | None]]:
    for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
        key = prefix + name.value
        if name.value in ("defaults", "_target_") or key == "hydra":
            continue
        section = isinstance(value, yaml.MappingNode) and not value.flow_style
        meaning = _meaning(lines, name.start_mark.line, name.end_mark.column if section else value.end_mark.column)
        if section:
            if meaning is not None:
                yield key, None, meaning
            yield from _walk(value, lines, f"{key}.", explained or meaning is not None)
        elif meaning is not None or not explained:
            line = lines[value.start_mark.line]
            yield key, line[value.start_mark.column : value.end_mark.column], meaning


def _meaning(lines: Sequence[str], number: int, column: int) -> str | None:
    """The comment after a key, or above it at its indentation."""
    line = lines[number]
    after = line[column:].partition("# ")[2]
    above: list[str] = []
    indent = line[: len(line) - len(line.lstrip())]
    while number > 0 and lines[number - 1].startswith(f"{indent}# "):
        number -= 1
        above.insert(0, lines[number].strip().removeprefix("# "))
    if number == 0:  # the comment that the file opens with
        above = []
    return " ".join([*above, after]).strip() or None
