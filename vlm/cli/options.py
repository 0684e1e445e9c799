"""Write the README's tables of encoders, connectors and LLMs from conf/: `python -m vlm.cli.options`, `make options`.

Every part is built on the meta device, so the figures are those of the code, not of a page somewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from vlm import config
from vlm.launch.entry import CONF
from vlm.launch.plan import build_meta
from vlm.training import run

README = Path(CONF).parent / "README.md"
MARKS = ("<!-- options: written by `make options` -->\n", "<!-- end of options -->")
# A part is counted beside these; the encoder and the LLM are LLaVA-1.5's.
BESIDE = {"encoder": "clip_vit_l14_336", "connector": "linear", "llm": "vicuna_7b"}
HEADINGS = {
    "encoder": ("`encoder=`", "what it is", "parameters", "patches an image", "width"),
    "connector": ("`connector=`", "what it is", "parameters", "visual tokens an image"),
    "llm": ("`llm=`", "what it is", "parameters", "width"),
}


def tables() -> str:
    """The three tables in Markdown."""
    with initialize_config_dir(CONF, version_base="1.3"):
        return "\n".join("".join(_table(group)) for group in HEADINGS)


def write(readme: Path = README) -> None:
    """Put the tables between their marks. Raises ValueError where the marks are gone."""
    before, start, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not start or not end:
        raise ValueError(f"{readme} has no {MARKS[0].strip()} … {MARKS[1]}; put both lines where the tables belong")
    readme.write_text(before + start + "\n" + tables() + "\n" + end + after, encoding="utf-8")


def _table(group: str) -> Iterator[str]:
    headings = HEADINGS[group]
    yield f"| {' | '.join(headings)} |\n|{'|'.join(['---'] * 2 + ['---:'] * (len(headings) - 2))}|\n"
    for path in sorted(Path(CONF, group).glob("[!_]*.yaml")):
        yield f"| {' | '.join([f'`{path.stem}`', _comment(path), *_figures(group, path.stem)])} |\n"


def _comment(path: Path) -> str:
    """A config's first line, its paper as a link."""
    line = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ").rstrip(".")
    return re.sub(r"(?:arXiv )?(\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", line)


def _figures(group: str, option: str) -> list[str]:
    choices = {**BESIDE, group: option}
    cfg = compose("train", overrides=[*(f"{key}={value}" for key, value in choices.items()), "run_dir=none"])
    if OmegaConf.missing_keys(cfg[group]):  # the user says which model it will be
        return ["any", *[""] * (len(HEADINGS[group]) - 3)]
    model, _ = build_meta(config.plain(cfg))
    parameters = f"{run.count_parameters(model)[group]['total']:,}"
    rows, cols = model.encoder.grid
    return {
        "encoder": [parameters, f"{rows}×{cols} = {rows * cols}", f"{model.encoder.width:,}"],
        "connector": [parameters, f"{model.connector.num_tokens}"],
        "llm": [parameters, f"{model.llm.width:,}"],
    }[group]


if __name__ == "__main__":
    write()
