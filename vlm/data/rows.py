"""A split as the rows that a batch is made of; samples that cannot be used are named and counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL.Image import Image
from torch.utils.data import Dataset

from vlm.data.collate import Row, join, make_row
from vlm.schema import BadSample, Source, VisualSpec
from vlm.text.encode import TextEncoder


class Rows(Dataset[Row]):
    """`rows[indices]` is the row of these samples, side by side. From the number of samples on, an index means the same
    samples in later epochs, which `augment` shows otherwise.

    A sample that cannot be used is named in a file and left out; where none is left, the next one takes its place.
    Raises ValueError once more than `max_bad` samples of the split are bad.
    """

    def __init__(
        self,
        *,
        source: Source,
        text: TextEncoder,
        spec: VisualSpec,
        max_bad: int,
        bad_samples_file: Path | None,
        augment: Callable[[Image, str], Image] | None = None,
        seed: int = 0,
    ) -> None:
        self.source, self.text, self.spec = source, text, spec
        self.augment, self.seed = augment, seed
        self.max_bad, self.bad_samples_file = max_bad, bad_samples_file
        self.bad = torch.zeros(len(source), dtype=torch.bool).share_memory_()  # seen by every worker

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: Sequence[int]) -> Row:
        made = [row for row in map(self._read, indices) if row is not None]
        index = indices[-1]
        while not made:
            index += 1
            made = [row for row in [self._read(index)] if row is not None]
        return join(made)

    def _read(self, index: int) -> Row | None:
        epoch, index = divmod(index, len(self.source))
        try:
            sample = self.source[index]
            if self.augment is not None:
                seeds = (f"{self.seed} {epoch} {index} {number}" for number in range(len(sample.images)))
                sample = replace(sample, images=list(map(self.augment, sample.images, seeds)))
            encoded = self.text.encode(sample.id, sample.messages, len(sample.images), sample.sizes)
            return make_row(sample, encoded, self.spec)
        except BadSample as error:
            self._quarantine(index, error)
            return None

    def _quarantine(self, index: int, error: BadSample) -> None:
        if self.bad[index]:
            return
        self.bad[index] = True
        num_bad = int(self.bad.sum())
        if num_bad > self.max_bad:
            remedy = "data.max_bad_share" if self.max_bad else "data.on_bad_sample=skip and data.max_bad_share"
            raise ValueError(
                f"{error} ({num_bad} bad samples of {len(self.source)}, {self.max_bad} allowed: repair them, or set "
                f"{remedy} above {num_bad / len(self.source):.2g})"
            ) from error
        if self.bad_samples_file is not None:
            with open(self.bad_samples_file, "a") as file:
                file.write(json.dumps({"index": index, "error": str(error)}, ensure_ascii=False) + "\n")
