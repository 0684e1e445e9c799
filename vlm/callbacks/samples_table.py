"""At each validation, answers to the same few held-out samples, for loggers that show images."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
from PIL.Image import Image

from vlm.data.datamodule import VLMDataModule
from vlm.files import escape_controls
from vlm.ranges import Samples
from vlm.schema import BadSample
from vlm.training.dashboards import AnsweredSample, TakesSamples

LARGEST = 336  # pixels of the longer side of an image in the table


class SamplesTable(pl.Callback):
    """Gives the loggers answers of the evaluators that generate, with their images.

    Nothing is generated unless a logger takes samples and an evaluator answers.

    Args:
        num_samples: number of validation samples, evenly spread over the split; the same at each validation.
    """

    def __init__(self, *, num_samples: Samples = 8) -> None:
        self.num_samples = num_samples
        self._images: dict[int, list[Image]] | None = None  # of each readable sample, by its index

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TakesSamples)]
        if not loggers:  # the same on all ranks, which must generate together where the model is sharded
            return
        if self._images is None:
            self._images = _readable(trainer.datamodule, self.num_samples)
        for evaluator in module.evaluators.values() if self._images else ():
            with module.context.autocast():
                _, records = evaluator.answered(module.context, list(self._images))
            if records:  # of an evaluator that generates
                pairs = zip(records, self._images.values(), strict=True)
                samples = [_answered(record, images) for record, images in pairs]
                for logger in loggers:
                    logger.log_samples(samples, trainer.global_step)


def _readable(data: VLMDataModule, num_samples: int) -> dict[int, list[Image]]:
    """Small copies of the images of some validation samples, without bad ones."""
    found = {}
    for index in data.val_indices(num_samples):
        with suppress(BadSample):  # which the evaluators report
            sample = data.reader.sample(data.splits["val"], index)
            answered = data.text.answered(sample)
            data.reader.row(answered, data.text.encode_prompt(answered))
            found[index] = [image.copy() for image in answered.images]
            for image in found[index]:
                image.thumbnail((LARGEST, LARGEST))
    return found


def _answered(record: dict[str, Any], images: list[Image]) -> AnsweredSample:
    texts = {key: escape_controls(record[key]) for key in ("id", "prompt", "prediction", "reference")}
    return AnsweredSample(**texts, images=images, score=float(record["score"]))
