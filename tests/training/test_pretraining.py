"""BLIP-2's first stage in train.py and eval.py, and the second stage that takes over its Q-Former."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers.programs import assert_same_run, evaluate, train, weights

QFORMER = ["connector=qformer", "connector.depth=2", "connector.width=16", "connector.num_heads=2"]
QFORMER += ["connector.num_queries=3"]
SMALL = [*QFORMER, "encoder=tiny", "encoder.image_size=32", "trainer=cpu", "preflight.samples=2", "data=shapes"]
SMALL += ["data.num_val_samples=8", "data.batch_size=4", "trainer.max_steps=4", "trainer.val_check_interval=2"]
PAIRS = ["stage=pretrain", *SMALL, "connector.dropout=0.1"]
SECOND = ["llm=tiny", *SMALL, "evaluators=visual_gain", "stage.lr.connector={rest:0.0,project:1e-3}"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the first stage."""
    run = tmp_path_factory.mktemp("pretraining") / "first"
    assert train(*PAIRS, "callbacks.save.every_n_steps=2", f"run_dir={run}") == 0
    return run


def test_every_loss_and_the_retrieval_are_reported(first: Path) -> None:
    metrics = json.loads((first / "metrics.json").read_text())
    losses = [metrics[f"val/{name}_loss"] for name in ("contrastive", "matching", "generation")]
    assert metrics["val/loss"] == pytest.approx(sum(losses), rel=1e-6)
    assert metrics["val/image_to_text/R@10"] == metrics["val/text_to_image/R@10"] == 1, "of 8 pairs"
    assert metrics["val/temperature"] != pytest.approx(0.07, abs=1e-6)
    trained = {name.partition(".")[0] for name in weights(first)}
    assert trained == {"connector", "heads", "objective"}


def test_eval_finds_the_same(first: Path) -> None:
    assert evaluate(f"ckpt={first}", "batch_size=4", "num_samples=8", f"out={first / 'again'}") == 0
    again = json.loads((first / "again" / "results.json").read_text())["metrics"]
    metrics = json.loads((first / "metrics.json").read_text())
    assert again == {name: pytest.approx(metrics[name], rel=1e-5) for name in again}
    assert "val/image_to_text/R@1" in again


def test_resumed(first: Path, tmp_path: Path) -> None:
    """Dropout and hard negatives are drawn as if nothing had happened."""
    run = tmp_path / "resumed"
    shutil.copytree(first, run)
    (run / "checkpoints" / "last.ckpt").write_bytes(b"")  # so that it resumes at step 2
    (run / "metrics.json").unlink()
    assert train(f"resume={run}") == 0
    assert_same_run(run, first)


@pytest.fixture(scope="module")
def second(first: Path) -> Path:
    run = first.parent / "second"
    assert train(*SECOND, f"ckpt={first}", f"run_dir={run}") == 0
    return run


def test_the_second_stage_takes_over_the_queries(first: Path, second: Path) -> None:
    before, after = weights(first), weights(second)
    kept = {name for name in before if re.match(r"connector\.(?!words|word_positions|.*text_feed)", name)}
    assert {name for name in after if not name.startswith("connector.project.")} == kept
    assert all(torch.equal(before[name], after[name]) for name in kept), "at a rate of 0"
    manifest = json.loads((second / "artifact" / "manifest.json").read_text())
    assert [stage["name"] for stage in manifest["stages"]] == ["pretrain", "align"]


def test_both_stages_with_the_class_token(tmp_path: Path) -> None:
    """As published; features that are cached have it too."""
    published = ["encoder.keep_tokens=true", "connector.position=false", "data.plain_answers=true"]
    cached = ["data.feature_cache=on", "data.num_train=8"]
    assert train(*PAIRS, *published, *cached, f"run_dir={tmp_path / 'first'}") == 0
    assert train(*SECOND, *published, f"ckpt={tmp_path / 'first'}", f"run_dir={tmp_path / 'second'}") == 0


def test_a_further_first_stage(first: Path, tmp_path: Path) -> None:
    """Also with its objective's temperature."""
    run = tmp_path / "further"
    frozen = ["stage.lr.connector=0.0", "stage.lr.heads=0.0", "stage.lr.objective=0.0"]
    assert train(*PAIRS, *frozen, f"ckpt={first}", f"run_dir={run}") == 0
    torch.testing.assert_close(weights(run), weights(first), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([*SECOND, "connector.num_queries=4"], "was trained with parts.connector.num_queries = 3, here it is 4; use"),
        ([*SECOND, "connector=mlp"], "was trained with parts.connector._target_ = vlm.connectors.qformer.QFormer, her"),
        (
            [*SECOND, "encoder.image_size=64"],
            "was trained with parts.encoder.image_size = [32, 32], here it is [64, 64]; use",
        ),
    ],
)
def test_a_second_stage_with_other_parts(
    first: Path, options: list[str], said: str, tmp_path: Path, told: Callable[[], str]
) -> None:
    if options[-1] == "connector=mlp":
        options = [each for each in options if not each.startswith(("connector.", "connector=q", "stage.lr"))]
    assert train(*options, f"ckpt={first}", f"run_dir={tmp_path / 'refused'}") == 2
    assert said in told()


def test_a_text_path_is_not_made_up(second: Path, tmp_path: Path, told: Callable[[], str]) -> None:
    assert train(*PAIRS, f"ckpt={second}", f"run_dir={tmp_path / 'refused'}") == 2
    assert "was trained with parts.connector.text = False, here it is True; use the same parts" in told()


def test_a_run_that_trained_none_of_the_parts(first: Path, tmp_path: Path, told: Callable[[], str]) -> None:
    heads = ["stage.connector=frozen", "stage.lr.connector=null"]
    assert train(*PAIRS, *heads, f"run_dir={tmp_path / 'heads'}") == 0
    assert train(*SECOND, f"ckpt={tmp_path / 'heads'}", f"run_dir={tmp_path / 'refused'}") == 2
    assert "has no trained weights of the encoder or connector or llm, the parts of Composed; start from" in told()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["connector=mlp"], "QFormerPretraining needs a Q-Former, not MLP; set connector=qformer"),
        (
            ["encoder.keep_tokens=true"],
            "gives features that are no patches, and connector QFormer needs the place of each; "
            "set connector.position=false, or encoder.keep_tokens=false",
        ),
        (["connector.text=false"], "QFormerPretraining reads texts with the Q-Former; set connector.text=true"),
        (
            ["encoder.tiles.grids=[[1,2]]"],
            "QFormerPretraining takes an image as a whole, but encoder.tiles.grids=[[1, 2",
        ),
        (["data.max_length=600"], "data.max_length=600 is more than the 512 tokens that the Q-Former takes; set data"),
        (["objective=language_modeling"], "LanguageModeling needs a model that predicts the next tokens of a row"),
        (["data.batch_size=1"], "a step has 1 pairs of one image, so there are no negatives; set data.batch_size=2 or"),
    ],
)
def test_options_that_do_not_fit(options: list[str], said: str, tmp_path: Path, told: Callable[[], str]) -> None:
    parts = [each for each in PAIRS if not each.startswith("connector")] if "connector=mlp" in options else PAIRS
    assert train(*parts, *options, f"run_dir={tmp_path / 'refused'}") == 2
    assert said in told()
