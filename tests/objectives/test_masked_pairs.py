"""ViLBERT's three losses and their gradients, against a plain derivation, one row after the other."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from torch import Tensor
from torch.nn import functional as F

from tests.helpers.pair_models import CASES, MASK, NUM_CELLS, blanked, learned, masked_by_hand, pairs, tiny
from tests.helpers.pairs import CLS, SEP, TEXTS
from tests.helpers.programs import ROOT
from vlm.models.dual_stream import DualStream
from vlm.objectives.masked_pairs import MaskedPairs, divergence
from vlm.objectives.masking import Draws, chosen, draws, masked, texts_of_all_ranks, with_other_texts, words_of


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny(DualStream)


def derived(model: Any, numbers: Draws, ratio: float) -> tuple[dict[str, Tensor], dict[str, int]]:
    batch = pairs()
    texts = [[CLS, *text, SEP] for text in TEXTS]
    sums = {name: torch.zeros(()) for name in ("word_loss", "cell_loss", "alignment_loss")}
    counts = dict.fromkeys(sums, 0)
    for row in range(8):
        own = numbers.swap[row, 0] >= 0.5
        others = [other for other in range(8) if other != row]
        text = texts[row if own else others[int(numbers.swap[row, 1] * 7)]]
        seen, places = masked_by_hand(text, numbers.words[row], ratio)
        cells = [cell for cell in range(NUM_CELLS) if numbers.cells[row, cell, 0] < ratio]
        hidden = [cell for cell in cells if numbers.cells[row, cell, 1] < 0.9]
        features = model.encoder(blanked(batch.pixel_values[row], hidden)[None])
        features = F.layer_norm(features, features.shape[-1:])
        features[0, hidden] = 0
        fused = model.fuse(features, torch.tensor([seen]), torch.ones(1, len(seen), dtype=torch.bool))
        log_p = model.heads.match(fused.pair)[0].log_softmax(0)
        sums["alignment_loss"] = sums["alignment_loss"] - log_p[int(own)]
        counts["alignment_loss"] += 1
        if not own:
            continue
        for place in places:
            log_p = model.predict_words(fused.words[:, place])[0].log_softmax(0)
            sums["word_loss"] = sums["word_loss"] - log_p[text[place]]
        target = model.classes(batch.pixel_values[row : row + 1])[0].softmax(1)
        for cell in cells:
            q = model.predict_classes(fused.cells[:, cell])[0].softmax(0)
            sums["cell_loss"] = sums["cell_loss"] + (target[cell] * (target[cell] / q).log()).sum()
        counts["word_loss"] += len(places)
        counts["cell_loss"] += len(cells)
    return sums, counts


def test_losses_and_gradients_are_those_of_a_plain_derivation(model: Any) -> None:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    torch.manual_seed(5)
    output = MaskedPairs(mask_ratio=0.5)(model, pairs())
    torch.manual_seed(5)
    numbers = draws(pairs(), num_cells=NUM_CELLS, num_tokens=6, training=True)
    expected, counts = derived(model, numbers, 0.5)
    assert {name: output.counts[name] for name in counts} == counts
    assert counts["word_loss"] > 0
    assert counts["cell_loss"] > 0
    for name, value in expected.items():
        torch.testing.assert_close(output.sums[name], value, atol=0, rtol=1e-4)
        ours = torch.autograd.grad(output.sums[name], [*trained.values()], retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(value, [*trained.values()], retain_graph=True, allow_unused=True)
        assert sum(gradient is not None for gradient in ours) > 30
        for parameter, mine, other in zip(trained, ours, theirs, strict=True):
            zero = torch.zeros_like(trained[parameter])
            pair = [zero if gradient is None else gradient for gradient in (mine, other)]
            torch.testing.assert_close(*pair, atol=1e-4, rtol=1e-3, msg=f"{name}: {parameter}")


def test_nothing_masked_is_no_loss_and_no_nan(model: Any) -> None:
    """Published code divides by the number of masked cells, which may be none."""
    output = MaskedPairs(mask_ratio=0.0)(model, pairs())
    assert output.counts["cell_loss"] == output.counts["word_loss"] == 0
    assert output.sums["cell_loss"] == output.sums["word_loss"] == 0
    model.zero_grad()
    torch.stack([output.sums[name] for name in ("word_loss", "cell_loss", "alignment_loss")]).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients.values())
    model.zero_grad()


def test_a_swapped_text_has_no_masked_loss(model: Any) -> None:
    output = MaskedPairs(mask_ratio=1.0, swap_ratio=1.0)(model, pairs())
    assert (output.counts["word_loss"], output.counts["cell_loss"], output.counts["alignment_loss"]) == (0, 0, 8)
    output = MaskedPairs(mask_ratio=1.0, swap_ratio=0.0)(model, pairs())
    words = sum(map(len, TEXTS))
    assert (output.counts["word_loss"], output.counts["cell_loss"]) == (words, 8 * NUM_CELLS)


def test_divergence_is_zero_only_for_the_target() -> None:
    target = torch.randn(4, 7)
    assert divergence(target, target + 3.0).abs() < 1e-5
    two = divergence(torch.log(torch.tensor([[0.75, 0.25]])), torch.zeros(1, 2))
    assert two.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_an_equal_text_is_never_swapped_in() -> None:
    """Two texts, each four times: the other one is always swapped in; and one text alone has no other."""
    batch = pairs()
    rows = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    batch = replace(batch, input_ids=batch.input_ids[rows], attention_mask=batch.attention_mask[rows])
    uniform = torch.rand(8, 2, generator=torch.Generator().manual_seed(0))
    found = with_other_texts(batch, texts_of_all_ranks(batch), uniform, ratio=1.0)
    assert torch.equal(found.ids, batch.input_ids[rows.flip(0) * 4])
    assert torch.equal(found.mask, batch.attention_mask[rows.flip(0) * 4])
    assert not found.matches.any()
    same = replace(batch, input_ids=batch.input_ids[:1].expand(8, -1))
    assert with_other_texts(same, texts_of_all_ranks(same), uniform, ratio=1.0).matches.all()


def test_how_words_are_masked(model: Any) -> None:
    ids = torch.full((100, 100), 2000)
    uniform = torch.rand(100, 100, 3, generator=torch.Generator().manual_seed(0))
    where = chosen(torch.ones_like(ids, dtype=torch.bool), uniform[..., 0], ratio=0.15)
    assert 0.14 < where.float().mean() < 0.16
    found = masked(ids, where, uniform[..., 1:], model.tokenizer)
    assert (found[~where] == 2000).all()
    ratios = [(found[where] == value).float().mean().item() for value in (MASK, 2000)]
    assert ratios == pytest.approx([0.8, 0.1], abs=0.04)


def test_at_least_one_is_masked_where_one_can_be() -> None:
    candidates = torch.tensor([[False, True, True], [False, False, False], [True, True, True]])
    uniform = torch.tensor([[0.0, 0.9, 0.8], [0.0, 0.0, 0.0], [0.1, 0.9, 0.05]])
    found = chosen(candidates, uniform, ratio=0.15, at_least_one=True)
    assert found.tolist() == [[False, False, True], [False, False, False], [True, False, True]]


def test_special_tokens_and_padding_are_never_masked(model: Any) -> None:
    batch = pairs()
    texts = with_other_texts(batch, texts_of_all_ranks(batch), torch.ones(8, 2), ratio=0.0)
    words = words_of(texts, model.tokenizer)
    assert words.sum(1).tolist() == [len(text) for text in TEXTS]
    assert not (words & torch.isin(batch.input_ids, torch.tensor([CLS, SEP, 0]))).any()


def test_a_validation_is_the_same_each_time(model: Any) -> None:
    """Whatever the batch that a sample is in, and without random numbers of the training."""
    before = torch.get_rng_state()
    whole, part = (
        draws(batch, num_cells=NUM_CELLS, num_tokens=length, training=False)
        for batch, length in ((pairs(), 6), (pairs(0, 3), 5))
    )
    assert torch.equal(torch.get_rng_state(), before)
    for name in Draws._fields:
        own, other = getattr(part, name), getattr(whole, name)[:3]
        assert torch.equal(own, other[:, : own.shape[1]]), name
    objective = MaskedPairs().eval()
    one, again = (objective(model, pairs()) for _ in range(2))
    assert one.sums == again.sums


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_with_all_rows(case: str, tmp_path: Path) -> None:
    """Losses, gradients, masks, swapped texts and the task; five pairs on one rank and three on the other."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.helpers.pair_models", str(tmp_path), case]
    options: Any = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [
        subprocess.Popen(command, env={**os.environ, **shared, "LOCAL_RANK": str(rank)}, **options) for rank in (0, 1)
    ]
    said = [process.communicate(timeout=300)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    alone = learned(case, pairs())
    for rank in (0, 1):
        ours = torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True)
        assert ours["counts"] == alone["counts"]
        torch.testing.assert_close(ours["sums"], alone["sums"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours["gradients"], alone["gradients"], atol=1e-4, rtol=1e-3)
