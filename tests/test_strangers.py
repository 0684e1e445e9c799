"""A run directory that somebody sends is data: whatever it holds, no code runs, and no file outside it changes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.parts import make_module, make_trainer
from tests.test_module import WHOLE, loader
from vlm import artifact, files, run
from vlm.callbacks.metrics_file import MetricsFile
from vlm.callbacks.save import Save
from vlm.evaluation.runner import write_samples


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file of the user's, outside of every run directory."""
    file = tmp_path / "home" / "notes.txt"
    file.parent.mkdir()
    file.write_text("mine")
    return file


def test_a_new_file_takes_the_place_of_a_link(tmp_path: Path, victim: Path) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "artifact").mkdir(parents=True)
    for name in ("samples.jsonl", "metrics.json.tmp", "artifact/weights.safetensors.tmp", "artifact/manifest.json.tmp"):
        (run_dir / name).symlink_to(victim)
    write_samples(run_dir / "samples.jsonl", [{"id": "a"}])
    artifact.write_json(run_dir / "metrics.json", {"val/loss": 1.0})
    artifact.save(run_dir / "artifact", tensors={}, manifest={}, step=1)
    assert victim.read_text() == "mine"
    assert (run_dir / "samples.jsonl").read_text() == '{"id": "a"}\n'
    assert not (run_dir / "samples.jsonl").is_symlink()
    assert [path for path in run_dir.rglob("*") if path.is_symlink()] == []


@pytest.mark.parametrize("name", ["checkpoints/last.ckpt.tmp", "best/config.yaml.tmp"])
def test_a_save_follows_no_link(name: str, tmp_path: Path, victim: Path) -> None:
    run_dir = tmp_path / "run"
    (run_dir / name).parent.mkdir(parents=True)
    (run_dir / name).symlink_to(victim)
    (run_dir / "config.yaml").write_text("seed: 0")
    save = Save(run_dir=run_dir, manifest={}, inherited=[], best="val/loss")
    trainer = make_trainer(run_dir, callbacks=[save], val_check_interval=1, check_val_every_n_epoch=None)
    trainer.fit(make_module(), loader([WHOLE]), loader([WHOLE]))
    assert victim.read_text() == "mine"
    assert (run_dir / name).with_suffix("").is_file()
    assert not (run_dir / name).is_symlink()


def test_what_is_added_to_follows_no_link(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to(victim)
    trainer = make_trainer(tmp_path, callbacks=[MetricsFile()])
    with pytest.raises(ValueError, match=r"metrics\.jsonl is a link or a pipe, which is not written to; remove it"):
        trainer.fit(make_module(), loader([WHOLE]))
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "checkpoints", "csv/from_step_2/metrics.csv"])
@pytest.mark.parametrize("resumed", [True, False])
def test_a_directory_with_a_link_out_of_it_is_not_written_to(
    name: str, resumed: bool, tmp_path: Path, victim: Path
) -> None:
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(victim.parent if name == "checkpoints" else victim)
    with pytest.raises(ValueError, match=f"{link} is a link to {link.resolve()}, outside {tmp_path / 'run'}; remove"):
        run.claim(tmp_path / "run", resumed=resumed)
    assert victim.read_text() == "mine"


def test_links_within_a_directory_and_to_it_stay(tmp_path: Path) -> None:
    """W&B makes some, and a user's runs may lie on another disk."""
    (tmp_path / "disk" / "wandb" / "run-1").mkdir(parents=True)
    (tmp_path / "disk" / "wandb" / "latest-run").symlink_to("run-1")
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    lock = run.claim(tmp_path / "run", resumed=False)
    assert lock is not None
    lock.close()
    (tmp_path / "disk" / "eval").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="eval is a link to"):
        files.refuse_links(tmp_path / "run" / "eval", within=tmp_path / "run")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_pipes_and_devices_are_not_read(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "file")
    with pytest.raises(ValueError, match="file is not a regular file; replace it with one"):
        files.read(tmp_path / "file", max_bytes=10)
    with pytest.raises(ValueError, match=r"file is (not a regular file|a link or a pipe)"):
        files.lock_file(tmp_path / "file")
    (tmp_path / "large").write_bytes(bytes(11))
    with pytest.raises(ValueError, match="large has 11 bytes, more than the limit of 10"):
        files.read(tmp_path / "large", max_bytes=10)
