"""The tokens of one conversation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Encoded:
    """T tokens, with `num_image_tokens` consecutive placeholders for each image or tile.

    `images_before[t]` counts the images that start before or at token t, i.e. how many the token may attend to: the
    visual tokens of image j (from 0) and the text after them, up to the next image, have j + 1; text before has 0.
    """

    input_ids: list[int]  # the pad id where visual tokens go
    image_mask: list[bool]  # True where visual tokens go
    images_before: list[int]
    labels: list[int]  # the token itself where it is supervised, else IGNORE
    text: str  # as rendered, before any cut, with IMAGE_PLACEHOLDER for each image
    num_cut: int = 0  # tokens cut off at the end
