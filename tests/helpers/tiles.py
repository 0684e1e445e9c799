"""LLaVA-NeXT's grids of tiles, images of many shapes, and the config of a tiny model."""

from __future__ import annotations

from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

from vlm import config
from vlm.encoders.tiles import TiledTransform, Tiles
from vlm.encoders.transform import Transform
from vlm.launch.entry import CONF

NEXT = [[1, 2], [2, 1], [2, 2], [1, 3], [3, 1]]  # LLaVA-NeXT's
SIZES = [(336, 336), (100, 100), (1, 1), (336, 337), (1000, 1000), (640, 480), (480, 640), (1920, 1080), (1080, 1920)]
SIZES += [(3000, 500), (500, 3000), (9000, 10), (10, 9000), (672, 336), (336, 672), (1008, 336), (700, 1200), (67, 33)]


def tiles(grids: list[list[int]] = NEXT, side: int = 336) -> TiledTransform:
    whole = Transform(size=(side, side), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), interpolation="bicubic")
    return Tiles(grids=grids).tiled(whole)


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def settings(*overrides: str) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        return config.plain(
            compose("train", ["encoder=tiny", "llm=tiny", "run_dir=x", "data.batch_size=2", *overrides])
        )
