"""UNITER's tasks and optimal transport against plain derivations, one row after the other."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.helpers.pair_models import NUM_CELLS, WEIGHTS, blanked, masked_by_hand, pairs, tiny
from tests.helpers.pairs import CLS, SEP, TEXTS
from vlm.models.single_stream import SingleStream
from vlm.objectives.conditional_masking import LOSSES, TASKS, ConditionalMasking
from vlm.objectives.masking import draws
from vlm.objectives.optimal_transport import transport_distance, transport_plan

ROWS = [[CLS, *text, SEP] for text in TEXTS]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny(SingleStream)


def plan_by_hand(cost: Tensor, *, beta: float = 0.5, iterations: int = 50) -> Tensor:
    """IPOT (arXiv 1802.04307, algorithm 1, with one inner step) of one pair without padding."""
    words, cells = cost.shape
    kernel, plan = (-cost / beta).exp(), torch.ones_like(cost)
    sigma = torch.full((words,), 1 / words)
    for _ in range(iterations):
        scaled = kernel * plan
        delta = 1 / (cells * (scaled.T @ sigma))
        sigma = 1 / (words * (scaled @ delta))
        plan = sigma[:, None] * scaled * delta
    return plan


def distance_by_hand(words: Tensor, cells: Tensor) -> Tensor:
    cost = 1 - F.normalize(words, dim=1) @ F.normalize(cells, dim=1).T
    return (cost * plan_by_hand(cost.detach())).sum()


def derived(model: Any, ratio: float) -> dict[str, Tensor]:
    """Sums of all losses of a validation."""
    batch = pairs()
    numbers = draws(batch, num_cells=NUM_CELLS, num_tokens=6, training=False)
    names = ("word_loss", "feature_loss", "class_loss", "matching_loss", "transport_loss")
    sums = {name: torch.zeros(()) for name in names}

    def features(image: Tensor, hidden: list[int]) -> Tensor:
        found = model.encoder(blanked(image, hidden)[None])
        found = F.layer_norm(found, found.shape[-1:])
        found[0, hidden] = 0
        mask = torch.zeros(1, NUM_CELLS, 1)
        mask[0, hidden] = 1
        return found + mask * model.cells.masked

    def fused(seen: Tensor, ids: list[int]) -> Any:
        return model.fuse(seen, torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))

    for row, (image, text) in enumerate(zip(batch.pixel_values, ROWS, strict=True)):
        seen, places = masked_by_hand(text, numbers.words[row], ratio)
        if not places:
            first = 1 + int(numbers.words[row, 1 : len(text) - 1, 0].argmin())
            seen, places = masked_by_hand(text, numbers.words[row], float(numbers.words[row, first, 0]) + 1e-6)
        states = fused(features(image, []), seen).words[0]
        for place in places:
            log_p = model.predict_words(states[place : place + 1])[0].log_softmax(0)
            sums["word_loss"] = sums["word_loss"] - log_p[text[place]]
        cells = [cell for cell in range(NUM_CELLS) if numbers.cells[row, cell, 0] < ratio]
        cells = cells or [int(numbers.cells[row, :, 0].argmin())]
        states = fused(features(image, cells), text).cells[0]
        whole, target = features(image, [])[0], model.classes(image[None])[0].softmax(1)
        for cell in cells:
            predicted = model.predict_features(states[cell : cell + 1])[0]
            sums["feature_loss"] = sums["feature_loss"] + ((predicted - whole[cell]) ** 2).sum() / len(predicted)
            q = model.predict_classes(states[cell : cell + 1])[0].softmax(0)
            sums["class_loss"] = sums["class_loss"] + (target[cell] * (target[cell] / q).log()).sum()
        own = numbers.swap[row, 0] >= 0.5
        others = [other for other in range(8) if other != row]
        shown = ROWS[row if own else others[int(numbers.swap[row, 1] * 7)]]
        pair = fused(features(image, []), shown)
        sums["matching_loss"] = sums["matching_loss"] - model.heads.match(pair.pair)[0].log_softmax(0)[int(own)]
        sign = 0.1 if own else -0.1
        sums["transport_loss"] = sums["transport_loss"] + sign * distance_by_hand(pair.words[0], pair.cells[0])
    return sums


def test_losses_and_gradients_are_those_of_a_plain_derivation(model: Any) -> None:
    output = ConditionalMasking(weights=WEIGHTS, mask_ratio=0.3).eval()(model, pairs())
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, value in derived(model, 0.3).items():
        torch.testing.assert_close(output.sums[name], value, atol=1e-5, rtol=1e-4)
        ours = torch.autograd.grad(output.sums[name], [*trained.values()], retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(value, [*trained.values()], retain_graph=True, allow_unused=True)
        for parameter, mine, other in zip(trained, ours, theirs, strict=True):
            zero = torch.zeros_like(trained[parameter])
            pair = [zero if gradient is None else gradient for gradient in (mine, other)]
            torch.testing.assert_close(*pair, atol=1e-4, rtol=1e-3, msg=f"{name}: {parameter}")
    assert output.counts["matching_loss"] == output.counts["transport_loss"] == 8
    assert min(output.counts.values()) >= 8, "at least one word and cell of each row"


def test_one_side_is_masked_at_a_time(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words with the whole image, cells with the whole text, nothing in matching."""
    seen = []
    hidden_of = model.masked_features
    whole = pairs().input_ids

    def spied(pixel_values: Tensor, hidden: Tensor | None) -> Tensor:
        seen.append(hidden is not None)
        return hidden_of(pixel_values, hidden)

    fuse = model.fuse
    masks = []
    monkeypatch.setattr(model, "masked_features", spied)
    monkeypatch.setattr(
        model, "fuse", lambda f, ids, mask: masks.append(not torch.equal(ids, whole)) or fuse(f, ids, mask)
    )
    for task, masks_words, masks_cells in (("word", True, False), ("feature", False, True), ("class", False, True)):
        seen.clear()
        masks.clear()
        ConditionalMasking(weights={task: 1}, mask_ratio=0.9)(model, pairs())
        assert (masks, seen[0]) == ([masks_words], masks_cells)
    seen.clear()
    ConditionalMasking(weights={"matching": 1}, swap_ratio=0.0)(model, pairs())
    assert seen == [False]


