"""A disk that takes nothing more: whatever is being written, the error names the file.

The limit of the process on the size of files stands for the disk: the kernel refuses to write, as it does there.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from torch._utils import ExceptionWrapper

from tests.helpers.parts import WHOLE, loader, make_module, make_trainer
from vlm import config, files
from vlm.evaluation.answers import write_samples
from vlm.launch.entry import sentence
from vlm.loggers.metrics_file import MetricsFile
from vlm.training import artifact, results, run


@contextmanager
def full_disk() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fit(folder: Path) -> None:
    trainer = make_trainer(folder, logger=MetricsFile(run_dir=folder))
    trainer.fit(make_module(), loader([WHOLE]))


def add(folder: Path) -> None:
    with files.append(folder / "bad_samples.jsonl") as file:
        file.write("a line")


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("manifest.json", lambda folder: artifact.write_json(folder / "manifest.json", {"a": 1})),  # plan, doctor, …
        ("config.yaml", lambda folder: config.write_config(folder, {"seed": 0}, {})),
        ("samples.jsonl", lambda folder: write_samples(folder / "samples.jsonl", [{"id": "a"}])),
        ("metrics.jsonl", fit),
        ("metrics.json", lambda folder: results.finish(folder, {"val/loss": 1.0}, [])),
        ("bad_samples.jsonl", add),
        (".lock", lambda folder: run.lock(folder, resumed=False)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_file_is_named(tmp_path: Path, name: str, write: Callable[[Path], Any]) -> None:
    with full_disk(), pytest.raises(OSError, match=f"^could not write {tmp_path / name}: File too large$"):
        write(tmp_path)


def test_the_folder_of_a_logger_is_named(tmp_path: Path) -> None:
    """It writes its table itself, in the middle of a fit."""
    logger = CSVLogger(tmp_path, name="csv", version="")
    trainer: Any = SimpleNamespace(loggers=[logger])
    logger.log_metrics({"loss": 1.0})
    said = f"could not write the metrics in {tmp_path / 'csv'}: File too large"
    with full_disk():
        with pytest.raises(OSError, match=f"^{said}$"), run.naming_log_folder(trainer):
            logger.save()
        with pytest.raises(ValueError, match=f"the logger csv could not start: {said}"):
            run.log_config(trainer, {"seed": 0, "logger": {"csv": {}}})


def test_the_error_of_a_data_worker_is_the_same_sentence(tmp_path: Path) -> None:
    """It comes with two traces: what the disk said, and what names the file."""
    with full_disk():
        try:
            add(tmp_path)
        except OSError:
            wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(OSError, match=r"^Caught OSError") as caught:
        wrapped.reraise()
    assert sentence(caught.value) == f"could not write {tmp_path / 'bad_samples.jsonl'}: File too large"
