"""The speed benchmarks: docs/speed.md shows benchmarks/results.json, and both ways of a workload get the same rows."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import training_step
from benchmarks.__main__ import BEGIN, END, PAGE, RESULTS, tables
from benchmarks.turns import in_turns
from tests.helpers.ways import counting


def test_the_page_shows_the_results() -> None:
    shown = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    assert shown == f"\n{tables(json.loads(RESULTS.read_text()))}\n"


@pytest.mark.parametrize("name", ["align", "mixed"])
def test_both_ways_get_the_same_tokens_labels_and_images(name: str) -> None:
    work = training_step.workload(name)
    for number, batch in enumerate(training_step.batches_of(work)):
        rows = work.rows[number * training_step.BATCH_SIZE :][: training_step.BATCH_SIZE]
        theirs = training_step._padded(rows)
        assert torch.equal(batch.attention_mask.long(), theirs["attention_mask"])
        assert torch.equal(batch.image_mask, theirs["input_ids"] == training_step.IMAGE_ID)
        text = theirs["input_ids"].masked_fill(batch.image_mask, training_step.PAD_ID)
        assert torch.equal(batch.input_ids, text)
        assert torch.equal(batch.labels, theirs["labels"])
        if len(batch.pixel_values):
            assert torch.equal(batch.pixel_values, theirs["pixel_values"])


@pytest.mark.parametrize(("alone", "processes", "calls"), [(False, 1, [1, 2, 3]), (True, 2, [1, 2, 1, 2])])
def test_ways_take_turns_in_processes_of_their_own(alone: bool, processes: int, calls: list[int]) -> None:
    found = in_turns({"a": counting, "b": counting}, turns=2, one_at_a_time=alone)
    seen = {name: {process for process, _ in timing.values} for name, timing in found.items()}
    assert [len(of_way) for of_way in seen.values()] == [processes, processes]
    assert not seen["a"] & seen["b"]
    for timing in found.values():
        assert [call for _, call in timing.values] == calls
        assert len(timing.wall) == len(timing.cpu) == 2
        assert timing.memory_gb > 0
