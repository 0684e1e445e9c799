"""An objective whose rows are prompts is trained by train.py, to the losses that conversations give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.helpers.programs import QUICK, losses, train
from vlm.models.base import Generates, PredictsTokens
from vlm.objectives.base import Objective
from vlm.schema import IGNORE, Batch, LossOutput


class FirstToken(Objective):
    """Cross-entropy of the first token of each last answer, from rows that hold the answers."""

    needs = (PredictsTokens,)

    def forward(self, model: Any, batch: Batch) -> LossOutput:
        answers = batch.labels != IGNORE  # B T
        starts = answers & ~F.pad(answers, (1, 0))[:, :-1]  # B T
        last = starts & (starts.flip(1).cumsum(1).flip(1) == 1)  # B T
        return loss(model, replace(batch, labels=batch.labels.masked_fill(~last, IGNORE)))


class FirstTokenAfterPrompt(Objective):
    """The same from rows that end where the answer begins; also how often the likeliest token is generated."""

    needs = (PredictsTokens, Generates)
    form = "prompt"

    def forward(self, model: Any, batch: Batch) -> LossOutput:
        assert (batch.labels == IGNORE).all()
        answers = [sample.messages[-1]["content"][0]["text"] for sample in batch.samples]
        first = [model.tokenizer(answer, add_special_tokens=False).input_ids[0] for answer in answers]
        longer = with_column(batch, torch.tensor(first)[:, None])
        output = loss(model, longer)
        generated = model.generate(batch, stop_ids=[], max_new_tokens=1)[:, 0]  # B
        likeliest = (model(longer).argmax(1) == generated).sum().float()
        return LossOutput({**output.sums, "likeliest": likeliest}, {**output.counts, "likeliest": len(first)})


def with_column(batch: Batch, tokens: Tensor) -> Batch:
    """Rows with one more token, which is supervised; `tokens` [B,1]."""
    repeated = ("images_before", "images_hidden", "sample_index")
    last = {name: getattr(batch, name)[:, -1:] for name in repeated}
    last |= {"input_ids": tokens, "labels": tokens, "position_ids": batch.position_ids[:, -1:] + 1}
    last |= {"attention_mask": torch.ones_like(tokens).bool(), "image_mask": torch.zeros_like(tokens).bool()}
    return replace(batch, **{name: torch.cat([getattr(batch, name), column], 1) for name, column in last.items()})


def loss(model: Any, batch: Batch) -> LossOutput:
    sums = F.cross_entropy(model(batch), batch.targets, reduction="sum")
    return LossOutput({"first_loss": sums}, {"first_loss": len(batch.targets)})


@pytest.mark.slow
def test_prompts_give_the_losses_of_conversations(tmp_path: Path) -> None:
    """Prompts of several lengths, in training steps, validations and the image ablation."""
    found = {}
    for objective in (FirstToken, FirstTokenAfterPrompt):
        run = tmp_path / objective.__name__
        target = f"objective._target_={__name__}.{objective.__name__}"
        options = ["data.task=instruct", "data.batch_size=4", "data.num_val_samples=4", "trainer.precision=32-true"]
        options += ["trainer.max_steps=4", "stage.llm={last_n:1}", "stage.lr.llm=0.01"]
        assert train(*QUICK, *options, target, f"run_dir={run}") == 0
        found[objective] = losses(run)
    whole, prompts = found.values()
    assert [step for step, _ in prompts] == [step for step, _ in whole] == [1, 2, 2, 3, 4, 4]
    for (_, figures), (_, expected) in zip(prompts, whole, strict=True):
        shared = [name for name in expected if "loss" in name or name in ("val/visual_gain", "train/grad_norm")]
        right = {name: expected[name] for name in shared}
        # The gain is a difference of 5e-5 between losses of 5.8, each of which is rounded to 5e-7.
        assert {name: figures[name] for name in shared} == pytest.approx(right, rel=1e-4, abs=2e-6)
    trained = [figures for _, figures in prompts if "train/loss" in figures]
    assert [figures["train/likeliest"] for figures in trained] == [1.0] * 4
    assert trained[-1]["train/loss"] < 0.9 * trained[0]["train/loss"]
