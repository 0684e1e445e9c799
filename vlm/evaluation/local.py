"""A model of this project answers the questions of a benchmark: in batches, sorted, each image encoded once a batch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlm.data.collate import Row, collate
from vlm.data.sample_reader import SampleReader
from vlm.data.workers import WorkerContext
from vlm.evaluation.benchmarks.base import Benchmark
from vlm.evaluation.prompts import Prompts
from vlm.evaluation.respondent import Answer, Respondent, Write
from vlm.schema import BadSample, Batch, Message, Sample

NUM_CLASSIFIED = 16  # positions whose logits are float32 at once; each has the size of the vocabulary


class Work(NamedTuple):
    """A batch of rows, the (question, choice) of each, and the questions that cannot be asked with the reason."""

    batch: Batch | None
    keys: list[tuple[int, int]]
    failed: dict[int, str]


class Rows(Dataset[Work]):
    """Batches of rows, each of a question (choice -1), or of a question with one of its choices as the answer."""

    def __init__(self, *, prompts: Prompts, reader: SampleReader, batches: Sequence[Sequence[tuple[int, int]]]) -> None:
        self.prompts, self.reader, self.batches = prompts, reader, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Work:
        keys = self.batches[number]
        reader = replace(self.reader, spec=replace(self.reader.spec, transform=_once(self.reader.spec.transform)))
        indices = sorted({index for index, _ in keys})
        samples = dict(zip(indices, self.prompts.samples(indices), strict=True))
        rows: list[Row] = []
        kept: list[tuple[int, int]] = []
        failed: dict[int, str] = {}
        for index, choice in keys:
            try:
                rows.append(self._row(reader, samples[index], index, choice))
                kept.append((index, choice))
            except BadSample as error:
                failed[index] = str(error)
        if not rows:
            return Work(None, [], failed)
        side: Any = "left" if self.prompts.benchmark.method == "generate" else "right"
        return Work(
            collate(rows, spec=reader.spec, pad_id=reader.text.pad_id, side=side, share_images=True), kept, failed
        )

    def _row(self, reader: SampleReader, sample: Sample | BadSample, index: int, choice: int) -> Row:
        if isinstance(sample, BadSample):
            raise sample
        if choice >= 0:
            text = self.prompts.benchmark.questions[index].choices[choice]
            answer = Message(role="assistant", content=[{"type": "text", "text": text}])
            sample = replace(sample, messages=[*sample.messages, answer])
        reader.check(sample)
        encoded = reader.text.encode_prompt(sample) if choice < 0 else reader.text.encode(sample)
        return reader.row(sample, encoded)


def _once(transform: Callable[[Image.Image], Tensor]) -> Callable[[Image.Image], Tensor]:
    """The transform, which returns the same tensor for the same image object."""
    done: dict[int, tuple[Image.Image, Tensor]] = {}

    def transformed(image: Image.Image) -> Tensor:
        if id(image) not in done:
            done[id(image)] = image, transform(image)  # the image is kept, so that no other gets its id
        return done[id(image)][1]

    return transformed


class Answering(pl.LightningModule):
    """Generates answers, or computes log-likelihoods, and passes each on as soon as it is known."""

    def __init__(self, *, model: Any, reader: SampleReader, benchmark: Benchmark, write: Write) -> None:
        super().__init__()
        self.model, self._reader, self._benchmark, self._write = model, reader, benchmark, write
        self._ranked: dict[int, dict[int, tuple[float, int]]] = defaultdict(dict)
        self._failed: set[int] = set()

    def configure_model(self) -> None:
        if shard := getattr(self.trainer.strategy, "shard", None):
            shard(self.model)

    def predict_step(self, work: Work, batch_index: int) -> None:
        for index, reason in work.failed.items():
            if index not in self._failed:
                self._failed.add(index)
                self._write(Answer(index, error=reason))
        if work.batch is None:
            return
        if self._benchmark.method == "rank":
            for (index, choice), likelihood in zip(work.keys, self._log_likelihoods(work.batch), strict=True):
                self._add(index, choice, likelihood)
            return
        text = self._reader.text
        ids = self.model.generate(
            work.batch, stop_ids=text.stop_ids, max_new_tokens=self._benchmark.max_new_tokens
        )  # B S
        answers = text.tokenizer.batch_decode(ids, skip_special_tokens=True)
        for (index, _), answer in zip(work.keys, answers, strict=True):
            self._write(Answer(index, prediction=answer.strip()))

    def _add(self, index: int, choice: int, likelihood: tuple[float, int]) -> None:
        found = self._ranked[index]
        found[choice] = likelihood
        question = self._benchmark.questions[index]
        if len(found) == len(question.choices):
            likelihoods = [found[number] for number in range(len(found))]
            prediction = self._benchmark.choose(question, likelihoods)
            self._write(Answer(index, prediction=prediction, log_likelihoods=likelihoods))
            del self._ranked[index]

    def _log_likelihoods(self, batch: Batch) -> list[tuple[float, int]]:
        """Log-likelihood of each row's answer in nats, and its number of tokens, with the one that ends the turn."""
        logits, targets = self.model.logits_of_answers(batch), batch.targets  # M V and M
        log_p = torch.cat(
            [
                -torch.nn.functional.cross_entropy(part.float(), target, reduction="none")
                for part, target in zip(logits.split(NUM_CLASSIFIED), targets.split(NUM_CLASSIFIED), strict=True)
            ]
        )  # M
        rows = batch.logits_mask.nonzero()[:, 0]  # M
        sums = torch.zeros(len(batch.ids), device=log_p.device).index_add_(0, rows, log_p)  # B
        return list(zip(sums.tolist(), rows.bincount(minlength=len(batch.ids)).tolist(), strict=True))


