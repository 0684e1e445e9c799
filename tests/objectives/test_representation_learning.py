"""The three losses of BLIP-2's first stage and their gradients, against a plain derivation, one row after the other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from torch import Tensor
from torch.nn import functional as F

from tests.helpers.blip2 import shaken
from tests.helpers.pairs import CLS, DEC, NAMES, SEP, TEXTS, learned, make_pairs, tiny_pretraining
from tests.helpers.programs import ROOT
from vlm.objectives.representation_learning import RepresentationLearning, draw_one
from vlm.schema import Batch


def derived(model: Any, batch: Batch, names: Any, temperature: Tensor, uniform: Tensor) -> dict[str, Tensor]:
    """Sums of the three losses. `uniform` are the random numbers of the hard negatives: for images, for texts."""
    features = model.encoder(batch.pixel_values)
    num, num_queries = len(features), model.connector.num_tokens
    words = model.connector.words.weight
    sums = dict.fromkeys(("contrastive_loss", "matching_loss", "generation_loss"), torch.zeros(()))

    def states(row: int | None, ids: list[int] | None, mask: Tensor | None = None) -> Tensor:
        text = None if ids is None else torch.tensor([ids])
        return model.connector.hidden_states(None if row is None else features[row : row + 1], text, mask)[0]

    texts = [[CLS, *text, SEP] for text in TEXTS]
    images = [F.normalize(model.heads.image(states(row, None)), dim=-1) for row in range(num)]
    embeds = [F.normalize(model.heads.text(states(None, text)[0]), dim=0) for text in texts]
    similarity = torch.stack(
        [torch.stack([max(vector @ text for vector in image) / temperature for text in embeds]) for image in images]
    )[..., 0]
    same = torch.tensor([[one == other for other in names] for one in names])
    for table in (similarity, similarity.T):
        for row in range(num):
            log_p = table[row].log_softmax(0)
            for column in range(num):
                target = 0.9 * float(same[row, column]) / float(same[row].sum()) + 0.1 / num
                sums["contrastive_loss"] = sums["contrastive_loss"] - target * log_p[column] / 2

    def other(table: Tensor, row: int, number: float) -> int:
        weights = table[row].detach().double().exp() * ~same[row]
        return int((weights.cumsum(0) / weights.sum() <= number).sum())

    pairs = [(row, row, 1) for row in range(num)]
    pairs += [(other(similarity.T, row, uniform[0, row].item()), row, 0) for row in range(num)]
    pairs += [(row, other(similarity, row, uniform[1, row].item()), 0) for row in range(num)]
    for image, text, label in pairs:
        logits = torch.stack([model.heads.match(each) for each in states(image, texts[text])[:num_queries]]).mean(0)
        sums["matching_loss"] = sums["matching_loss"] - logits.log_softmax(0)[label]
    for row, text in enumerate(texts):
        size = num_queries + len(text)
        mask = torch.ones(1, size, size, dtype=torch.bool).tril()
        mask[:, :num_queries, :num_queries] = True
        hidden = states(row, [DEC, *text[1:]], mask)[num_queries:]
        for position, target in enumerate(text[1:]):
            log_p = model.heads.predict_words(hidden[position][None], words)[0].log_softmax(0)
            sums["generation_loss"] = sums["generation_loss"] - 0.9 * log_p[target] - 0.1 * log_p.mean()
    return sums


@pytest.mark.parametrize("names", [None, NAMES], ids=["different images", "repeated images"])
def test_losses_and_gradients_are_those_of_a_plain_derivation(names: Any) -> None:
    model = shaken(tiny_pretraining())
    model.encoder.requires_grad_(False)
    batch, objective = make_pairs(names=names), RepresentationLearning()
    trained = {**dict(model.named_parameters()), **dict(objective.named_parameters())}
    trained = {name: parameter for name, parameter in trained.items() if parameter.requires_grad}
    torch.manual_seed(5)
    output = objective(model, batch)
    num_words = sum(len(text) + 1 for text in TEXTS)
    counts = {"contrastive_loss": 8, "matching_loss": 24, "generation_loss": num_words}
    assert {name: output.counts[name] for name in counts} == counts
    torch.manual_seed(5)
    uniform = torch.rand(2, 8, dtype=torch.float64)
    expected = derived(model, batch, names or range(8), objective.temperature, uniform)
    for name, value in expected.items():
        torch.testing.assert_close(output.sums[name], value, atol=0, rtol=1e-5)
        ours = torch.autograd.grad(output.sums[name], [*trained.values()], retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(value, [*trained.values()], retain_graph=True, allow_unused=True)
        assert sum(gradient is not None for gradient in ours) > 30
        for parameter, mine, other in zip(trained, ours, theirs, strict=True):
            zero = torch.zeros_like(trained[parameter])
            pair = [zero if gradient is None else gradient for gradient in (mine, other)]
            torch.testing.assert_close(*pair, atol=1e-4, rtol=1e-4, msg=f"{name}: {parameter}")


@pytest.mark.slow
def test_two_ranks_are_one_with_all_rows(tmp_path: Path) -> None:
    """Losses, gradients, hard negatives and retrieval; five pairs on one rank and three on the other."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.helpers.pairs", str(tmp_path)]
    options: Any = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [
        subprocess.Popen(command, env={**os.environ, **shared, "LOCAL_RANK": str(rank)}, **options) for rank in (0, 1)
    ]
    said = [process.communicate(timeout=300)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    alone = learned(make_pairs(names=NAMES))
    for rank in (0, 1):
        ours = torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True)
        assert ours["counts"] == alone["counts"]
        torch.testing.assert_close(ours["sums"], alone["sums"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours["gradients"], alone["gradients"], atol=1e-4, rtol=1e-4)
        assert ours["metrics"] == {name: pytest.approx(value) for name, value in alone["metrics"].items()}


def test_a_hard_negative_is_drawn_by_its_probability() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]])
    uniform = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    assert draw_one(weights.expand(400, -1), uniform).bincount(minlength=5).tolist() == [0, 100, 0, 300, 0]
    assert draw_one(weights, torch.zeros(1, dtype=torch.float64)).item() == 1


