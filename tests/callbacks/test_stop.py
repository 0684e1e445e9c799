"""A signal ends a run after the step in progress, saved, and without a validation that nobody may wait for."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.helpers.parts import HALVES, WHOLE, loader, make_module, make_trainer
from tests.helpers.programs import QUICK, ROOT, call, read, train
from vlm.callbacks.save import Save, newest_checkpoint
from vlm.callbacks.stop import StopOnSignal, StopOnTime
from vlm.data.workers import SIGNALS, WorkerContext


class Signalled(pl.Callback):
    """Sends the process a signal at the first `moment`, and keeps what was done."""

    def __init__(self, moment: Callable[[str, int], bool], signum: int) -> None:
        self.moment, self.signum = moment, signum
        self.done: list[str] = []

    def _now(self, name: str, trainer: Any) -> None:
        if self.moment(name, trainer.global_step) and "signal" not in self.done:
            self.done.append("signal")
            os.kill(os.getpid(), self.signum)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self._now("start", trainer)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self._now("batch", trainer)
        self.done.append("batch")

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        self._now("validation", trainer)
        self.done.append("validation")


def fit(
    folder: Path, moment: Callable[[str, int], bool], signum: int, **options: Any
) -> tuple[list[str], pl.Trainer, StopOnSignal]:
    folder.mkdir(exist_ok=True)
    watch, stop = Signalled(moment, signum), StopOnSignal()
    save = Save(run_dir=folder, manifest={}, inherited=[], every_n_steps=100)
    usual = {"max_steps": 9, "val_check_interval": 2, "check_val_every_n_epoch": None}
    trainer = make_trainer(folder, callbacks=[watch, stop, save], **{**usual, **options})
    batches = [*HALVES] * 9 if "accumulate_grad_batches" in options else [WHOLE] * 9
    trainer.fit(make_module(), loader(batches), loader([WHOLE]))
    return watch.done, trainer, stop


@pytest.mark.parametrize("signum", SIGNALS)
def test_no_validation_follows_a_signal(tmp_path: Path, signum: int) -> None:
    """In the step before one that is due."""
    before = [signal.getsignal(number) for number in SIGNALS]
    done, trainer, stop = fit(tmp_path, lambda what, step: (what, step) == ("batch", 3), signum)
    assert done == ["batch", "batch", "validation", "batch", "signal", "batch"]
    assert newest_checkpoint(tmp_path) == (tmp_path / "checkpoints" / "last.ckpt", 4)
    assert (trainer.global_step, stop.received) == (4, signum)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_signal_during_a_validation_waits_for_its_end_alone(tmp_path: Path) -> None:
    done, _, _ = fit(tmp_path, lambda what, step: (what, step) == ("validation", 2), signal.SIGTERM)
    assert done == ["batch", "batch", "signal", "validation"]
    assert newest_checkpoint(tmp_path) == (tmp_path / "checkpoints" / "last.ckpt", 2)


def test_a_step_of_several_batches_is_ended(tmp_path: Path) -> None:
    """Also where a validation comes in the middle of it."""
    odd = {"accumulate_grad_batches": 2, "val_check_interval": 3}
    done, _, _ = fit(tmp_path, lambda what, step: what == "validation", signal.SIGTERM, **odd)
    assert done == ["batch", "batch", "batch", "signal", "validation", "batch"]
    assert newest_checkpoint(tmp_path) == (tmp_path / "checkpoints" / "last.ckpt", 2)


def test_a_signal_just_before_the_first_step(tmp_path: Path) -> None:
    """When Lightning listens already and we do not yet."""
    done, _, stop = fit(tmp_path, lambda what, step: what == "start", signal.SIGTERM)
    assert (done, stop.received) == (["signal", "batch"], signal.SIGTERM)
    assert newest_checkpoint(tmp_path) == (tmp_path / "checkpoints" / "last.ckpt", 1)


def test_time_is_up_after_a_whole_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs out with the third of the accumulated batches; the fourth ends the step."""
    batches: list[int] = []

    class Count(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            batches.append(batch_idx)

    with pytest.raises(ValueError, match=r"trainer\.max_time='1h' must be DD:HH:MM:SS, days first, such as"):
        StopOnTime(max_time="1h")
    timer = StopOnTime(max_time="00:00:01:00")
    monkeypatch.setattr(timer, "time_elapsed", lambda *_: 30.0 * len(batches) - 20)
    save = Save(run_dir=tmp_path, manifest={}, inherited=[], every_n_steps=100)
    options: dict[str, Any] = {"max_time": "00:00:01:00", "accumulate_grad_batches": 2, "max_steps": 9}
    trainer = make_trainer(tmp_path, callbacks=[Count(), timer, save], **options)
    trainer.fit(make_module(), loader([*HALVES] * 9))
    assert batches == [0, 1, 2, 3]
    assert newest_checkpoint(tmp_path) == (tmp_path / "checkpoints" / "last.ckpt", 2)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    assert "StopOnTime" not in state, "a run that goes on has its time again"


@contextmanager
def group(job: Callable[[], int], out: Path) -> Iterator[Any]:
    """A process with a group of its own, as a shell or a scheduler makes one, that ends with the code of `job`."""

    def lead() -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a test in the background may ignore it
        torch.set_num_threads(1)  # those of the parent are not here
        with open(out, "w") as file, redirect_stdout(file), redirect_stderr(file):
            code = job()
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=lead)
    process.start()
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()


