"""The LightningDataModule: a source's two splits become batches that the model's eye and tongue can read."""

from __future__ import annotations

import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler

from vlm.data.collate import Row, collate, make_row
from vlm.data.preflight import PreflightReport, preflight
from vlm.schema import BadSample, Batch, Source, Split, VisualSpec
from vlm.text.encode import TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class VLMDataModule(pl.LightningDataModule):
    """Serves the splits of one source.

    Args:
        source: makes a split from its name.
        batch_size: rows a batch and rank.
        num_workers: processes that read and transform samples; 0 reads in the training process.
        max_length: tokens a row may have, visual tokens included.
        train_on, system_prompt, too_long: as `TextEncoder` takes them.
        num_val_samples: how many of the held-out samples every validation takes (None: all).
        on_bad_sample: `raise` at the first sample that cannot be read, or `skip` it.
        max_bad_share: with `skip`, the share of bad samples above which the run stops all the same.
        seed: of the order of the samples.
        bad_samples_file: where skipped samples are named; None writes nothing.

    `connect` tells what only the model knows; call it before a loader is asked for.
    """

    def __init__(
        self,
        *,
        source: Callable[..., Source],
        batch_size: int = 8,
        num_workers: int = 0,
        max_length: int = 512,
        train_on: Literal["assistant", "last_assistant", "all"] = "assistant",
        system_prompt: str | None = None,
        too_long: Literal["drop", "truncate_text"] = "drop",
        num_val_samples: int | None = 128,
        on_bad_sample: Literal["raise", "skip"] = "skip",
        max_bad_share: float = 0.01,
        seed: int = 0,
        bad_samples_file: Path | None = None,
    ) -> None:
        super().__init__()
        self.splits: dict[Split, Source] = {"train": source(split="train"), "val": source(split="val")}
        for split, samples in self.splits.items():
            if len(samples) < 2:
                raise ValueError(f"the {split} split has {len(samples)} samples, it needs at least 2; see data.*")
        self.batch_size, self.num_workers, self.max_length = batch_size, num_workers, max_length
        self.train_on, self.system_prompt, self.too_long = train_on, system_prompt, too_long
        self.num_val_samples, self.seed = num_val_samples, seed
        self.max_bad_share = 0.0 if on_bad_sample == "raise" else max_bad_share
        self.bad_samples_file = bad_samples_file

    def connect(self, *, spec: VisualSpec, tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> None:
        """Learn what a picture and a word are to the model."""
        self.spec = spec
        self.text = TextEncoder(
            tokenizer=tokenizer,
            num_image_tokens=spec.num_tokens,
            max_length=self.max_length,
            chat_template=chat_template,
            tile_rows=spec.tile_rows,
            row_separator=spec.row_separator,
            train_on=self.train_on,
            system_prompt=self.system_prompt,
            too_long=self.too_long,
        )

    def preflight(self, *, num_samples: int, show: int) -> list[PreflightReport]:
        """Read some samples of each split as training will, and stop at what would train wrongly."""
        return [
            preflight(name=split, source=source, encoder=self.text, num_samples=num_samples, show=show)
            for split, source in self.splits.items()
        ]

    def train_dataloader(self) -> DataLoader[Batch]:
        generator = torch.Generator().manual_seed(self.seed)
        sampler = RandomSampler(self.splits["train"], generator=generator)
        return self._loader("train", batch_size=self.batch_size, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        indices = self.val_indices(self.num_val_samples)
        return self._loader("val", batch_sampler=EvenBatches(indices, batch_size=max(2, self.batch_size)))

    def val_indices(self, limit: int | None) -> list[int]:
        """Up to `limit` held-out samples, spread evenly over the split."""
        num = len(self.splits["val"])
        wanted = num if limit is None else min(limit, num)
        return [i * num // wanted for i in range(wanted)]

    def prompts(self, indices: Sequence[int]) -> Batch:
        """Held-out samples up to their last answer, left-padded to generate from."""
        rows = []
        for index in indices:
            sample = self.splits["val"][index]
            encoded = self.text.encode_prompt(sample.id, sample.messages, len(sample.images), sample.sizes)
            rows.append(make_row(sample, encoded, self.spec))
        return collate(rows, spec=self.spec, pad_id=self.text.pad_id, side="left")

    def _loader(self, split: Split, **options: Any) -> DataLoader[Batch]:
        dataset: Any = Rows(  # collation makes batches of its rows
            source=self.splits[split],
            text=self.text,
            spec=self.spec,
            max_bad=int(self.max_bad_share * len(self.splits[split])),
            bad_samples_file=self.bad_samples_file,
        )
        return DataLoader(
            dataset,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            multiprocessing_context=multiprocessing.get_context("fork") if self.num_workers else None,
            collate_fn=partial(collate, spec=self.spec, pad_id=self.text.pad_id),
            pin_memory=torch.cuda.is_available(),
            **options,
        )


class Rows(Dataset[Row]):
    """A split as rows. A sample that cannot be used is named in a file and the next one takes its place.

    Raises ValueError once more than `max_bad` samples of the split are bad.
    """

    def __init__(
        self, *, source: Source, text: TextEncoder, spec: VisualSpec, max_bad: int, bad_samples_file: Path | None
    ) -> None:
        self.source, self.text, self.spec = source, text, spec
        self.max_bad, self.bad_samples_file = max_bad, bad_samples_file
        self.bad = torch.zeros(len(source), dtype=torch.bool).share_memory_()  # seen by every worker

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Row:
        while True:
            try:
                sample = self.source[index]
                encoded = self.text.encode(sample.id, sample.messages, len(sample.images), sample.sizes)
                return make_row(sample, encoded, self.spec)
            except BadSample as error:
                self._quarantine(index, error)
            index = (index + 1) % len(self.source)

    def _quarantine(self, index: int, error: BadSample) -> None:
        if self.bad[index]:
            return
        self.bad[index] = True
        num_bad = int(self.bad.sum())
        if num_bad > self.max_bad:
            raise ValueError(
                f"{error} ({num_bad} bad samples of {len(self.source)}, {self.max_bad} allowed: repair them, or set "
                f"data.on_bad_sample=skip and data.max_bad_share above {num_bad / len(self.source):.2g})"
            ) from error
        if self.bad_samples_file is not None:
            with open(self.bad_samples_file, "a") as file:
                file.write(json.dumps({"index": index, "error": str(error)}, ensure_ascii=False) + "\n")


class EvenBatches(Sampler[list[int]]):
    """Batches whose sizes differ by one at most, so that the last never holds a lonely image."""

    def __init__(self, indices: Sequence[int], *, batch_size: int) -> None:
        num = -(-len(indices) // batch_size)
        bounds = [i * len(indices) // num for i in range(num + 1)]
        self.batches = [list(indices[a:b]) for a, b in itertools.pairwise(bounds)]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)