def test_the_same_image_is_never_a_negative() -> None:
    """Not even where its similarity is the highest by far: two images, each four times."""
    model = shaken(tiny_pretraining())
    matched = []
    original = model.match
    model.match = lambda features, *text: matched.append((features, *text)) or original(features, *text)  # type: ignore[method-assign]
    batch = make_pairs(names=["a", "a", "a", "a", "b", "b", "b", "b"])
    RepresentationLearning(temperature=0.001)(model, batch)
    ((features, ids, _),) = matched
    of_image = {tuple(row.flatten().tolist()): number // 4 for number, row in enumerate(model.features(batch))}
    of_text = {tuple(row.tolist()): number // 4 for number, row in enumerate(batch.input_ids)}
    images = [of_image[tuple(row.flatten().tolist())] for row in features]
    texts = [of_text[tuple(row.tolist())] for row in ids]
    assert [one == other for one, other in zip(images, texts, strict=True)] == [True] * 8 + [False] * 16


def test_one_image_alone_has_no_negatives() -> None:
    model, objective = shaken(tiny_pretraining()), RepresentationLearning()
    batch = make_pairs(names=["a"] * 8)
    with pytest.raises(
        ValueError, match=r"a step has 8 pairs of one image, so there are no negatives; set data.batch_s"
    ):
        objective(model, batch)
    output = objective.eval()(model, batch)  # a validation goes on
    assert output.counts["matching_loss"] == 8


def test_a_validation_is_the_same_each_time() -> None:
    """It takes no random numbers from the training."""
    model, objective, batch = shaken(tiny_pretraining()), RepresentationLearning().eval(), make_pairs()
    before = torch.get_rng_state()
    one, other = objective(model, batch), objective(model, batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert one.sums["matching_loss"] == other.sums["matching_loss"]
