"""The answers that loggers with images get at each validation, and that others cost nothing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.parts import SPEC
from tests.helpers.text import byte_tokenizer
from vlm.callbacks.samples_table import SamplesTable
from vlm.data.datamodule import VLMDataModule
from vlm.evaluation.base import Context, Evaluator
from vlm.schema import BadSample, Sample, Source, Split
from vlm.training.dashboards import AnsweredSample


class Numbered(Source):
    """Five samples, of which the first is bad and one has a large image."""

    def __init__(self, *, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Sample:
        if index == 0:
            raise BadSample("it is bad")
        image = Image.new("RGB", (1344, 672) if index == 3 else (40, 30), (index, 0, 0))
        return Sample(
            id=f"sample {index}",
            images=[image],
            messages=[
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": str(index)}]},
            ],
        )


class Answering(Evaluator):
    """Answers each question with the number of the call."""

    calls = 0

    def answered(self, context: Any, indices: Sequence[int]) -> tuple[list[Sample], list[dict[str, Any]]]:
        self.calls += 1
        records = [
            {
                "id": f"sample {index}",
                "prompt": "Which?",
                "prediction": f"{self.calls}\x1b[31m",
                "reference": str(index),
                "score": self.calls == index,
            }
            for index in indices
        ]
        return [], records


class Shows:
    def __init__(self) -> None:
        self.logged: list[tuple[int, Sequence[AnsweredSample]]] = []

    def log_samples(self, samples: Sequence[AnsweredSample], step: int) -> None:
        self.logged.append((step, samples))


@pytest.fixture
def data() -> VLMDataModule:
    data = VLMDataModule(source=partial(Numbered))
    data.connect(spec=SPEC, tokenizer=byte_tokenizer(), chat_template="plain")
    return data


def validate(table: SamplesTable, data: VLMDataModule, evaluator: Evaluator, *loggers: Any, step: int = 0) -> None:
    trainer = SimpleNamespace(loggers=loggers, datamodule=data, global_step=step)
    context = Context(
        model=None,
        objective=None,
        data=data,
        device=torch.device("cpu"),
        sum_over_ranks=list,
        from_rank_zero=float,
        autocast=nullcontext,
    )
    table.on_validation_epoch_end(trainer, SimpleNamespace(evaluators={"answers": evaluator}, context=context))


def test_the_same_samples_are_answered_at_each_validation(data: VLMDataModule) -> None:
    """Without the bad one; images are at most 336 pixels large, and texts have no control characters."""
    table, logger = SamplesTable(num_samples=4), Shows()
    evaluator = Answering()
    for step in (10, 20):
        validate(table, data, evaluator, object(), logger, step=step)
    assert [step for step, _ in logger.logged] == [10, 20]
    for number, (_, samples) in enumerate(logger.logged, start=1):
        assert [sample.id for sample in samples] == ["sample 1", "sample 2", "sample 3"]
        assert [sample.prediction for sample in samples] == [rf"{number}\x1b[31m"] * 3
        assert [sample.score for sample in samples] == [float(number == index) for index in (1, 2, 3)]
        assert [image.size for sample in samples for image in sample.images] == [(40, 30), (40, 30), (336, 168)]
        assert [np.asarray(image)[0, 0, 0] for sample in samples for image in sample.images] == [1, 2, 3]


def test_nothing_is_answered_where_no_logger_shows_samples(data: VLMDataModule) -> None:
    evaluator = Answering()
    validate(SamplesTable(), data, evaluator, object())
    assert evaluator.calls == 0


def test_an_evaluator_that_generates_nothing_has_no_table(data: VLMDataModule) -> None:
    logger = Shows()
    validate(SamplesTable(), data, Evaluator(), logger)
    assert logger.logged == []
