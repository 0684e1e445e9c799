"""The line that says what a training will do."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from vlm.callbacks.progress import schedule
from vlm.data.datamodule import VLMDataModule
from vlm.data.sources.shapes import Shapes

USUAL = {
    **{"max_steps": 24, "accumulate_grad_batches": 1, "world_size": 1, "overfit_batches": 0, "global_step": 0},
    **{"val_check_interval": 6, "enable_validation": True},
}


@pytest.mark.parametrize(
    ("options", "trainer", "line"),
    [
        ({"batch_size": 5}, {}, "24 steps of 5 samples (3.0 epochs), validation every 6 steps and at the end"),
        (
            {"batch_size": 2},
            {"accumulate_grad_batches": 2, "world_size": 3, "max_steps": 1},
            "1 step of 12 samples (0.30 epochs), validation at the end",
        ),
        ({"batch_size": 1}, {"max_steps": 6}, "6 steps of 1 sample (0.15 epochs), validation at the end"),
        ({"packing": True}, {"val_check_interval": 1}, "24 steps, validation every step and at the end"),
        ({}, {"overfit_batches": 2, "enable_validation": False}, "24 steps, no validation"),
        (
            {"packing": True},
            {"accumulate_grad_batches": 4, "global_step": 7},
            "24 steps, resumed after step 7, validation every 6 batches and at the end",
        ),
    ],
)
def test_the_line_of_a_training(options: dict[str, Any], trainer: dict[str, Any], line: str) -> None:
    data = VLMDataModule(source=partial(Shapes, num_train=40, num_val=8), **options)
    assert schedule(SimpleNamespace(**{**USUAL, **trainer}, datamodule=data)) == line
