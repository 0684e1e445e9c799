"""The rows of a split; bad samples are reported, counted and replaced."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from PIL.Image import Image
from torch.utils.data import Dataset

from vlm import files
from vlm.data.collate import Row, join
from vlm.data.sample_reader import SampleReader
from vlm.schema import BAD_KINDS, BadSample, Source, Split
from vlm.text.turns import count

STATES = ("good", *BAD_KINDS, "truncated")
MAX_REPORTED = 1000  # bad samples per split in the file of bad samples; the others are only counted


class Rows(Dataset[Row]):
    """`rows[indices]` is one row with these samples, packed one after the other.

    Index `epoch * len(rows) + i` is sample i in that epoch, augmented with a seed of its own. A bad sample is left out
    and reported in `bad_samples_file`, once even if the run is resumed; a row that would be empty gets another sample.
    `states` holds the index in `STATES` of each sample; a sample that was not read yet counts as good.

    Raises ValueError once more than `max_bad` samples of the split are bad, or if all of them are.
    """

    def __init__(
        self,
        *,
        source: Source,
        split: Split,
        reader: SampleReader,
        max_bad: int,
        bad_samples_file: Path | None,
        augment: Callable[[Image, str], Image] | None = None,
        seed: int = 0,
    ) -> None:
        self.source, self.split, self.reader = source, split, reader
        self.augment, self.seed = augment, seed
        self.max_bad, self.bad_samples_file = max_bad, bad_samples_file
        self._latest_error: BadSample | None = None
        self.states = torch.zeros(len(source), dtype=torch.uint8).share_memory_()  # shared with the workers
        if bad_samples_file is not None and bad_samples_file.exists():
            for line in bad_samples_file.read_text(encoding="utf-8").split("\n"):
                with suppress(ValueError, LookupError):  # an incomplete line, if the run was killed
                    entry = json.loads(line)
                    if entry["split"] == split:
                        self.states[entry["index"]] = STATES.index(entry["kind"])

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: Sequence[int]) -> Row:
        rows = [row for row in map(self._read, indices) if row is not None]
        return join(rows or [self._replacement(indices[-1])])

    def _replacement(self, index: int) -> Row:
        """The row of another sample of the same epoch, in place of a bad one.

        Long strides reach a good sample sooner, because the images of a missing folder have consecutive indices.
        """
        num = len(self.source)
        epoch, index = divmod(index, num)
        stride = round(num * 0.618) or 1
        while math.gcd(stride, num) > 1:
            stride += 1
        for number in range(1, num):
            row = self._read(epoch * num + (index + number * stride) % num)
            if row is not None:
                return row
        raise self.none_left()

    def none_left(self) -> ValueError:
        """The error for a split in which every sample is bad."""
        what = f"none of the {len(self.source)} samples of {self.split} can be used"
        return ValueError(f"{what}; repair the data, for example: {self._latest_error}")

    def _read(self, index: int) -> Row | None:
        epoch, index = divmod(index, len(self.source))
        try:
            sample = self.reader.sample(self.source, index)
            encoded = self.reader.encoded(sample)
            if self.augment is not None:
                seeds = (f"{self.seed} {epoch} {index} {number}" for number in range(len(sample.images)))
                sample = replace(sample, images=list(map(self.augment, sample.images, seeds)))
            row = self.reader.row(sample, encoded)
        except BadSample as error:
            self.report(index, error)
            return None
        if encoded.num_cut:
            self.states[index] = STATES.index("truncated")
        return row

    def report(self, index: int, error: BadSample) -> None:
        """Count a bad sample and write it to the file of bad samples, once. Raises ValueError as `check` does."""
        self._latest_error = error
        if self.states[index]:
            return
        self.states[index] = STATES.index(error.kind)
        num_bad = int(((self.states > 0) & (self.states < STATES.index("truncated"))).sum())
        self.check(num_bad, error)
        if self.bad_samples_file is not None and num_bad <= MAX_REPORTED:
            entries = [{"split": self.split, "index": index, "kind": error.kind, "error": str(error)}]
            if num_bad == MAX_REPORTED:
                entries.append({"split": self.split, "note": "more are counted, not named"})
            text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
            with files.append(self.bad_samples_file) as file:
                file.write(text)

    def check(self, num_bad: int, error: BadSample) -> None:
        """Raise ValueError if `num_bad` exceeds `max_bad`; `error` is that of the latest bad sample."""
        if num_bad > self.max_bad:
            remedy = "data.max_bad_ratio" if self.max_bad else "data.on_bad_sample=skip and data.max_bad_ratio"
            ratio = num_bad / len(self.source)
            more = f", or set {remedy} above {ratio:.2g}" if ratio < 1 else ""
            raise ValueError(
                f"{error} ({count(num_bad, 'bad sample')} of {len(self.source)}, {self.max_bad} allowed: "
                f"repair them{more})"
            ) from error
