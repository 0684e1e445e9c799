"""`data.filter=`: samples that the doctor found wanting are left out, and nothing else of the split changes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.schema import BadSample, Sample, Source, Split

CHECKED = 32  # samples whose ids are compared: each has to be read


class Filtered:
    """A source without some of its samples; the others keep their order.

    It has `outline`, `order` and `names` where the source has them. `left_out` counts these samples too.
    """

    def __init__(self, source: Source, *, left_out: Sequence[int]) -> None:
        self.source: Any = source
        gone = set(left_out)
        self.kept = [index for index in range(len(source)) if index not in gone]
        self.left_out = {**getattr(source, "left_out", {}), "samples by data.filter": len(gone)}
        if hasattr(source, "names"):
            self.names = source.names
        if hasattr(source, "outline"):
            self.outline = self._outline
        if hasattr(source, "order"):
            self.order = self._order

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.kept[index]]

    def _outline(self, index: int) -> Sample:
        return self.source.outline(self.kept[index])

    def _order(self, epoch: int, *, seed: int) -> list[int]:
        places = {index: place for place, index in enumerate(self.kept)}
        return [places[index] for index in self.source.order(epoch, seed=seed) if index in places]


def filtered(sources: Mapping[Split, Source], file: str) -> dict[Split, Source]:
    """The splits without the samples that the file names.

    Raises ValueError where there is no such file, or where it was made for other data: another number of samples, or
    other ids.
    """
    try:
        splits = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
        kept: dict[Split, Source] = {}
        for split, source in sources.items():
            indices, ids = splits[split]["indices"], splits[split]["ids"]
            _check(file, split, source, splits[split]["num_samples"], dict(zip(indices, ids, strict=True)))
            kept[split] = Filtered(source, left_out=indices)
        return kept
    except FileNotFoundError as error:
        raise ValueError(f"there is no file '{file}'; set data.filter= to a filter.json of vlm-doctor") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"'{file}' is not a filter.json ({error!r}); run vlm-doctor again") from error


def _check(file: str, split: Split, source: Source, num_samples: int, ids: Mapping[int, str | None]) -> None:
    if num_samples != len(source):
        raise ValueError(
            f"data.filter={file} was made for {num_samples} samples of {split}, which has {len(source)}; "
            "run vlm-doctor again"
        )
    step = -(-len(ids) // CHECKED) or 1
    for index in list(ids)[::step]:
        now = _id(source, index)
        if now != ids[index]:
            raise ValueError(
                f"data.filter={file} names sample {index} of {split} {ids[index]!r}, which is now {now!r}; "
                "run vlm-doctor again"
            )


def _id(source: Any, index: int) -> str | None:
    """The sample's id; None for one that cannot be read."""
    try:
        return source[index].id
    except BadSample:
        return None
