"""A split as rows of a batch; bad samples are named, counted and replaced."""

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
from vlm.data.judge import Judge
from vlm.schema import BAD_KINDS, BadSample, Source, Split
from vlm.text.turns import count

STATES = ("sound", *BAD_KINDS, "truncated")
NAMED = 1000  # bad samples of a split that the file names


class Rows(Dataset[Row]):
    """`rows[indices]` is the row of these samples, packed side by side.

    Index `epoch * len(rows) + i` is sample i in that epoch, augmented with the epoch's own seed. A bad sample is named
    in `bad_samples_file` and left out; an empty row gets another sample. Samples that the file already names, as in a
    resumed run, are not named again, and beyond `NAMED` per split they are only counted. `states` is the index in
    `STATES` of every sample read so far. Raises ValueError once more than `max_bad` samples of the split are bad, or if
    all of them are.
    """

    def __init__(
        self,
        *,
        source: Source,
        split: Split,
        judge: Judge,
        max_bad: int,
        bad_samples_file: Path | None,
        augment: Callable[[Image, str], Image] | None = None,
        seed: int = 0,
    ) -> None:
        self.source, self.split, self.judge = source, split, judge
        self.augment, self.seed = augment, seed
        self.max_bad, self.bad_samples_file = max_bad, bad_samples_file
        self._latest: BadSample | None = None
        self.states = torch.zeros(len(source), dtype=torch.uint8).share_memory_()  # seen by every worker
        if bad_samples_file is not None and bad_samples_file.exists():
            for line in bad_samples_file.read_text(encoding="utf-8").split("\n"):
                with suppress(ValueError, LookupError):  # a line that was being written when the run was killed
                    named = json.loads(line)
                    if named["split"] == split:
                        self.states[named["index"]] = STATES.index(named["kind"])

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: Sequence[int]) -> Row:
        made = [row for row in map(self._read, indices) if row is not None]
        return join(made or [self._another(indices[-1])])

    def _another(self, index: int) -> Row:
        """The row of another sample of the same epoch, to replace a bad one.

        Each is tried once, in long strides: the images of a missing folder are next to each other.
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
        return ValueError(f"{what}; repair the data, for example: {self._latest}")

    def _read(self, index: int) -> Row | None:
        epoch, index = divmod(index, len(self.source))
        try:
            sample = self.judge.sample(self.source, index)
            encoded = self.judge.encoded(sample)
            if self.augment is not None:
                seeds = (f"{self.seed} {epoch} {index} {number}" for number in range(len(sample.images)))
                sample = replace(sample, images=list(map(self.augment, sample.images, seeds)))
            row = self.judge.row(sample, encoded)
        except BadSample as error:
            self.quarantine(index, error)
            return None
        if encoded.num_cut:
            self.states[index] = STATES.index("truncated")
        return row

    def quarantine(self, index: int, error: BadSample) -> None:
        """Name and count a bad sample, once."""
        self._latest = error
        if self.states[index]:
            return
        self.states[index] = STATES.index(error.kind)
        num_bad = int(((self.states > 0) & (self.states < STATES.index("truncated"))).sum())
        self.check(num_bad, error)
        if self.bad_samples_file is not None and num_bad <= NAMED:
            named = {"split": self.split, "index": index, "kind": error.kind, "error": str(error)}
            lines = [named, *([{"split": self.split, "note": "more are counted, not named"}] * (num_bad == NAMED))]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            with files.append(self.bad_samples_file) as file:
                file.write(text)

    def check(self, num_bad: int, error: BadSample) -> None:
        """Raise ValueError, naming the latest bad sample, if `num_bad` exceeds `max_bad`."""
        if num_bad > self.max_bad:
            remedy = "data.max_bad_ratio" if self.max_bad else "data.on_bad_sample=skip and data.max_bad_ratio"
            ratio = num_bad / len(self.source)
            more = f", or set {remedy} above {ratio:.2g}" if ratio < 1 else ""
            raise ValueError(
                f"{error} ({count(num_bad, 'bad sample')} of {len(self.source)}, {self.max_bad} allowed: "
                f"repair them{more})"
            ) from error
