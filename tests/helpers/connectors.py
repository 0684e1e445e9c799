"""Connectors of every option, made as a run makes them: from their config file, with the sizes of their neighbors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vlm.options import bind

CONF = Path(__file__).parents[2] / "conf" / "connector"
OPTIONS = sorted(path.stem for path in CONF.glob("*.yaml"))
SIZES = {"vision_width": 48, "llm_width": 40, "grid": (3, 4), "output_rms": 1.03}
GRIDS = {"pixel_shuffle": (2, 4), "c_abstractor": (3, 3)}  # of those that do not take every grid


def settings(option: str, **changes: Any) -> dict[str, Any]:
    """The options of a config file, without the learning rates, which are the stage's."""
    config: Any = OmegaConf.to_container(OmegaConf.load(CONF / f"{option}.yaml"))
    del config["lr"]
    return {**config, **changes}


def build_connector(option: str, **changes: Any) -> Any:
    """The connector alone, between parts of `SIZES`; `changes` are of its options or of these sizes."""
    return _bound(option, {**SIZES, "grid": GRIDS.get(option, SIZES["grid"])}, changes)


def connect(option: str, encoder: Any, llm: Any, **changes: Any) -> Any:
    """The connector between two parts, told the sizes that `Composed.build` tells it."""
    sizes = {"vision_width": encoder.width, "grid": tuple(encoder.grid)}
    return _bound(option, {**sizes, "llm_width": llm.width, "output_rms": llm.embed_rms}, changes)


def _bound(option: str, sizes: dict[str, Any], changes: dict[str, Any]) -> Any:
    own = {key: value for key, value in changes.items() if key not in sizes}
    other = {key: value for key, value in changes.items() if key in sizes}
    return bind("connector", settings(option, **own), {**sizes, **other})()
