"""Faults: after each of them nothing is lost that had been saved, and the user reads one line."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch._utils import ExceptionWrapper
from torch.utils.data import get_worker_info

from tests.helpers.parts import EVERY, WHOLE, loader, make_module, make_trainer
from tests.helpers.programs import QUICK, another_process, read, train
from vlm.callbacks.rates import ConfiguredRates
from vlm.callbacks.save import Save, newest_checkpoint
from vlm.data.rows import Rows
from vlm.launch.entry import sentence
from vlm.training import artifact, run


class Killed(BaseException):
    """As kill -9 does, it leaves everything as it is at that moment."""


def fit(folder: Path, *, steps: int) -> None:
    """Steps of a run that saves after each of them, its best as well."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("seed: 0")
    save = Save(run_dir=folder, manifest={}, inherited=[], every_n_steps=1, best="val/loss")
    trainer = make_trainer(folder, max_steps=steps, callbacks=[save], **EVERY)
    trainer.fit(make_module(warmup_ratio=0.0), loader([WHOLE] * 4), loader([WHOLE]))


def saved(folder: Path) -> tuple[int, dict[str, Tensor]]:
    """Step and tensors of an artifact, its two files checked against each other."""
    names = json.loads((folder / "artifact" / "manifest.json").read_text())["tensors"]
    with safe_open(folder / "artifact" / "weights.safetensors", framework="pt") as file:
        assert set(names) == set(file.keys())
        return int(file.metadata()["step"]), {name: file.get_tensor(name) for name in names}


