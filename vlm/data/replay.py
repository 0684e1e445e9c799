"""`data.text_replay=`: mixes conversations without images into the training samples, against forgetting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm.data.annotations import existing_file
from vlm.data.sources.instruct import Instruct
from vlm.data.sources.mixture import Mixture
from vlm.schema import Source

REPLAY = Path(__file__).with_name("replay.jsonl")  # written for this project; half English, half Japanese


def with_replay(source: Source, *, ratio: float, annotations: str | None) -> Mixture:
    """The source mixed with conversations without images, which are `ratio` of the samples of an epoch.

    An epoch reads the source once. `annotations` is a file for `Instruct`; None uses the conversations of the project.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"data.text_replay={ratio} must be in (0, 1); set data.text_replay=0.1 for one sample in ten")
    file = REPLAY if annotations is None else existing_file(annotations, option="replay_annotations")
    try:
        texts = Instruct(split="train", annotations=file, images=None, val_fraction=0.0)
    except ValueError as error:
        raise ValueError(f"data.replay_annotations={file} must hold conversations without images: {error}") from error
    order = source.order(0, seed=0)
    size = len(source) if order is None else len(order)
    parts: dict[str, Any] = {"data": lambda split: source, "replay": lambda split: texts}
    weights = {"data": 1 - ratio, "replay": ratio}
    mixed = Mixture(split="train", sources=parts, weights=weights, num_samples=round(size / (1 - ratio)))
    mixed.left_out = source.left_out  # under the same keys as in the validation split
    return mixed
