"""Golden loss curves: 20 steps of three tiny runs, committed, which a refactoring must reproduce.

`python -m tests.test_golden` writes the curves anew. Do so only for a change that is meant to move them, and say why in
its commit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CURVES = Path(__file__).parent / "golden" / "curves.json"
TINY = (
    *("llm=tiny", "encoder=tiny", "seed=0", "trainer=cpu", "trainer.precision=32-true"),
    *("trainer.max_steps=20", "trainer.val_check_interval=10", "trainer.log_every_n_steps=1"),
    *(
        "data.batch_size=4",
        "data.num_val_samples=8",
        "evaluators.answers.num_samples=4",
        "evaluators.answers.max_new_tokens=4",
    ),
)
RUNS = {  # in an order in which a run may start from the artifact of one before it
    "align": (),
    # LoRA's dropout draws a number for each position, so rows without padding have other ones.
    "instruct": ("stage=instruct", "ckpt=align", "trainer.accumulate_grad_batches=2", "llm.attention=sdpa"),
    "cross_attention": ("connector=cross_attention",),
}
KEPT = ("train/loss", "train/grad_norm", "train/tokens", "val/loss", "val/loss_shuffled", "val/loss_blank")
# The same machine gives the same numbers. Other processors round sums otherwise, which 20 steps carry on.
TOLERANCE = 2e-4


def train(name: str, folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl of a run in `folder`/`name`, on one thread, timings left out."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "train.py"), *TINY, *RUNS[name], f"run_dir={name}"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key in ("step", *KEPT)} for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_curve(name: str, folder: Path) -> None:
    expected = json.loads(CURVES.read_text())[name]
    curve = train(name, folder)
    assert [line["step"] for line in curve if "train/loss" in line] == list(range(1, 21))
    assert [line.keys() for line in curve] == [line.keys() for line in expected]
    for line, right in zip(curve, expected, strict=True):
        assert line == pytest.approx(right, rel=TOLERANCE, abs=1e-6), f"step {right['step']}"


if __name__ == "__main__":
    CURVES.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        CURVES.write_text(json.dumps({name: train(name, Path(scratch)) for name in RUNS}, indent=1) + "\n")
