"""A run directory that somebody sends is data: whatever it holds, no code runs, and no file outside it changes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from tests.parts import make_module, make_trainer
from tests.test_module import WHOLE, loader
from vlm import artifact, files, run
from vlm.callbacks.metrics_file import MetricsFile
from vlm.callbacks.save import Save
from vlm.evaluation.runner import write_samples
from vlm.options import KINDS, bind


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


class SoftPool(nn.Module):
    """A connector of the user's own package."""

    def __init__(self, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature


FUNCTIONS = (
    *("vlm.cli.launch.wait_for", "vlm.artifact.write_json", "vlm.callbacks.save.newest_checkpoint", "vlm.run.finish"),
    *("torch.load", "torch.save", "torch.hub.load", "torch.utils.collect_env.run", "os.system", "builtins.eval"),
    *("lightning.pytorch.seed_everything", "pathlib.Path", "subprocess.Popen", "vlm.connectors.mlp.nn", "torch", ".x"),
)


@pytest.mark.parametrize("group", [*KINDS, "data.sources.captions", "callbacks.stop"])
def test_a_group_takes_no_function_and_no_class_of_another_kind(group: str) -> None:
    other = "torch.nn.GELU" if group.startswith("callbacks") else "vlm.callbacks.stop.StopOnSignal"
    for target in (*FUNCTIONS, other, None, 5):
        with pytest.raises(ValueError, match=rf"^{group}\._target_={target} (is not allowed|cannot be imported)"):
            bind(group, {"_target_": target})


def test_a_part_of_the_users_own_package(monkeypatch: pytest.MonkeyPatch) -> None:
    own: Any = SimpleNamespace(SoftPool=SoftPool, Other=dict)
    monkeypatch.setitem(sys.modules, "mypkg", own)
    assert bind("connector", {"_target_": "mypkg.SoftPool", "temperature": 2.0})().temperature == 2.0
    with pytest.raises(ValueError, match=r"connector\._target_=mypkg\.Other is not allowed; name a class of vlm\.conn"):
        bind("connector", {"_target_": "mypkg.Other"})
    with pytest.raises(ValueError, match=r"vlm\.llms\.base\.LanguageModel is abstract and cannot be made"):
        bind("llm", {"_target_": "vlm.llms.base.LanguageModel"})