@pytest.mark.slow
def test_killed_anywhere_in_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files change by renaming alone, so these are all the states that a kill can leave: one before each renaming."""
    expected: dict[int, dict[str, Tensor]] = {}
    renamings: list[str] = []
    rename, last = os.replace, 10**9

    def counted(source: Any, target: Any) -> None:
        if len(renamings) >= last:
            raise Killed
        renamings.append(Path(target).name)
        rename(source, target)

    monkeypatch.setattr(os, "replace", counted)
    for steps in (1, 2):
        renamings.clear()
        fit(tmp_path / f"whole {steps}", steps=steps)
        expected[steps] = saved(tmp_path / f"whole {steps}")[1]
    best = ["config.yaml", "weights.safetensors", "manifest.json"]
    first = [*best, "weights.safetensors", "manifest.json", "last.ckpt"]
    assert renamings == [*first, *first[:-1], "last-1.ckpt", "last.ckpt"]

    found = []
    for last in range(len(renamings)):  # which `counted` reads
        renamings.clear()
        folder = tmp_path / str(last)
        with pytest.raises(Killed):
            fit(folder, steps=2)
        steps = [0, 0]
        for number, each in enumerate((folder, folder / "best")):
            if last >= len(first) or (each / "artifact" / "manifest.json").exists():
                steps[number], tensors = saved(each)
                assert all(torch.equal(tensors[name], value) for name, value in expected[steps[number]].items())
                assert (each / "config.yaml").exists()
        checkpoint = newest_checkpoint(folder)
        found.append((*steps, checkpoint[1] if checkpoint else 0))
    early = [(0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 1, 0), (0, 1, 0), (1, 1, 0)]
    assert found == [*early, (1, 1, 1), (1, 1, 1), (1, 2, 1), (1, 2, 1), (2, 2, 1), (2, 2, 1), (2, 2, 1)]


@pytest.mark.parametrize(
    ("what", "steps", "text"),
    [
        ("weights", (1, 1), "artifact of step 2 .*No space left on device.*; the previous artifact is intact"),
        ("manifest", (1, 1), "artifact of step 2 .*No space left on device.*; the previous artifact is intact"),
        ("late", (1, 1), "artifact of step 2 .*No space left on device.*; the previous artifact is intact"),
        ("checkpoint", (2, 1), r"last\.ckpt at step 2: .*No space left on device; the artifact is saved"),
    ],
)
def test_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, steps: tuple[int, int], text: str
) -> None:
    """The disk takes half a file at the second save, or says only when asked to have it all that it has not."""
    calls = 0

    def filling(write: Any, *, of: Any) -> Any:
        def instead(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            file = of(*arguments)
            calls += file is not None
            if file is None or calls < (3 if what == "late" else 2):
                return write(*arguments, **options)
            if what != "late":
                Path(file).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return instead

    owner, name, of = {
        "weights": (artifact, "save_file", lambda tensors, file, *_: file),
        "manifest": (artifact, "write", lambda path, *_: path if path.name == "manifest.json.tmp" else None),
        "late": (os, "fsync", lambda number: number),
        "checkpoint": (pl.Trainer, "save_checkpoint", lambda trainer, file, *_: file),
    }[what]
    save = Save(run_dir=tmp_path, manifest={}, inherited=[], every_n_steps=1)
    trainer = make_trainer(tmp_path, max_steps=3, callbacks=[save])
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, filling(getattr(owner, name), of=of))
        if what == "late":
            calls = -1  # the first save asks for weights, manifest and checkpoint
        with pytest.raises(artifact.SaveError, match=text):
            trainer.fit(make_module(), loader([WHOLE] * 4))
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (saved(tmp_path)[0], checkpoint[1]) == steps
    assert list(tmp_path.rglob("*.tmp")) == []


def test_two_runs_on_one_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with another_process(tmp_path) as (process, worker):
        who = f"run_dir={tmp_path} is in use by process {process} on {socket.gethostname()}; wait for its end"
        for resumed in (False, True):
            with pytest.raises(ValueError, match=who):
                run.lock(tmp_path, resumed=resumed)
        for rank in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
            with monkeypatch.context() as patch:
                patch.setenv(rank, "1")
                assert run.lock(tmp_path, resumed=False) is None, "another rank of the same run"
        os.kill(process, signal.SIGKILL)
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)  # until its last thread has ended, which frees the lock
        os.kill(worker, 0)  # is there still
        lock = run.lock(tmp_path, resumed=True)
        assert lock is not None
        assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
        lock.close()


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", none)
    assert run.lock(tmp_path, resumed=False) is not None
    assert "file system without locks (No locks available); do not start a second run" in capsys.readouterr().out


@pytest.mark.slow
def test_a_data_worker_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Any) -> None:
    folder = tmp_path / "run"
    row, rows = Rows.__getitem__, 0

    def dying(self: Rows, indices: Any) -> Any:
        nonlocal rows
        rows += get_worker_info() is not None
        if rows == 9:  # of the fifth batch
            while "\n" not in (folder / "metrics.jsonl").read_text().partition('"step": 3')[2]:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return row(self, indices)

    options = [*QUICK, "trainer.max_steps=9", "trainer.val_check_interval=9", "data.num_workers=1", f"run_dir={folder}"]
    monkeypatch.setattr(Rows, "__getitem__", dying)
    assert train(*options, "callbacks.save.every_n_steps=2") == 2
    error = told()
    assert error.startswith("Error: a data worker died: DataLoader worker (pid")
    assert error.endswith("set data.num_workers or data.batch_size lower, and continue with resume=<run dir>")
    step = read(folder / "metrics.jsonl")[-1]["step"]
    assert 3 <= step < 9
    assert saved(folder)[0] == step
    assert newest_checkpoint(folder) == (folder / "checkpoints" / "last.ckpt", step - step % 2)


def test_an_error_in_a_data_worker_is_the_same_sentence() -> None:
    try:
        raise ValueError("sample 'a' is bad: repair it")
    except ValueError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(ValueError, match="Original Traceback") as caught:
        wrapped.reraise()
    assert sentence(caught.value) == "sample 'a' is bad: repair it"
    assert sentence(ValueError("a\nb")) == "a\nb"


def test_a_longer_schedule_begins_at_once(tmp_path: Path) -> None:
    """After four of four steps, four more at another peak: the rates of eight steps at that from the start."""

    def rates(steps: int, lr: float, *more: pl.Callback, ckpt: Path | None = None) -> list[float]:
        seen: list[float] = []

        class Rates(pl.Callback):
            def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
                seen.append(optimizer.param_groups[0]["lr"])

        trainer = make_trainer(tmp_path, max_steps=steps, callbacks=[Rates(), *more])
        module = make_module(lr={"connector": lr}, weight_decay=lr, warmup_ratio=0.0, min_lr_ratio=0.0)
        trainer.fit(module, loader([WHOLE] * 8), ckpt_path=ckpt, weights_only=ckpt and True)
        assert [group["weight_decay"] for group in trainer.optimizers[0].param_groups] == [lr, 0.0]
        return seen

    whole = rates(8, 3e-3)
    save = Save(run_dir=tmp_path, manifest={}, inherited=[])
    assert rates(4, 1e-3, save) != whole[:4]
    assert rates(8, 3e-3, ConfiguredRates(), ckpt=tmp_path / "checkpoints" / "last.ckpt") == whole[4:]
