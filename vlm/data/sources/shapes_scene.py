"""Scenes of colored shapes on a 3x3 grid: their objects, their split and their image."""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from vlm.schema import Split

SHAPES = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 0),
    "yellow": (245, 215, 0),
    "green": (34, 139, 34),
    "blue": (31, 80, 214),
    "purple": (142, 36, 170),
    "black": (20, 20, 20),
}
BACKGROUND = (250, 250, 250)
VAL_ONE_IN = 10  # one scene in ten is held out


@dataclass(frozen=True, order=True)
class Thing:
    """An object of a scene. Objects are sorted in reading order: by row of the grid, then by column."""

    row: int
    column: int
    shape: str
    color: str


def split_of(things: list[Thing]) -> Split:
    """The split of a scene, for any seed."""
    # A fixed spelling, not repr(): a change of the class must not move scenes between the splits.
    spelled = [f"Thing(row={t.row}, column={t.column}, shape={t.shape!r}, colour={t.color!r})" for t in things]
    digest = hashlib.blake2b(f"[{', '.join(spelled)}]".encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "big") % VAL_ONE_IN == 0 else "train"


def draw(things: list[Thing], *, rng: random.Random, size: int) -> Image.Image:
    """Draw a scene. Each object has 60 to 85 % of its cell's size, at a random position inside the cell."""
    image = Image.new("RGB", (size, size), BACKGROUND)
    canvas = ImageDraw.Draw(image)
    cell = size / 3
    for thing in things:
        radius = cell / 2 * rng.uniform(0.6, 0.85)
        free = cell / 2 - radius
        x = (thing.column + 0.5) * cell + rng.uniform(-free, free)
        y = (thing.row + 0.5) * cell + rng.uniform(-free, free)
        color = COLORS[thing.color]
        if thing.shape == "circle":
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
        else:
            canvas.polygon([(x + radius * dx, y + radius * dy) for dx, dy in OUTLINES[thing.shape]], fill=color)
    return image


def _ring(corners: int, radii: tuple[float, ...]) -> list[tuple[float, float]]:
    """Corners around a center, the first one at the top; their distances alternate between `radii`."""
    angles = [2 * math.pi * i / corners for i in range(corners)]
    return [(radii[i % len(radii)] * math.sin(a), -radii[i % len(radii)] * math.cos(a)) for i, a in enumerate(angles)]


OUTLINES = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": _ring(3, (1.0,)),
    "star": _ring(10, (1.0, 0.42)),
}
