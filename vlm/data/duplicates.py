"""Which pictures are the same, or nearly: a few bytes of each are kept and compared, never the pictures."""

from __future__ import annotations

from array import array
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DISTANCE = 3  # bits of 64 in which the hashes of near duplicates may differ
CELLS, COLOUR = 4, 16  # and the levels of 256 by which the colours of the 4 x 4 cells of near duplicates may differ
MARGIN = 2  # grey levels that count as a step: plain areas of a photograph differ by less once it is a JPEG again
BANDS = np.arange(0, 64, 16, dtype=np.uint64)  # of 4 bands, 3 changed bits leave one as it is


class Look(NamedTuple):
    """What is kept of a picture."""

    pixels: int  # hash of its size and pixels, 64 bits
    steps: int  # difference hash: is each cell of 9 x 8 darker than its right neighbour? 64 bits
    colours: bytes  # the mean colours of 4 x 4 cells: plain drawings share their steps


class Looks:
    """The looks of many pictures, 64 bytes each."""

    def __init__(self) -> None:
        self._pixels, self._steps, self._colours = array("Q"), array("Q"), array("B")

    def __len__(self) -> int:
        return len(self._pixels)

    def append(self, look: Look) -> None:
        self._pixels.append(look.pixels)
        self._steps.append(look.steps)
        self._colours.frombytes(look.colours)

    def take(self, indices: NDArray[np.int64]) -> Looks:
        """The looks at these indices."""
        taken = Looks()
        taken._pixels.extend(self.pixels[indices].tolist())
        taken._steps.extend(self.steps[indices].tolist())
        taken._colours.extend(self.colours[indices].flatten().tolist())
        return taken

    @property
    def pixels(self) -> NDArray[np.uint64]:
        return np.array(self._pixels, dtype=np.uint64)

    @property
    def steps(self) -> NDArray[np.uint64]:
        return np.array(self._steps, dtype=np.uint64)

    @property
    def colours(self) -> NDArray[np.int16]:
        return np.array(self._colours, dtype=np.int16).reshape(len(self), CELLS * CELLS * 3)


def look(image: Image.Image) -> Look:
    """The look of an RGB picture."""
    grey = np.asarray(image.resize((9, 8), Image.Resampling.BOX).convert("L"), dtype=np.int16)
    steps = np.packbits(grey[:, 1:] - grey[:, :-1] > MARGIN).tobytes()
    colours = image.resize((CELLS, CELLS), Image.Resampling.BOX).tobytes()
    return Look(digest(f"{image.size}".encode() + image.tobytes()), int.from_bytes(steps, "big"), colours)


def digest(data: bytes) -> int:
    """64 bits of a hash, the same in every process."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")


def closest(queries: Looks, references: Looks, before: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """For each query the reference that differs from it in the fewest bits, the earliest of them; -1 if none is near.

    With `before`, query q is compared with the references in front of number `before[q]` alone.
    """
    wanted, known = queries.steps, references.steps
    wanted_colours, known_colours = queries.colours, references.colours
    limits = np.full(len(wanted), len(known)) if before is None else before
    found = np.full(len(wanted), -1)
    least = np.full(len(wanted), DISTANCE + 1)
    for shift in BANDS:
        bands: Any = (known >> shift) & np.uint64(0xFFFF)
        order = np.argsort(bands, kind="stable")
        mine = (wanted >> shift) & np.uint64(0xFFFF)
        starts, stops = (np.searchsorted(bands[order], mine, side=side) for side in ("left", "right"))
        for query in np.flatnonzero(starts < stops):
            near = order[starts[query] : stops[query]]
            near = near[: np.searchsorted(near, limits[query])]
            distances = np.bitwise_count(known[near] ^ wanted[query])
            near, distances = near[distances <= DISTANCE], distances[distances <= DISTANCE]
            alike = np.abs(known_colours[near] - wanted_colours[query]).max(1, initial=0) <= COLOUR
            near, distances = near[alike], distances[alike]
            if len(near):
                best = int(distances.argmin())
                if (distances[best], near[best]) < (least[query], found[query]):
                    least[query], found[query] = distances[best], near[best]
    return found
