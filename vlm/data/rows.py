"""A split as the rows that a batch is made of; samples that cannot be used are named and counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from PIL.Image import Image
from torch.utils.data import Dataset

from vlm.data.collate import Row, join, make_row
from vlm.schema import BAD_KINDS, BadSample, Source, Split, VisualSpec
from vlm.text.encode import TextEncoder

STATES = ("sound", *BAD_KINDS, "truncated")


class Rows(Dataset[Row]):
    """`rows[indices]` is the row of these samples, side by side. From the number of samples on, an index means the same
    samples in later epochs, which `augment` shows otherwise.

    A sample that cannot be used is named in a file and left out; where none is left, the next one takes its place. What
    the file names already, as it does in a run that goes on, is not named again. `states` has the number in `STATES` of
    every sample as far as they were read. Raises ValueError once more than `max_bad` samples of the split are bad.
    """

    def __init__(
        self,
        *,
        source: Source,
        split: Split,
        text: TextEncoder,
        spec: VisualSpec,
        max_bad: int,
        bad_samples_file: Path | None,
        augment: Callable[[Image, str], Image] | None = None,
        seed: int = 0,
    ) -> None:
        self.source, self.split, self.text, self.spec = source, split, text, spec
        self.augment, self.seed = augment, seed
        self.max_bad, self.bad_samples_file = max_bad, bad_samples_file
        self.states = torch.zeros(len(source), dtype=torch.uint8).share_memory_()  # seen by every worker
        if bad_samples_file is not None and bad_samples_file.exists():
            for line in bad_samples_file.read_text().splitlines():
                with suppress(ValueError, LookupError):  # a line that was being written when the run was killed
                    named = json.loads(line)
                    if named["split"] == split:
                        self.states[named["index"]] = STATES.index(named["kind"])

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
            row = make_row(sample, encoded, self.spec)
        except BadSample as error:
            self.quarantine(index, error)
            return None
        if encoded.num_cut:
            self.states[index] = STATES.index("truncated")
        return row

    def quarantine(self, index: int, error: BadSample) -> None:
        """Name and count a bad sample, unless that is done."""
        if self.states[index]:
            return
        self.states[index] = STATES.index(error.kind)
        num_bad = int(((self.states > 0) & (self.states < STATES.index("truncated"))).sum())
        if num_bad > self.max_bad:
            remedy = "data.max_bad_share" if self.max_bad else "data.on_bad_sample=skip and data.max_bad_share"
            raise ValueError(
                f"{error} ({num_bad} bad samples of {len(self.source)}, {self.max_bad} allowed: repair them, or set "
                f"{remedy} above {num_bad / len(self.source):.2g})"
            ) from error
        if self.bad_samples_file is not None:
            with open(self.bad_samples_file, "a") as file:
                named = {"split": self.split, "index": index, "kind": error.kind, "error": str(error)}
                file.write(json.dumps(named, ensure_ascii=False) + "\n")