class Local(Respondent):
    """Asks a model of this project, in all processes of the trainer."""

    def __init__(self, *, trainer: Any, model: Any, reader: SampleReader, batch_size: int, num_workers: int) -> None:
        self.trainer, self.model, self.reader = trainer, model, reader
        self.batch_size, self.num_workers = batch_size, num_workers
        self.rank, self.reading = trainer.global_rank, reader.reading

    def barrier(self) -> None:
        self.trainer.strategy.barrier()

    def respond(self, prompts: Prompts, indices: Sequence[int], answered: Container[int], write: Write) -> None:
        benchmark = prompts.benchmark
        groups = sorted_groups(prompts, indices)[self.rank :: self.trainer.world_size]
        keys = [
            (index, choice)
            for group in groups
            for index in group
            if index not in answered
            for choice in (range(len(benchmark.questions[index].choices)) if benchmark.method == "rank" else (-1,))
        ]
        batches = _batches(keys, self.batch_size)
        rows = Rows(prompts=prompts, reader=self.reader, batches=batches)
        loader: DataLoader[Work] = DataLoader(
            rows,
            batch_size=None,
            num_workers=self.num_workers,
            multiprocessing_context=WorkerContext() if self.num_workers else None,
        )
        answering = Answering(model=self.model, reader=self.reader, benchmark=benchmark, write=write)
        self.trainer.predict(answering, loader, return_predictions=False)

    @torch.no_grad()
    def embed(self, benchmark: Benchmark) -> Float[Tensor, "q d"]:
        """The mean of the encoder's features over the patches of each question's first image.

        Raises BadSample for an image that cannot be read, and ValueError for a question without an image.
        """
        device = self.trainer.strategy.root_device
        encoder = self.model.encoder.to(device)
        found: dict[str, Tensor] = {}
        for question in benchmark.questions:
            if not question.images:
                raise ValueError(
                    f"shots=nearest needs an image, and question '{question.id}' has none; set shots=fixed"
                )
            if (name := question.images[0]) not in found:
                pixels = self.reader.spec.transform(benchmark.image(name))
                pixels = pixels if pixels.ndim == 4 else pixels[None]  # tiles 3 H W
                with self.trainer.precision_plugin.forward_context():
                    found[name] = encoder(pixels.to(device)).float().mean(dim=(0, 1)).cpu()  # Dv
        return torch.stack([found[question.images[0]] for question in benchmark.questions])


def _batches(keys: Sequence[tuple[int, int]], size: int) -> list[Sequence[tuple[int, int]]]:
    """Up to `size` rows each. A question with as many choices has batches of its own, whose rows begin alike."""
    num_choices = Counter(index for index, _ in keys)
    runs = groupby(keys, key=lambda key: key[0] if num_choices[key[0]] >= size else -1)
    parts = [list(run) for _, run in runs]
    return [part[start : start + size] for part in parts for start in range(0, len(part), size)]


def sorted_groups(prompts: Prompts, indices: Sequence[int]) -> list[list[int]]:
    """The questions about the same images together, by their longest text, the longest first.

    Rows of a batch then have similar lengths, and memory is short in the first batch if anywhere.
    """
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index in indices:
        question = prompts.benchmark.questions[index]
        groups[question.images or (question.id,)].append(index)

    def length(index: int) -> int:
        return sum(
            len(piece.get("text", "")) for message in prompts.outline(index).messages for piece in message["content"]
        )

    lengths = {index: length(index) for index in indices}
    ordered = [sorted(group, key=lambda index: -lengths[index]) for group in groups.values()]
    return sorted(ordered, key=lambda group: -lengths[group[0]])
