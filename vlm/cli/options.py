"""Write docs/parts.md's tables and docs/options.md from conf/: `python -m vlm.cli.options`, `make options`.

The tables of encoders, connectors and LLMs hold figures: every part is built on the meta device, so they are those of
the code. The page of options holds each key with its value and its comment in the YAML file.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from vlm import config
from vlm.launch.configs import CONF, keys_of
from vlm.launch.plan import build_meta
from vlm.training import run

DOCS = Path(CONF).parent / "docs"
PARTS, OPTIONS = DOCS / "parts.md", DOCS / "options.md"
MARKS = ("<!-- options: written by `make options` -->\n", "<!-- end of options -->")
# The parts with which each part is counted. A connector's parameters depend on them, so it has those of LLaVA-1.5.
OTHER_PARTS = {
    "encoder": {"connector": "linear", "llm": "tiny"},
    "connector": {"encoder": "clip_vit_l14_336", "llm": "vicuna_7b"},
    "llm": {"encoder": "tiny", "connector": "linear"},
}
HEADINGS = {
    "encoder": ("`encoder=`", "what it is", "parameters", "patches per image", "width"),
    "connector": ("`connector=`", "what it is", "parameters", "visual tokens per image"),
    "llm": ("`llm=`", "what it is", "parameters", "width"),
}
PROGRAMS = {"train": "train.py", "eval": "eval.py", "doctor": "vlm-doctor"}
GROUPS = (
    *("model", "encoder", "connector", "llm", "objective", "evaluators", "data", "stage", "trainer"),
    *("callbacks", "logger", "benchmark", "rival", "experiment", "debug", "sweep", "hydra/launcher"),
)
OPENING = """# Every option

Written by `make options` from the comments in `conf/` (a test keeps it up to date). Give an option as `key=value`:

```text
python train.py connector=qformer connector.num_queries=64 trainer.max_steps=1000
```

The value in the tables is the default; `null` means none.

{groups}
"""


def tables() -> str:
    """The three tables of parts in Markdown."""
    with initialize_config_dir(CONF, version_base="1.3"):
        return "\n".join("".join(_table(group)) for group in HEADINGS)


def page() -> str:
    """All of docs/options.md."""
    links = " · ".join(f"[{group}](#{group.replace('/', '')})" for group in GROUPS)
    sections = [OPENING.format(groups=f"Groups: {links}.")]
    for name, program in PROGRAMS.items():
        sections += [f"## Keys of {program}\n", _keys([Path(CONF, f"{name}.yaml")], prefix="")]
    for group in GROUPS:
        sections += _section(group)
    return "\n".join(sections)


def write(parts: Path = PARTS, options: Path = OPTIONS) -> None:
    """Write both pages. Raises ValueError where the marks around the tables of parts are gone."""
    before, start, rest = parts.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not start or not end:
        raise ValueError(f"{parts} has no {MARKS[0].strip()} … {MARKS[1]}; put both lines where the tables belong")
    parts.write_text(before + start + "\n" + tables() + "\n" + end + after, encoding="utf-8")
    options.write_text(page(), encoding="utf-8")


def _table(group: str) -> Iterator[str]:
    headings = HEADINGS[group]
    yield f"| {' | '.join(headings)} |\n|{'|'.join(['---'] * 2 + ['---:'] * (len(headings) - 2))}|\n"
    for path in sorted(Path(CONF, group).glob("[!_]*.yaml")):
        yield f"| {' | '.join([f'`{path.stem}`', _comment(path), *_figures(group, path.stem)])} |\n"


def _comment(path: Path) -> str:
    """The first comment of a config, with links to its papers."""
    lines = path.read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if not line.startswith("# @package")).removeprefix("# ").rstrip(".")
    line = line.replace("|", r"\|").replace("<", r"\<")
    return re.sub(r"(?:arXiv )?(\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", line)


def _figures(group: str, option: str) -> list[str]:
    choices = {**OTHER_PARTS[group], group: option}
    cfg = compose("train", overrides=[*(f"{key}={value}" for key, value in choices.items()), "run_dir=none"])
    if OmegaConf.missing_keys(cfg[group]):  # the user chooses the model
        return ["any", *[""] * (len(HEADINGS[group]) - 3)]
    model, _ = build_meta(config.plain(cfg))
    parameters = f"{run.count_parameters(model)[group]['total']:,}"
    rows, cols = model.encoder.grid
    return {
        "encoder": [parameters, f"{rows}×{cols} = {rows * cols}", f"{model.encoder.width:,}"],
        "connector": [parameters, f"{model.connector.num_tokens}"],
        "llm": [parameters, f"{model.llm.width:,}"],
    }[group]


def _section(group: str) -> Iterator[str]:
    """A group: its options, then a table of keys for each class that options share."""
    paths = sorted(Path(CONF, group).glob("*.yaml"))
    options = [path for path in paths if not path.stem.startswith("_")]
    yield f"## {group}\n"
    if group in HEADINGS:
        yield f"The options of `{group}=` are listed in [parts.md](parts.md).\n"
    else:
        rows = [f"| `{path.stem}` | {_comment(path)} |" for path in options]
        yield "\n".join([f"| `{group}=` | |", "|---|---|", *rows, ""])
    if group in ("experiment", "debug", "sweep"):  # which only set keys of other groups
        return
    prefix = f"{group.replace('/', '.')}."
    shared = [path for path in paths if path not in options]
    if table := _keys(shared, prefix):
        yield f"Keys that every `{group}=` has:\n"
        yield table
    by_class: dict[Hashable, list[Path]] = defaultdict(list)
    for path in options:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        by_class[content.get("_target_") or tuple(content)].append(path)
    for same in by_class.values():
        # The table has the values of the file that explains the most keys.
        same.sort(key=lambda path: -sum(bool(meaning) for _, _, meaning in keys_of(path)))
        if table := _keys(same, prefix):
            others = ", ".join(f"`{path.stem}`" for path in sorted(same[1:]))
            yield f"Keys of `{group}={same[0].stem}`" + (
                f" (also of {others}, with their own values):\n" if others else ":\n"
            )
            yield table


def _keys(paths: Sequence[Path], prefix: str) -> str:
    """A table of the keys of files. A key of several files is that of the first.

    A key that a file takes from a base, such as `_loader`, needs no comment. Empty where there are no keys. Raises
    ValueError where a key has no comment.
    """
    rows: dict[str, str] = {}
    for path in paths:
        known, explained = tuple(rows), {key for base in _bases(path) for key, _, _ in keys_of(base)}
        for key, value, meaning in keys_of(path):
            if any(f"{key}.".startswith(f"{name}.") for name in known) or (meaning is None and key in explained):
                continue
            if meaning is None:
                raise ValueError(f"{path} does not explain {key}; write a comment after it")
            shown = {None: "", "???": "must be given"}.get(value, f"`{value}`")
            cells = (cell.replace("|", r"\|") for cell in (f"`{prefix}{key}`", shown, meaning.replace("<", r"\<")))
            rows[key] = f"| {' | '.join(cells)} |"
    return "\n".join(["| key | value | |", "|---|---|---|", *rows.values(), ""]) if rows else ""


def _bases(path: Path) -> list[Path]:
    """The files of the same folder that a file starts from."""
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    files = [path.parent / f"{name}.yaml" for name in content.get("defaults", []) if isinstance(name, str)]
    return [file for file in files if file.is_file()]


def main() -> None:
    argparse.ArgumentParser(prog="python -m vlm.cli.options", description=__doc__).parse_args()
    write()


if __name__ == "__main__":
    main()
