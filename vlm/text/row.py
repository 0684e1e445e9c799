"""The tokens of one conversation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Encoded:
    """T tokens, with `num_image_tokens` consecutive placeholders for each image or tile.

    `images_before[t]` counts the images that start before or at token t, which are the images that it may attend to. It
    is 0 before the first image, and j + 1 for the visual tokens of image j (from 0) and the text up to the next image.
    """

    input_ids: list[int]  # the pad id at placeholders of visual tokens
    image_mask: list[bool]  # True at placeholders of visual tokens
    images_before: list[int]
    labels: list[int]  # the token itself where it is supervised, else IGNORE
    text: str  # the rendered text, before any truncation, with IMAGE_PLACEHOLDER for each image
    num_cut: int = 0  # tokens cut off at the end
