"""Duplicate and near-duplicate images, found by hashes of 352 bytes each."""

from __future__ import annotations

from array import array
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DISTANCE = 3  # bits of 64 by which the difference hashes of near duplicates may differ
CELLS, COLOR = 4, 16  # levels of 256 by which the colors of the 4 x 4 cells of near duplicates may differ
SIMILARITY = 0.99  # minimum correlation of the 16 x 18 gray cells of near duplicates
CONTENT = (16, 18)
CONTRAST = 32  # standard deviation, in gray levels, below which MARGIN shrinks in proportion
MARGIN = 2  # minimum gray levels of a step; JPEG compression changes uniform areas by less
BANDS = np.arange(0, 64, 16, dtype=np.uint64)  # 3 different bits leave one of 4 bands equal


class ImageHash(NamedTuple):
    """Hashes of one image."""

    pixels: int  # hash of its size and pixels, 64 bits
    steps: int  # difference hash, 64 bits: whether each cell of a 9 x 8 grid is darker than its right neighbor
    colors: bytes  # mean colors of 4 x 4 cells, because different drawings can have the same steps
    # 16 x 18 gray cells, int8, mean 0 and standard deviation 32, because different X-rays agree in all other hashes.
    content: bytes


class ImageHashes:
    """The hashes of many images, 352 bytes each."""

    def __init__(self) -> None:
        self._pixels, self._steps, self._colors, self._content = array("Q"), array("Q"), array("B"), array("b")

    def __len__(self) -> int:
        return len(self._pixels)

    def append(self, image: ImageHash) -> None:
        self._pixels.append(image.pixels)
        self._steps.append(image.steps)
        self._colors.frombytes(image.colors)
        self._content.frombytes(image.content)

    def take(self, indices: NDArray[np.int64]) -> ImageHashes:
        """The hashes at these indices."""
        taken = ImageHashes()
        taken._pixels.extend(self.pixels[indices].tolist())
        taken._steps.extend(self.steps[indices].tolist())
        taken._colors.extend(self.colors[indices].flatten().tolist())
        taken._content.frombytes(self.content[indices].tobytes())
        return taken

    @property
    def pixels(self) -> NDArray[np.uint64]:
        return np.array(self._pixels, dtype=np.uint64)

    @property
    def steps(self) -> NDArray[np.uint64]:
        return np.array(self._steps, dtype=np.uint64)

    @property
    def colors(self) -> NDArray[np.int16]:
        return np.array(self._colors, dtype=np.int16).reshape(len(self), CELLS * CELLS * 3)

    @property
    def content(self) -> NDArray[np.int8]:
        return np.array(self._content, dtype=np.int8).reshape(len(self), CONTENT[0] * CONTENT[1])


def hash_image(image: Image.Image) -> ImageHash:
    """The hashes of an RGB image."""
    gray = np.asarray(image.resize((72, 64), Image.Resampling.BOX).convert("L"), dtype=np.float32)  # 64 72
    margin = MARGIN * min(1.0, max(0.125, float(gray.std()) / CONTRAST))
    steps = np.packbits(np.diff(_cells(gray, 8, 9)) > margin)
    content = _cells(gray, *CONTENT)
    content = (content - content.mean()) * (32 / max(0.5, float(content.std())))
    colors = image.resize((CELLS, CELLS), Image.Resampling.BOX).tobytes()
    return ImageHash(
        digest(f"{image.size}".encode() + image.tobytes()),
        int.from_bytes(steps.tobytes(), "big"),
        colors,
        np.clip(np.rint(content), -127, 127).astype(np.int8).tobytes(),
    )


def _cells(gray: NDArray[np.float32], rows: int, cols: int) -> NDArray[np.float32]:
    """The means of rows x cols cells."""
    height, width = gray.shape
    return gray.reshape(rows, height // rows, cols, width // cols).mean((1, 3))


def digest(data: bytes) -> int:
    """64 bits of a hash, the same in every process."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")


def closest(
    queries: ImageHashes,
    references: ImageHashes,
    before: NDArray[np.int64] | None = None,
    *,
    similarity: float = SIMILARITY,
) -> NDArray[np.int64]:
    """The index of the reference that is the nearest duplicate of each query, the first of several; -1 if none is near.

    An image is a near duplicate with at most `DISTANCE` different bits in the difference hash, similar colors, and
    contents that correlate by at least `similarity`. Two images without contrast have equal content, and equal images
    are always near. With `before`, query q is compared only with references before index `before[q]`.
    """
    wanted, known = queries.steps, references.steps
    wanted_colors, known_colors = queries.colors, references.colors
    wanted_content, known_content = _normalized(queries.content), _normalized(references.content)
    wanted_pixels, known_pixels = queries.pixels, references.pixels
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
            similar = np.abs(known_colors[near] - wanted_colors[query]).max(1, initial=0) <= COLOR
            correlation = known_content[near] @ wanted_content[query]
            flat = ~known_content[near].any(1) & ~wanted_content[query].any()
            similar &= (correlation >= similarity) | flat | (known_pixels[near] == wanted_pixels[query])
            near, distances = near[similar], distances[similar]
            if len(near):
                best = int(distances.argmin())
                if (distances[best], near[best]) < (least[query], found[query]):
                    least[query], found[query] = distances[best], near[best]
    return found


def _normalized(content: NDArray[np.int8]) -> NDArray[np.float32]:
    """Unit vectors, or zeros where an image has no contrast."""
    vectors = content.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
