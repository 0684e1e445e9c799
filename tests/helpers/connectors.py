"""Connectors of every option, made as a run makes them."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf
from torch import nn

from vlm.options import bind

CONF = Path(__file__).parents[2] / "conf" / "connector"
OPTIONS = sorted(path.stem for path in CONF.glob("*.yaml"))
SIZES = {"vision_width": 48, "llm_width": 40, "grid": (3, 4), "output_rms": 1.03}
GRIDS = {"pixel_shuffle": (2, 4), "c_abstractor": (3, 3)}  # of those that do not take every grid


def build_connector(option: str, **changes: object) -> nn.Module:
    sizes = {**SIZES, "grid": GRIDS.get(option, SIZES["grid"])}
    own = {k: v for k, v in changes.items() if k not in SIZES}
    config = OmegaConf.load(CONF / f"{option}.yaml")
    del config["lr"]  # the stage's
    options = OmegaConf.to_container(OmegaConf.merge(config, own))
    return bind("connector", options, {**sizes, **{k: v for k, v in changes.items() if k in SIZES}})()
