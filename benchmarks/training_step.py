"""A training step here, in a plain loop over Transformers' LLaVA, and in Transformers' Trainer.

They have the same random weights, batches, precision and threads; their losses must agree.

    python -m benchmarks.training_step [align] [lora] [mixed]

`align` trains the connector on 8 rows of one image and 64 tokens, 48 of them supervised, once more with the features of
the images from `data.feature_cache`; `lora` trains also a LoRA with r = 16 on all linear layers of the LLM. `mixed` is
`lora` on 64 samples with 16 to 512 tokens and up to two images, in batches of 8, which Trainer groups by length; the
plain loop, which groups nothing, is left out.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.models import BF16, DEVICE, IMAGE_ID, NUM_VISUAL, PAD_ID, PRECISION, SIDE, autocast, ours, theirs
from benchmarks.turns import Timing, in_thread, in_turns, print_table
from vlm.data.collate import Row, collate, image_key
from vlm.encoders.transform import Transform
from vlm.objectives.language_modeling import LanguageModeling
from vlm.schema import Batch, Sample, VisualSpec
from vlm.text.row import Encoded

BATCH_SIZE, LR = 8, 1e-9  # weights hardly move, so that losses can be compared at every step
TURNS = int(os.environ.get("TURNS", "5"))
Report = Callable[[float], None]


@dataclass(frozen=True)
class Workload:
    """Token ids with `IMAGE_ID` at the visual tokens, labels and pixels of samples, and the samples of a turn."""

    rows: Sequence[tuple[list[int], list[int], Tensor]]
    lora: bool
    grouped: bool = False

    @property
    def num_steps(self) -> int:
        return len(self.rows) // BATCH_SIZE


def workload(name: str) -> Workload:
    """The samples of a benchmark, the same in every process."""
    rng = np.random.default_rng(0)
    if name == "mixed":
        lengths = np.exp(rng.normal(math.log(90), 0.8, 64)).clip(16, 512).astype(int)
        images = rng.permutation([1] * 51 + [2] * 6 + [0] * 7)
    else:
        lengths, images = np.full(BATCH_SIZE, 64), np.full(BATCH_SIZE, 1)
    rows = []
    for length, num_images in zip(lengths, images, strict=True):
        text = rng.integers(300, 30_000, length).tolist()
        ids = text[:4] + [IMAGE_ID] * NUM_VISUAL * num_images + text[4:]
        supervised = length * 3 // 4
        labels = [-100] * (len(ids) - supervised) + ids[len(ids) - supervised :]
        pixels = torch.from_numpy(rng.standard_normal((num_images, 3, SIDE, SIDE), dtype=np.float32))
        rows.append((ids, labels, pixels))
    return Workload(rows, lora=name != "align", grouped=name == "mixed")


def batches_of(work: Workload) -> list[Batch]:
    """The batches of this project, as its data module makes them."""
    transform = Transform(size=(SIDE, SIDE), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic")
    spec = VisualSpec(num_tokens=NUM_VISUAL, image_size=(SIDE, SIDE), transform=transform)
    rows = []
    for number, (ids, labels, pixels) in enumerate(work.rows):
        places = [token == IMAGE_ID for token in ids]
        before = [-(-seen // NUM_VISUAL) for seen in itertools.accumulate(places)]
        encoded = Encoded(
            input_ids=[PAD_ID if place else token for token, place in zip(ids, places, strict=True)],
            image_mask=places,
            images_before=before,
            labels=labels,
            text="",
        )
        messages: Any = [{"role": "user", "content": [{"type": "image"}] * len(pixels)}]
        rows.append(Row([Sample(str(number), [], messages)], [encoded], list(pixels), [(1,)] * len(pixels)))
    return [collate(rows[i : i + BATCH_SIZE], spec=spec, pad_id=PAD_ID) for i in range(0, len(rows), BATCH_SIZE)]


def with_lightning(name: str, *, cached: bool = False) -> Iterator[float]:
    """This project's module in Lightning's trainer, as train.py runs it; `cached`: every image was encoded before."""
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    from vlm.launch.entry import keep_freed_memory
    from vlm.module import VLMModule
    from vlm.training.feature_store import FeatureStore

    keep_freed_memory()
    work = workload(name)
    batches, model = batches_of(work), ours(lora=work.lora)
    if cached:
        batches = [replace(batch, image_keys=tuple(map(image_key, batch.pixel_values))) for batch in batches]
        model.feature_cache = FeatureStore(folder=Path(tempfile.mkdtemp()), encoder=model.encoder)
    module = VLMModule(model=model, objective=LanguageModeling(), lr={"connector": LR, "llm": LR}, schedule="constant")

    class Reports(pl.Callback):
        losses: list[tuple[float, int]] = []  # noqa: RUF012

        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.report(0.0)

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.losses.append((float(module.figures["train/loss"]), module.figures["train/tokens"]))
            if len(self.losses) == work.num_steps:
                self.report(_mean(self.losses))
                self.losses.clear()

        report: Report

    def run(report: Report) -> None:
        reports = Reports()
        reports.report = report
        options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        options |= {
            "enable_model_summary": False,
            "precision": PRECISION,
            "accelerator": DEVICE,
            "devices": 1,
            "max_steps": 10**6,
        }
        trainer = pl.Trainer(callbacks=[reports], gradient_clip_val=1.0, **options)
        trainer.fit(module, DataLoader(batches * 1000, batch_size=None))

    return in_thread(run)


def with_loop(name: str) -> Iterator[float]:
    """A plain loop over Transformers' model: forward, backward, clip, step."""
    work = workload(name)
    model = theirs(lora=work.lora).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR)
    batches = [_padded(work.rows[at : at + BATCH_SIZE]) for at in range(0, len(work.rows), BATCH_SIZE)]
    yield 0.0
    while True:
        losses = []
        for cpu_batch in batches:
            batch = {name: tensor.to(DEVICE, non_blocking=True) for name, tensor in cpu_batch.items()}
            with autocast():
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append((loss.item(), int((batch["labels"][:, 1:] != -100).sum())))
        yield _mean(losses)


