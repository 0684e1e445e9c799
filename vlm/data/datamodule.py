"""The LightningDataModule: the two splits of a source as batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Sampler

from vlm.data.augment import Augment
from vlm.data.batching import Batches, Batching, EvenBatches
from vlm.data.collate import Row, collate, image_key
from vlm.data.filter import filtered
from vlm.data.preflight import PreflightReport, preflight
from vlm.data.reading import Reading, applied
from vlm.data.replay import with_replay
from vlm.data.rows import STATES, Rows
from vlm.data.sample_reader import SampleReader
from vlm.data.shared import shared_images
from vlm.data.workers import WorkerContext
from vlm.quote import quoted
from vlm.ranges import BatchSize, Epochs, Name, Number, Range, Ratio, Samples, Seed, Tokens, Workers
from vlm.schema import BadSample, Batch, Form, Source, Split, VisualSpec
from vlm.text.encode import TextEncoder
from vlm.text.lengths import TooLong
from vlm.text.turns import count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


NUM_COMPARED = 4096  # validation samples whose images are compared with those of train
NUM_PROBED = 16  # training samples that stand for all of them


class VLMDataModule(pl.LightningDataModule):
    """Serves the splits of one source.

    Args:
        source: builds a split from its name.
        batch_size: rows per batch and rank.
        batching: training batches of `batch_size` rows (`samples`); of rows of similar length with up to `batch_tokens`
            tokens, padding included (`tokens`); or of `batch_size` rows all with or all without images (`modality`).
        batch_tokens: see `batching`.
        packing: put several training samples in a row of up to `max_length` tokens; they do not attend to each other.
        augment: the options of `Augment` for training images; None changes nothing.
        num_workers: processes that read and transform samples; 0 reads in the training process.
        max_length: maximum tokens of a row, visual tokens included.
        train_on, system_prompt, too_long: see `TextEncoder`.
        plain_answers: write answers in lower case without punctuation, as BLIP trains on captions.
        split_answers: give a random number of the first words of an answer with the question, in training only.
        num_val_samples: number of samples that each validation reads (None: all).
        on_bad_sample: `raise` at the first sample that cannot be read, or `skip` it.
        max_bad_ratio: with `skip`, the ratio of bad samples above which the run stops; above 0 it allows at least one.
        seed: seed of the order of the samples.
        epochs: how often a run reads each training sample, for `steps`; None does not say.
        bad_samples_file: a file that lists the skipped samples; None writes none.
        filter: the file of `vlm-doctor` that lists samples to leave out; None leaves out none.
        text_replay: the ratio of training samples that are conversations without images; 0 adds none.
        replay_annotations: a file of such conversations; None uses those of the project.
        reading: the options of `Reading`: limits, and the conversion of 16-bit images.
        feature_cache: whether features of a frozen part of the model are kept on disk, see
            `vlm.callbacks.feature_cache`; `auto` where that saves time.
        splits: which are read; an evaluation needs no training data.

    Call `connect`, which receives what the model determines, before any loader is made.

    Attributes:
        with_keys: whether batches have the keys of their images in the feature cache.
    """

    with_keys = False

    def __init__(
        self,
        *,
        source: Callable[..., Source],
        batch_size: BatchSize = 8,
        batching: Batching = "samples",
        batch_tokens: Tokens = 8192,
        packing: bool = False,
        augment: dict[str, Ratio] | None = None,
        num_workers: Workers = 0,
        max_length: Tokens = 512,
        train_on: Literal["assistant", "last_assistant", "all"] = "assistant",
        system_prompt: str | None = None,
        too_long: TooLong = "drop",
        plain_answers: bool = False,
        split_answers: bool = False,
        num_val_samples: Samples | None = 128,
        on_bad_sample: Literal["raise", "skip"] = "skip",
        max_bad_ratio: Ratio = 0.01,
        seed: Seed = 0,
        epochs: Epochs | None = None,
        bad_samples_file: Path | None = None,
        filter: Name | None = None,
        text_replay: Annotated[Number, Range(0, 0.9)] = 0.0,
        replay_annotations: Name | None = None,
        reading: dict[str, Any] | None = None,
        feature_cache: Literal["auto", "on", "off"] = "auto",
        splits: tuple[Split, ...] = ("train", "val"),
    ) -> None:
        super().__init__()
        self.reading = Reading(**(reading or {}))
        with applied(self.reading):
            self.splits: dict[Split, Source] = {split: source(split=split) for split in splits}
            if filter is not None:
                self.splits = filtered(self.splits, filter)
            for split, samples in self.splits.items():
                if len(samples) < (minimum := 2 if "train" in splits else 1):
                    raise ValueError(
                        f"the {split} split has {count(len(samples), 'sample')} and needs at least {minimum}; give "
                        "more data, or set the option of the source that splits them, such as data.val_fraction="
                    )
            if text_replay and "train" in splits:
                self.splits["train"] = with_replay(
                    self.splits["train"], ratio=text_replay, annotations=replay_annotations
                )
        if batching == "tokens" and batch_tokens < max_length:
            raise ValueError(
                f"data.batch_tokens={batch_tokens} is less than one row of data.max_length={max_length} tokens; "
                f"set data.batch_tokens={max_length} or more"
            )
        if batching == "modality" and packing:
            raise ValueError(
                "data.batching=modality has one sample in a row, and data.packing=true several; set data.packing=false"
            )
        self.batch_size, self.num_workers, self.max_length = batch_size, num_workers, max_length
        self.batching, self.batch_tokens, self.packing = batching, batch_tokens, packing
        if system_prompt is not None and "<image>" in system_prompt.replace(r"\<image>", ""):
            raise ValueError(
                f"data.system_prompt={quoted(system_prompt)} has <image>, but a system prompt has no image; write "
                r"\<image> for the word, or leave it out"
            )
        self.train_on, self.too_long = train_on, too_long
        self.plain_answers, self.split_answers = plain_answers, split_answers
        self.system_prompt = None if system_prompt is None else system_prompt.replace(r"\<image>", "<image>")
        self.augment = None if augment is None else Augment(**augment)
        self.num_val_samples, self.seed, self.epochs = num_val_samples, seed, epochs
        self.max_bad_ratio = 0.0 if on_bad_sample == "raise" else max_bad_ratio
        self.bad_samples_file, self.feature_cache = bad_samples_file, feature_cache
        self._start: dict[str, Any] | None = None  # position of the training batches to resume from

    def connect(
        self,
        *,
        spec: VisualSpec,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None,
        max_answers: int | None = None,
        form: Form = "conversation",
    ) -> None:
        """Set what depends on model and objective: images, text, the answers that a row may have, the form of rows.

        `max_answers` None allows any number.
        """
        self.spec, self.form = spec, form
        self.text = TextEncoder(
            tokenizer=tokenizer,
            num_image_tokens=spec.num_tokens,
            max_length=self.max_length,
            chat_template=chat_template,
            tile_rows=spec.tile_rows,
            row_separator=spec.row_separator,
            num_packed=spec.num_packed,
            image_token=spec.image_token,
            train_on=self.train_on,
            system_prompt=self.system_prompt,
            too_long=self.too_long,
        )
        self.reader = SampleReader(
            text=self.text,
            spec=spec,
            reading=self.reading,
            max_answers=max_answers,
            form=form,
            plain_answers=self.plain_answers,
        )
        self._rows = {split: self._rows_of(split, source) for split, source in self.splits.items()}

    def counts(self) -> dict[str, int]:
        """Samples that all ranks have skipped, by kind, or truncated so far, for each split; zeros are left out."""
        assert self.trainer is not None
        found: dict[str, int] = {}
        for split, rows in self._rows.items():
            states = rows.states.to(self.trainer.strategy.root_device, copy=True)  # reduced in place
            numbers = self.trainer.strategy.reduce(states, reduce_op="max").bincount(minlength=len(STATES)).tolist()
            found |= {f"{split}/num_{state}": n for state, n in zip(STATES[1:], numbers[1:], strict=True) if n}
        return found

    def fingerprints(self) -> dict[str, str]:
        """A hash of each split."""
        return {split: source.fingerprint() for split, source in self.splits.items()}

    def preflight(self, *, num_samples: int, show: int) -> list[PreflightReport]:
        """Encode some samples of each split as training does; raises ValueError where too many are bad."""
        return [preflight(rows, num_samples=num_samples, show=show) for rows in self._rows.values()]

    def check_shared(self) -> str | None:
        """A warning about images that are in both splits, or None. Bytes are compared, not names.

        Of a large validation split, only `NUM_COMPARED` samples and those of each validation are compared.
        """
        indices = sorted({*self.val_indices(NUM_COMPARED), *self.val_indices(self.num_val_samples)})
        num, of, example = shared_images(self.splits["train"], self.splits["val"], indices)
        if example is None:
            return None
        first = f"{'the first one' if num > 1 else 'namely'} {quoted(example[0])}, in train {quoted(example[1])}"
        return (
            f"{num:,} of {count(of, 'validation image')} {'is' if num == 1 else 'are'} also in the training split, "
            f"{first}: metrics on them are too good. Remove them from training with data.filter=<filter.json of "
            "vlm-doctor>, or validate on other data, for example with data.val_annotations="
        )

    def epochs_of(self, num_batches: int) -> float:
        """About how often `num_batches` training batches read each sample."""
        samples: float = self.batch_size
        if self.batching == "tokens" or self.packing:
            lengths = [self._length(index) for index in self._some_indices()]
            mean = sum(lengths) / len(lengths)
            samples = self.batch_tokens / mean if self.batching == "tokens" else samples * self.max_length / mean
        return num_batches * samples / len(self.splits["train"])

    def steps(self, *, batches_per_step: int) -> int | None:
        """How many optimizer steps read each training sample `epochs` times; None where `epochs` is not given."""
        if self.epochs is None:
            return None
        return math.ceil(round(self.epochs / self.epochs_of(batches_per_step), 6))

    def some_image_keys(self) -> list[tuple[bytes, ...]]:
        """The keys of the images of some training samples in the feature cache; bad samples are left out."""
        found = []
        for index in self._some_indices():
            with suppress(BadSample):
                sample = self.reader.sample(self.splits["train"], index)
                row = self.reader.row(sample, self.reader.encoded(sample))
                found.append(tuple(map(image_key, row.pixel_values)))
        return found

    def _some_indices(self) -> list[int]:
        """Up to `NUM_PROBED` training samples, spread evenly."""
        num = len(self.splits["train"])
        probed = min(num, NUM_PROBED)
        return [number * num // probed for number in range(probed)]

    def train_dataloader(self) -> DataLoader[Batch]:
        source = self.splits["train"]
        rank, num_ranks = self._rank()
        self._batches = Batches(
            source,
            length=self._length,
            batching=self.batching,
            batch_size=self.batch_size,
            batch_tokens=self.batch_tokens,
            row_tokens=self.max_length if self.packing else None,
            seed=self.seed,
            rank=rank,
            num_ranks=num_ranks,
            num_together=num_ranks * (1 if self.trainer is None else self.trainer.accumulate_grad_batches),
            start=self._start,
        )
        return self._loader("train", self._batches)

    def state_dict(self) -> dict[str, Any]:
        """The position in the training data, from which a run can resume."""
        assert self.trainer is not None
        return self._batches.position(self.trainer.fit_loop.epoch_loop.batch_progress.total.processed)  # type: ignore[attr-defined]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._start = state

    def val_dataloader(self) -> DataLoader[Batch]:
        rank, num_ranks = self._rank()
        indices = self.val_indices(self.num_val_samples)
        batches = EvenBatches(indices, batch_size=self._val_batch_size, rank=rank, num_ranks=num_ranks)
        return self._loader("val", batches)

    def val_batches(self, num_ranks: int) -> Iterator[Batch]:
        """The validation batches of all ranks, read one by one in this process."""
        collate_rows, chosen = self._collate_fn("val"), self.val_indices(self.num_val_samples)
        for rank in range(num_ranks):
            for batch in EvenBatches(chosen, batch_size=self._val_batch_size, rank=rank, num_ranks=num_ranks):
                yield collate_rows([self._rows["val"][indices] for indices in batch])

    def val_indices(self, limit: int | None) -> list[int]:
        """Up to `limit` validation samples, spread evenly over the split."""
        num = len(self.splits["val"])
        wanted = num if limit is None else min(limit, num)
        return [i * num // wanted for i in range(wanted)]

    def prompts(self, indices: Sequence[int], batch_size: int) -> Iterator[Batch]:
        """Batches of left-padded prompts: validation samples up to their last answer, bad samples left out.

        Where `too_long` truncates a row, the last answer is the last one that is not cut completely. Raises ValueError
        where all samples are bad.
        """
        rows = []
        found = False
        for index in indices:
            try:
                sample = self.text.answered(self.reader.sample(self.splits["val"], index))
                rows.append(self.reader.row(sample, self.text.encode_prompt(sample)))
            except BadSample as error:
                self._rows["val"].report(index, error)
            if rows and (len(rows) == batch_size or index == indices[-1]):
                yield collate(rows, spec=self.spec, pad_id=self.text.pad_id, side="left", with_keys=self.with_keys)
                rows, found = [], True
        if not found:
            raise self._rows["val"].none_left()

    def _rank(self) -> tuple[int, int]:
        """The rank of this process and the number of ranks."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _length(self, index: int) -> int:
        """Tokens of a training sample; 1 for a bad one, which `Rows` reports when it is read."""
        try:
            # The number of tiles depends on the size of an image, so tiled images have to be read.
            read = self.reader.outline if self.spec.tile_rows is None else self.reader.sample
            return len(self.reader.encoded(read(self.splits["train"], index)).input_ids)
        except BadSample:
            return 1

    def _rows_of(self, split: Split, source: Source) -> Rows:
        return Rows(
            source=source,
            split=split,
            reader=replace(self.reader, split_answers=self.split_answers and split == "train"),
            max_bad=max(1, int(self.max_bad_ratio * len(source))) if self.max_bad_ratio else 0,
            bad_samples_file=self.bad_samples_file,
            augment=self.augment if split == "train" else None,
            seed=self.seed,
        )

    def _loader(self, split: Split, batches: Sampler[Any]) -> DataLoader[Batch]:
        dataset: Any = self._rows[split]  # typed Any, because the loader yields batches, not rows
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            multiprocessing_context=WorkerContext() if self.num_workers else None,
            collate_fn=self._collate_fn(split),
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # a separate one: the loader must not change the random numbers of dropout
        )

    def _collate_fn(self, split: Split) -> Callable[[Sequence[Row]], Batch]:
        side: Literal["left", "right"] = "left" if self.form == "prompt" else "right"
        options = partial(collate, spec=self.spec, pad_id=self.text.pad_id, sources=self.splits[split].names, side=side)
        # `with_keys` is read when a batch is made, because Lightning makes the loaders before a fit starts.
        return lambda rows: options(rows, with_keys=self.with_keys)

    @property
    def _val_batch_size(self) -> int:
        """At least two rows, so that their images can be exchanged."""
        return max(2, self.batch_size)