def test_tasks_are_drawn_by_their_weights(model: Any) -> None:
    objective = ConditionalMasking(weights={"word": 2, "feature": 1, "class": 0, "matching": 1})
    torch.manual_seed(0)
    found = Counter(objective._task(torch.device("cpu")) for _ in range(2000))
    assert {task: found[task] / 2000 for task in TASKS} == pytest.approx(
        {"word": 0.5, "feature": 0.25, "class": 0.0, "matching": 0.25}, abs=0.04
    )


def test_a_step_names_the_losses_of_all_tasks(model: Any) -> None:
    """So that every step reports the same names; those of other tasks have no count."""
    output = ConditionalMasking(weights={"class": 1})(model, pairs())
    assert {*output.sums} == {name for names in LOSSES.values() for name in names}
    assert {name for name, count in output.counts.items() if count} == {*LOSSES["class"]}


def test_weights_that_draw_nothing() -> None:
    with pytest.raises(ValueError, match=r"^objective.weights={'word': 0} are all 0; set one of them above 0$"):
        ConditionalMasking(weights={"word": 0})


def test_the_plan_is_that_of_ipot() -> None:
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(3, 5, 7, generator=generator) * 2
    lengths = [5, 2, 4]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    plan = transport_plan(cost, mask)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(plan[row, :length], plan_by_hand(cost[row, :length]), atol=1e-6, rtol=1e-4)
    assert (plan[~mask] == 0).all()


def test_the_marginals_of_the_plan() -> None:
    """Each word holds 1/T, each cell takes 1/P; what moves costs no more than moving everything evenly."""
    cost = torch.rand(4, 6, 9, generator=torch.Generator().manual_seed(0)) * 2
    mask = torch.arange(6) < torch.tensor([[6], [3], [2], [6]])
    plan = transport_plan(cost, mask)
    torch.testing.assert_close(plan.sum(2), mask / mask.sum(1, keepdim=True), atol=1e-6, rtol=0)
    torch.testing.assert_close(plan.sum(1), torch.full((4, 9), 1 / 9), atol=1e-3, rtol=0)
    evenly = (cost * mask[..., None]).sum((1, 2)) / (mask.sum(1) * 9)
    assert ((cost * plan).sum((1, 2)) < evenly).all()


def test_the_distance_of_equal_sets_is_about_zero_in_float32() -> None:
    """In any order of the cells, also where the rest of the model computes in bfloat16."""
    words = torch.eye(4, 8)[None]
    cells = words[:, [2, 0, 3, 1]]
    mask = torch.ones(1, 4, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        found = transport_distance(words.bfloat16(), cells.bfloat16(), mask)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(0.0, abs=1e-3)
    assert transport_distance(words, -cells, mask).item() > 0.9
