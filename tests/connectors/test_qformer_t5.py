"""Encoder, Q-Former and an encoder-decoder LLM in a row are the BLIP-2 that Transformers builds around a T5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.blip2 import ROWS, assert_learns_alike, captioner, question, twin
from tests.helpers.llms import T5, t5
from tests.helpers.parts import make_batch, pictures
from vlm.models.composed import Composed
from vlm.schema import IGNORE


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Any, Composed]:
    """The same model twice: Transformers' and ours."""
    reference = captioner(tmp_path, T5)
    head = 0.2 * torch.randn(320, 32, generator=torch.Generator().manual_seed(0))
    reference.language_model.lm_head.weight = nn.Parameter(head)  # a second matrix, as Flan-T5 has it
    return reference, twin(reference, tmp_path, t5())


def test_composed_with_t5_is_blip2(pair: tuple[Any, Composed]) -> None:
    reference, ours = pair
    batch, prompts = make_batch(*ROWS), make_batch(*((prompt, []) for prompt, _ in ROWS))
    answers = [torch.tensor(answer) for _, answer in ROWS]
    labels = nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=IGNORE)
    theirs = reference(**question(prompts), labels=labels)
    torch.testing.assert_close(ours(batch), theirs.logits[labels != IGNORE], atol=1e-5, rtol=0)
    assert_learns_alike(reference, ours, batch, theirs.loss)


def test_composed_with_t5_writes_what_blip2_writes(pair: tuple[Any, Composed]) -> None:
    reference, ours = pair
    batch = make_batch(*((prompt, []) for prompt, _ in ROWS), images=pictures(3, seed=1), side="left")
    theirs = reference.generate(**question(batch), max_new_tokens=8, do_sample=False, eos_token_id=1, pad_token_id=0)
    assert ours.generate(batch, stop_ids=[1], max_new_tokens=8).tolist() == theirs[:, 1:].tolist()  # a start token
    assert len({tuple(row) for row in theirs.tolist()}) == 3