def with_trainer(name: str) -> Iterator[float]:
    """Transformers' Trainer."""
    from transformers import Trainer, TrainingArguments

    work = workload(name)
    losses: list[tuple[float, int]] = []
    data = [{"input_ids": ids, "labels": labels, "pixels": pixels} for ids, labels, pixels in work.rows]

    class Reporting(Trainer):
        report: Report

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            if len(losses) == work.num_steps:  # the optimizer step of the last one is done
                self.report(_mean(losses))
                losses.clear()
            tokens = int((inputs["labels"][:, 1:] != -100).sum())
            loss = super().training_step(model, inputs, num_items_in_batch)
            losses.append((float(loss), tokens))
            return loss

    def run(report: Report) -> None:
        report(0.0)
        options: dict[str, Any] = {"train_sampling_strategy": "group_by_length"} if work.grouped else {}
        arguments = TrainingArguments(
            tempfile.mkdtemp(),
            use_cpu=DEVICE == "cpu",
            bf16=BF16,
            per_device_train_batch_size=BATCH_SIZE,
            max_steps=10**6,
            learning_rate=LR,
            lr_scheduler_type="constant",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            **options,
        )
        collate: Any = lambda rows: _padded([(row["input_ids"], row["labels"], row["pixels"]) for row in rows])  # noqa: E731
        trainer = Reporting(theirs(lora=work.lora), arguments, train_dataset=data, data_collator=collate)
        trainer.report = report
        trainer.train()

    return in_thread(run)


def _padded(rows: Sequence[tuple[list[int], list[int], Tensor]]) -> dict[str, Tensor]:
    """A batch for Transformers' model, padded to its longest row."""
    length = max(len(ids) for ids, _, _ in rows)
    pad = [(length - len(ids)) for ids, _, _ in rows]
    batch = {
        "input_ids": torch.tensor([ids + [PAD_ID] * n for (ids, _, _), n in zip(rows, pad, strict=True)]),
        "labels": torch.tensor([labels + [-100] * n for (_, labels, _), n in zip(rows, pad, strict=True)]),
        "attention_mask": torch.tensor([[1] * (length - n) + [0] * n for n in pad]),
    }
    pixels = torch.cat([pixels for _, _, pixels in rows])
    return {**batch, "pixel_values": pixels} if len(pixels) else batch


def _mean(losses: Sequence[tuple[float, int]]) -> float:
    """The mean over tokens."""
    return sum(loss * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses)


WAYS: dict[str, Callable[[str], Iterator[float]]] = {
    "vlm": with_lightning,
    "vlm, features cached": partial(with_lightning, cached=True),
    "plain loop": with_loop,
    "Trainer": with_trainer,
}
ONLY_FOR = {"vlm, features cached": ("align",), "plain loop": ("align", "lora")}


def compare(name: str, *, turns: int) -> dict[str, Timing]:
    """The timings of one workload. Raises AssertionError if losses differ."""
    ways = {way: partial(make, name) for way, make in WAYS.items() if name in ONLY_FOR.get(way, (name,))}
    # Over several turns of rows of different lengths, Trainer's process grows to 17 GB.
    timings = in_turns(ways, turns=turns, one_at_a_time=workload(name).grouped)
    losses = {way: timing.values[-1] for way, timing in timings.items()}
    assert max(losses.values()) - min(losses.values()) < 2e-3 * losses["vlm"], losses
    return timings


if __name__ == "__main__":
    for name in sys.argv[1:] or ("align", "lora", "mixed"):
        print_table(name, compare(name, turns=TURNS), pieces=workload(name).num_steps)
