"""Scores how well answers fit their images: a trained model's loss with another image minus that with the own image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from vlm import build
from vlm.data.batching import EvenBatches
from vlm.data.collate import collate
from vlm.data.datamodule import VLMDataModule
from vlm.data.rows import Rows
from vlm.evaluation.visual_gain import compared
from vlm.objectives.language_modeling import SummedCrossEntropy
from vlm.schema import Batch, Split


def scores(
    settings: Mapping[str, Any],
    model: Any,
    data: VLMDataModule,
    split: Split,
    indices: Sequence[int],
    advance: Callable[[int], None],
) -> NDArray[np.float64]:
    """For each sample of the split, the increase of its loss with another image, in nats per supervised token.

    `indices` are samples that have an image and that training can use; the others have NaN, and so has a sample whose
    batch has no other image. `advance` is called with the number of samples of each finished batch.
    """
    found = np.full(len(data.splits[split]), np.nan)
    if len(indices) < 2:
        return found
    rows: Any = Rows(source=data.splits[split], split=split, reader=data.reader, max_bad=0, bad_samples_file=None)
    batches: Any = EvenBatches(indices, batch_size=max(2, data.batch_size))
    loader = DataLoader(
        rows,
        batch_sampler=batches,
        num_workers=data.num_workers,
        multiprocessing_context="fork" if data.num_workers else None,
        collate_fn=partial(collate, spec=data.spec, pad_id=data.text.pad_id),
    )
    one_device = {**settings["trainer"], "devices": 1, "num_nodes": 1}
    trainer = build.build_trainer({**settings, "trainer": one_device, "callbacks": {}, "logger": {}}, Path())
    found[list(indices)] = list(chain(*trainer.predict(_Scorer(model.eval(), advance), loader)))
    return found


class _Scorer(pl.LightningModule):
    """Scores batches in Lightning's `predict`, which chooses device and precision."""

    def __init__(self, model: Any, advance: Callable[[int], None]) -> None:
        super().__init__()
        self.model, self.advance = model, advance

    def predict_step(self, batch: Batch, batch_index: int) -> list[float]:
        pairs, rows = compared(batch)
        self.advance(len(batch.ids))
        found = torch.full([len(batch.ids)], float("nan"))
        if rows:
            gains = sample_losses(self.model, pairs["shuffled"]) - sample_losses(self.model, pairs["correct"])
            found[rows] = gains.cpu()
        return found.tolist()


def sample_losses(model: Any, batch: Batch) -> Tensor:
    """Mean cross-entropy of each sample's supervised tokens, in nats, float32 [samples]."""
    _, losses = SummedCrossEntropy.apply(model(batch), batch.targets)  # M
    sample = batch.sample_index[batch.logits_mask]  # M
    total = losses.new_zeros(len(batch.ids)).index_add_(0, sample, losses)
    return total / sample.bincount(minlength=len(batch.ids))