def wait_until(done: Callable[[], bool], process: Any) -> None:
    until = time.monotonic() + 240
    while not done():
        assert process.is_alive()
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize(
    "signums",
    [
        [signal.SIGINT],
        *(
            pytest.param(signums, marks=pytest.mark.slow)
            for signums in (
                *([signal.SIGTERM], [signal.SIGUSR1]),
                *([signal.SIGTERM] * 2, [signal.SIGUSR1, signal.SIGTERM]),
            )
        ),
    ],
    ids=lambda signums: "_".join(signum.name for signum in signums),
)
def test_a_signal_to_the_group_of_a_run_with_data_workers(tmp_path: Path, signums: list[signal.Signals]) -> None:
    """Ctrl-C and a scheduler's signals reach the workers too; the run needs them until it has saved."""
    run, out = tmp_path / "run", tmp_path / "out"
    slow = ["trainer.max_steps=2000", "trainer.val_check_interval=2000", "data.num_workers=2", f"run_dir={run}"]
    with group(lambda: train(*QUICK, *slow), out) as process:
        wait_until(lambda: (run / "metrics.jsonl").exists() and len(read(run / "metrics.jsonl")) > 1, process)
        for signum in signums:
            os.killpg(process.pid, signum)
            time.sleep(0.02)
        process.join(60)
        assert process.exitcode == 128 + signums[0], out.read_text()
    assert out.read_text().count("Stopping after this step") == 1
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None
    assert 2 <= checkpoint[1] == read(run / "metrics.jsonl")[-1]["step"] < 2000


def test_only_its_main_process_ends_a_data_worker() -> None:
    """Also one that is in the middle of a sample."""
    worker = WorkerContext().Process(target=time.sleep, args=(60,))
    worker.start()
    for signum in SIGNALS:
        os.kill(worker.pid or 0, signum)
    worker.join(0.2)
    assert worker.is_alive()
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set(), "ours are as they were"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_last_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int) -> None:
    """Lightning leaves with 1 on Ctrl-C, and on SIGTERM with 0, as if all were done."""

    class Now(pl.Callback):
        def on_validation_batch_start(self, *_: Any) -> None:
            os.kill(os.getpid(), signum)

    def job(cfg: Any) -> None:
        trainer = make_trainer(tmp_path, callbacks=[Now()])
        trainer.validate(make_module(), loader([WHOLE] * 3), verbose=False)

    monkeypatch.chdir(tmp_path)
    assert call(job, "train", "data=shapes", f"run_dir={tmp_path / 'run'}") == 128 + signum


@pytest.mark.parametrize("library", ["hydra", "lightning"])
def test_ctrl_c_during_the_first_imports_leaves_no_trace(tmp_path: Path, library: str) -> None:
    """It comes in the middle of the import of a library, which answers an interrupt with an error of its own."""
    package = tmp_path / "libraries" / library
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(5)\n"
        "except KeyboardInterrupt:\n    raise ImportError('cannot load')\n"
    )
    program = "import signal, runpy; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", program, *QUICK, f"run_dir={tmp_path / 'run'}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'libraries'}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
