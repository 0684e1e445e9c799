"""When a run saves, and where to: after whole steps, at the times asked for, straight to the run's own disk."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.helpers.parts import EVERY, HALVES, WHOLE, loader, make_module, make_trainer
from vlm.callbacks.save import Save, newest_checkpoint, rng_state, set_rng_state
from vlm.training import artifact


def test_saving_every_so_many_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, steps = 0.0, []
    monkeypatch.setattr("vlm.callbacks.save.time.monotonic", lambda: now)

    class Clock(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            nonlocal now
            if (tmp_path / "checkpoints" / "last.ckpt").exists():
                steps.append(newest_checkpoint(tmp_path)[1])  # type: ignore[index]
            now += 25

    save = Save(run_dir=tmp_path, manifest={}, inherited=[], every_n_steps=100, every_n_minutes=1.0)
    make_trainer(tmp_path, max_steps=7, callbacks=[Clock(), save]).fit(make_module(), loader([WHOLE] * 7))
    assert steps == [3, 3, 3, 6], "75 s, then 150 s, seen before steps 4 to 7"
    with pytest.raises(ValueError, match=r"callbacks\.save\.every_n_minutes=0.0; set it above 0, or null"):
        Save(run_dir=tmp_path, manifest={}, inherited=[], every_n_minutes=0.0)


def test_between_the_batches_of_a_step_nothing_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A validation after the first of two batches takes so long that a save is due: it waits for the second."""
    now, batches = 0.0, []
    monkeypatch.setattr("vlm.callbacks.save.time.monotonic", lambda: now)

    class Slow(pl.Callback):
        def on_validation_start(self, trainer: Any, module: Any) -> None:
            nonlocal now
            now += 61

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if file := newest_checkpoint(tmp_path):
                state = torch.load(file[0], weights_only=True)["loops"]["fit_loop"]
                batches.append(state["epoch_loop.batch_progress"]["total"]["processed"])

    save = Save(run_dir=tmp_path, manifest={}, inherited=[], every_n_steps=100, every_n_minutes=1.0)
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "max_steps": 4, "val_check_interval": 3}
    trainer = make_trainer(tmp_path, callbacks=[Slow(), save], **{**EVERY, **options})
    trainer.fit(make_module(), loader([*HALVES] * 4), loader([WHOLE]))
    assert batches == [4, 4, 6, 6], "of a whole step; saved as soon as it was over"


def test_steps_are_saved_where_no_validation_comes(tmp_path: Path) -> None:
    save = Save(run_dir=tmp_path, manifest={}, inherited=[], every_n_steps=2)
    trainer = make_trainer(
        tmp_path, max_steps=4, callbacks=[save], limit_val_batches=0, **{**EVERY, "val_check_interval": 2}
    )
    trainer.fit(make_module(), loader([WHOLE] * 4), loader([WHOLE]))
    assert (tmp_path / "checkpoints" / "last-1.ckpt").exists()


def test_a_checkpoint_that_the_disk_does_not_take_is_the_disks_word(tmp_path: Path) -> None:
    """Not that of PyTorch's writer, which has lost its place then."""

    def fit(folder: Path) -> None:
        save = Save(run_dir=folder, manifest={}, inherited=[])
        make_trainer(folder, callbacks=[save]).fit(make_module(), loader([WHOLE]))

    fit(tmp_path / "whole")
    weights, checkpoint = (
        tmp_path / "whole" / name for name in ("artifact/weights.safetensors", "checkpoints/last.ckpt")
    )
    largest = (weights.stat().st_size + checkpoint.stat().st_size) // 2
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        with pytest.raises(artifact.SaveError, match=r"last\.ckpt at step 1: .*File too large; the artifact is saved"):
            fit(tmp_path / "cut")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "cut" / "checkpoints").iterdir()) == []


def test_a_checkpoint_goes_to_its_own_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "full"))
    save = Save(run_dir=tmp_path, manifest={}, inherited=[])
    make_trainer(tmp_path, callbacks=[save]).fit(make_module(), loader([WHOLE]))
    assert newest_checkpoint(tmp_path) == (tmp_path / "checkpoints" / "last.ckpt", 1)


def test_random_numbers_go_on() -> None:
    import random

    import numpy as np

    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    state = rng_state()
    first = draw()
    assert draw() != first
    set_rng_state(state)
    assert draw() == first
