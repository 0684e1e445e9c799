"""A run that was killed goes on bit for bit: mid-epoch, with packing, workers, accumulation and a LoRA's dropout."""

from __future__ import annotations

import json
import re
import shutil
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.helpers.programs import QUICK, assert_same_run, evaluate, losses, read, train, until_stopped, weights
from tests.helpers.sources import caption_shard
from vlm import config
from vlm.callbacks.save import newest_checkpoint

OPTIONS = [
    *QUICK,
    "stage=instruct",
    "data.packing=true",
    "data.max_length=600",
    "data.num_train=30",
    "data.num_workers=2",
    "data.augment={crop:0.5}",
    "trainer.max_steps=8",
    "trainer.val_check_interval=6",
    "trainer.accumulate_grad_batches=2",
    "callbacks.save.every_n_steps=3",
    "callbacks.save.best=val/loss",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    run = tmp_path_factory.mktemp("resume") / "whole"
    assert train(*OPTIONS, f"run_dir={run}") == 0
    assert [step for step, _ in losses(run)] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8]
    return run


@pytest.mark.slow
def test_killed_and_resumed(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    assert until_stopped(OPTIONS, run, signal.SIGKILL, after=4) == -signal.SIGKILL
    assert (run / "checkpoints" / "last.ckpt").exists()
    assert not (run / "metrics.json").exists()
    assert train(f"resume={run}") == 0
    assert_same_run(run, whole)
    assert read(run / "samples.jsonl") == read(whole / "samples.jsonl")


@pytest.mark.slow
def test_terminated_and_resumed(whole: Path, tmp_path: Path) -> None:
    """As a scheduler does that wants the machine back."""
    run = tmp_path / "terminated"
    assert until_stopped(OPTIONS, run, signal.SIGTERM, after=2) == 128 + signal.SIGTERM
    assert "Stopping after this step" in Path(f"{run}.out").read_text()
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None
    assert 2 <= checkpoint[1] < 8
    assert train(f"resume={run}") == 0
    assert [line for line in losses(run) if "train/loss" in line[1]] == [
        line for line in losses(whole) if "train/loss" in line[1]
    ]


def test_killed_after_the_last_step(whole: Path, tmp_path: Path) -> None:
    """While it validated or answered: the figures are those of a run that came to its end."""
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "metrics.json").unlink()
    assert train(f"resume={run}") == 0
    assert_same_run(run, whole)

    def figures(run: Path) -> dict[str, float]:
        metrics = json.loads((run / "metrics.json").read_text())
        return {name: value for name, value in metrics.items() if not name.startswith(("perf/", "time/"))}

    assert figures(run) == figures(whole)
    assert "train/loss" in figures(run)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def change(file: Path) -> None:
    """As a bad disk does: 64 values of the largest tensor are 0."""
    with zipfile.ZipFile(file) as parts:
        largest = max(parts.infolist(), key=lambda part: part.file_size)
    content = bytearray(file.read_bytes())
    middle = largest.header_offset + largest.file_size // 2
    assert any(content[middle : middle + 256])
    content[middle : middle + 256] = bytes(256)
    file.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [cut, change])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    damage: Callable[[Path], None], whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "damaged"
    shutil.copytree(whole, run)
    last = run / "checkpoints" / "last.ckpt"
    damage(last)
    good = (last.with_name("last-1.ckpt")).read_bytes()
    capfd.readouterr()
    assert train(f"resume={run}") == 0
    line = next(line for line in capfd.readouterr().out.splitlines() if "cannot be read" in line)
    assert line.startswith(f"{last} cannot be read (")
    assert line.endswith("it is renamed to damaged-last.ckpt, and the run resumes from step 6")
    assert_same_run(run, whole)
    assert {file.name for file in last.parent.iterdir()} == {"last.ckpt", "last-1.ckpt", "damaged-last.ckpt"}
    assert last.with_name("last-1.ckpt").read_bytes() == good, "no broken one takes the place of a whole one"


def test_without_a_readable_checkpoint_the_remedy_is_told(whole: Path, tmp_path: Path, told: Any) -> None:
    run = tmp_path / "broken"
    shutil.copytree(whole, run)
    for file in (run / "checkpoints").iterdir():
        file.write_bytes(b"")
    assert train(f"resume={run}") == 2
    assert "no checkpoint in" in (error := told())
    assert f"ckpt={run}" in error


@pytest.mark.slow
def test_a_run_that_had_saved_nothing_begins_anew(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "early"
    run.mkdir()
    shutil.copyfile(whole / "config.yaml", run / "config.yaml")
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 9.0}\n{"step": 2, "tra')
    assert train(f"resume={run}") == 0
    assert_same_run(run, whole)


def test_what_would_change_the_run_is_refused_by_name(whole: Path, told: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert train(f"resume={whole}", "trainer.max_steps=20", "seed=3", "resume.allow=[seed]", "data.num_workers=0") == 2
    assert (
        "but trainer.max_steps is 8 and would be 20; leave that out, allow it with 'resume.allow=[trainer.max_steps]'"
        in told()
    )
    assert train(f"resume={whole}", "connector=linear", "debug=overfit") == 2
    assert "resume= cannot change debug=fast to overfit" in told()
    assert train(f"resume={whole}", "connector=linear") == 2
    line = told()
    assert "connector._target_ is vlm.connectors.mlp.MLP and would be vlm.connectors.linear.Linear" in line
    assert "connector.lr" not in line  # advice that no run keeps
    assert train(f"resume={whole}", "connector.lr=1e-3", "resume.allow=[connector]") == 2
    assert "connector.lr only sets the default of a new run; give stage.lr.connector= instead" in told()
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


@pytest.mark.slow
def test_what_is_allowed_may_change(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command again, as a queue repeats it, but for two more steps, no workers, and a path from elsewhere."""
    run = tmp_path / "a longer, second=run"
    shutil.copytree(whole, run)
    monkeypatch.chdir(tmp_path)
    longer = [option for option in OPTIONS if not option.startswith("trainer.max_steps")]
    change = ["trainer.max_steps=10", "data.num_workers=0", "resume.allow=[trainer]", f"run_dir={whole}"]
    assert train(f"resume={run.name}", *longer, *change) == 0
    assert losses(run)[:10] == losses(whole), "what was done is done"
    assert [step for step, _ in losses(run)[10:]] == [9, 9, 10], "a validation after every third step"
    settings, _ = config.read_config(run)
    assert (settings["trainer"]["max_steps"], settings["data"]["num_workers"]) == (10, 0)
    assert settings["run_dir"] == str(run)


def test_other_workers_change_nothing(whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "checkpoints" / "last.ckpt").write_bytes(b"")
    assert train(f"resume={run}", "data.num_workers=0") == 0
    assert_same_run(run, whole)
    assert config.read_config(run)[0]["data"]["num_workers"] == 0


@pytest.mark.slow
def test_a_run_goes_on_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its relative paths are from where it was started; the logger knows it by the same id."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    lines = []
    for number in range(6):
        Image.new("RGB", (40, 30), (40 * number, 99, 200)).save(f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "caption": f"color number {number}"}) + "\n")
    Path("captions.jsonl").write_text("".join(lines))
    data = ["data=captions", "data.annotations=captions.jsonl", "data.images=.", "data.val_fraction=0.4"]
    assert train(*QUICK, *data, "logger=wandb", "run_dir=run") == 0
    before, _ = config.read_config(Path("run"))
    assert re.fullmatch("[0-9a-f]{8}", before["logger"]["wandb"]["id"])
    monkeypatch.chdir(tmp_path)
    longer = ["trainer.max_steps=3", "resume.allow=[trainer.max_steps]", "data.batch_size=2"]
    assert train("resume=here/run", *longer) == 0
    assert Path.cwd() == tmp_path / "here"
    after, _ = config.read_config(Path("run"))
    assert after["logger"] == before["logger"]
    assert losses(Path("run"))[-1][0] == 3


def test_what_cannot_be_resumed(whole: Path, tmp_path: Path, told: Any) -> None:
    assert train(f"resume={tmp_path}") == 2
    assert "it has no config.yaml" in told()
    file = whole / "checkpoints" / "last.ckpt"
    assert train(f"resume={file}") == 2
    assert told() == f"Error: resume={file} is a part of a run directory; give the whole directory, resume={whole}"
    run = tmp_path / "overfit"
    assert train(*QUICK, "debug=overfit", "trainer.max_steps=2", f"run_dir={run}") == 0
    assert train(f"resume={run}") == 2
    assert "cannot continue a run that repeats a few batches (debug=overfit); start it again" in told()


@pytest.mark.slow
def test_shards_go_on_and_other_data_is_refused(tmp_path: Path, told: Any) -> None:
    """Packed by two workers from tar files; then one of them is gone."""
    for number in range(3):
        caption_shard(tmp_path / f"{number}.tar", *range(8 * number, 8 * number + 8))
    run, again = tmp_path / "whole", tmp_path / "again"
    data = ["data=webdataset", f"data.shards='{tmp_path}/*.tar'", "data.val_fraction=0.2", "data.packing=true"]
    often = [
        "data.num_workers=2",
        "trainer.max_steps=6",
        "trainer.val_check_interval=6",
        "callbacks.save.every_n_steps=2",
    ]
    assert train(*QUICK, *data, *often, "logger=csv", f"run_dir={run}") == 0
    shutil.copytree(run, again)
    (again / "checkpoints" / "last.ckpt").write_bytes(b"")
    assert train(f"resume={again}", "resume.allow=[data]") == 0
    assert_same_run(again, run)
    assert (again / "csv" / "metrics.csv").read_bytes() == (run / "csv" / "metrics.csv").read_bytes()
    assert "train/loss" in (again / "csv" / "from_step_4" / "metrics.csv").read_text()
    (tmp_path / "1.tar").unlink()
    assert train(f"resume={again}", "trainer.max_steps=8", "resume.allow=[trainer.max_steps]") == 2
    assert "the rows of the train split differ from those that this run was trained on (f" in (error := told())
    assert "restore them, or use 'resume.allow=[data]' or a new run with ckpt=" in error


def test_the_best_artifact_is_that_of_the_lowest_loss(whole: Path) -> None:
    seen = {step: values["val/loss"] for step, values in losses(whole) if "val/loss" in values}
    seen[8] = json.loads((whole / "metrics.json").read_text())["val/loss"]
    assert best_of(whole) == min(seen, key=lambda step: seen[step])


@pytest.mark.slow
def test_a_run_starts_from_the_best_artifact(whole: Path, tmp_path: Path) -> None:
    assert train(*OPTIONS, f"ckpt={whole / 'best'}", f"run_dir={tmp_path / 'next'}", "trainer.max_steps=1") == 0


def best_of(run: Path) -> int:
    with safe_open(run / "best" / "artifact" / "weights.safetensors", framework="pt") as file:
        return int(file.metadata()["step"])


@pytest.mark.slow
def test_the_last_validation_may_be_the_best(tmp_path: Path) -> None:
    """Where none comes before the end."""
    run = tmp_path / "run"
    none = ["trainer.max_steps=3", "trainer.val_check_interval=100", "callbacks.save.best=val/loss"]
    assert train(*QUICK, *none, f"run_dir={run}") == 0
    assert best_of(run) == 3


@pytest.mark.slow
def test_a_mixture_in_batches_of_tokens_goes_on(tmp_path: Path) -> None:
    """With a moving average and the best by visual gain; from the second checkpoint, as the newest is lost."""
    run, again = tmp_path / "whole", tmp_path / "again"
    mixed = [f"data.sources.{name}.num_train=20" for name in ("captions", "questions")]
    tokens = ["data.batching=tokens", "data.batch_tokens=700", "data.max_length=600", "data.num_val_samples=8"]
    often = ["trainer.max_steps=6", "trainer.val_check_interval=2", "callbacks.save.every_n_steps=2"]
    best = ["stage.ema_decay=0.9", "callbacks.save.best=val/visual_gain"]
    assert train(*QUICK, "data=mixture", *mixed, *tokens, *often, *best, "data.num_workers=1", f"run_dir={run}") == 0
    gains = {step: values["val/visual_gain"] for step, values in losses(run) if "val/visual_gain" in values}
    assert best_of(run) == max(gains, key=lambda step: gains[step])
    assert any("train/loss/questions" in values for _, values in losses(run))
    shutil.copytree(run, again)
    (again / "checkpoints" / "last.ckpt").write_bytes(b"")
    assert train(f"resume={again}") == 0
    assert_same_run(again, run)
    assert best_of(again) == best_of(run)


@pytest.fixture(scope="module")
def other(whole: Path) -> Path:
    """A run of another seed, with the same names and shapes."""
    run = whole.with_name("other")
    assert train(*QUICK, "stage=instruct", "seed=5", f"run_dir={run}") == 0
    return run


def test_a_checkpoint_of_another_run_is_refused_by_name(whole: Path, other: Path, tmp_path: Path, told: Any) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.copyfile(other / "checkpoints" / "last.ckpt", run / "checkpoints" / "last.ckpt")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
    assert train(f"resume={run}") == 2
    error = told()
    assert f"{run / 'checkpoints' / 'last.ckpt'} is of another run: its id is " in error
    assert "its seed is 5, here it is 0; put the run's own checkpoint there, or start a new run with ckpt=" in error
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"} == before


def test_an_artifact_of_another_run_is_refused_by_name(whole: Path, other: Path, tmp_path: Path, told: Any) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.copyfile(other / "artifact" / "weights.safetensors", run / "artifact" / "weights.safetensors")
    for program in (lambda: train(f"resume={run}"), lambda: evaluate(f"ckpt={run}", "trainer=cpu", "num_samples=2")):
        assert program() == 2
        assert "has the weights of another run: weights.safetensors is of run '" in told()
    shutil.copyfile(other / "artifact" / "manifest.json", run / "artifact" / "manifest.json")
    for program in (lambda: train(f"resume={run}"), lambda: evaluate(f"ckpt={run}", "trainer=cpu", "num_samples=2")):
        assert program() == 2
        assert "has the artifact of another run: manifest.json is of run '" in told()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["manifest", "nan"])
def test_a_damaged_artifact_beside_whole_checkpoints(
    damage: str, whole: Path, tmp_path: Path, told: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """The run resumes from the checkpoint before the last, and ends as it would have."""
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "checkpoints" / "last.ckpt").write_bytes(b"")
    manifest, stored = run / "artifact" / "manifest.json", run / "artifact" / "weights.safetensors"
    if damage == "manifest":
        manifest.write_text(manifest.read_text()[:500])
    else:
        tensors = load_file(stored)
        next(iter(tensors.values())).view(-1)[3] = float("nan")
        save_file(tensors, stored, metadata={"step": "8"})
    assert evaluate(f"ckpt={run}", "trainer=cpu", "num_samples=2") == 2
    said = {
        "manifest": "is not a manifest",
        "nan": f"1 of the {next(iter(weights(whole).values())).numel():,} values of {min(weights(whole))} are NaN",
    }[damage]
    assert said in told()
    assert train(f"resume={run}") == 0
    assert "; the run resumes from its checkpoint" in capfd.readouterr().out
    assert_same_run(run, whole)


def test_a_checkpoint_with_nan_gives_way_to_the_one_before(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    last = run / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    name = next(iter(content["state_dict"]))
    content["state_dict"][name].view(-1)[0] = float("inf")
    torch.save(content, last)
    checkpoint = newest_checkpoint(run)
    assert checkpoint == (last.with_name("last-1.ckpt"), 6)
    assert f"values of {name} are NaN or infinite); it is renamed to damaged-last.ckpt" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("edit", ["edited", "shuffled"])
def test_other_rows_are_refused_by_the_splits_name(edit: str, tmp_path: Path, told: Any) -> None:
    """As many rows as before, in resume= and eval.py; what the user allows, or names again, is taken."""
    file, run = tmp_path / "captions.jsonl", tmp_path / "run"
    for number in range(12):
        Image.new("RGB", (40, 30), (20 * number, 99, 200)).save(tmp_path / f"{number}.png")
    lines = [json.dumps({"image": f"{number}.png", "caption": f"color number {number}"}) for number in range(12)]
    file.write_text("\n".join(lines))
    images = f"data.images={tmp_path}"
    assert (
        train(*QUICK, "data=captions", f"data.annotations={file}", images, "data.val_fraction=0.4", f"run_dir={run}")
        == 0
    )
    assert train(f"resume={run}") == 0
    changed = [line.replace("color", "Color") for line in lines] if edit == "edited" else lines[::-1]
    file.write_text("\n".join(changed))
    assert train(f"resume={run}") == 2
    assert "the rows of the train split differ from those that this run was trained on" in told()
    options = [f"ckpt={run}", "trainer=cpu", "num_samples=2", "batch_size=2"]
    assert evaluate(*options) == 2
    assert "the rows of the val split differ from those that this run was trained on" in told()
    assert evaluate(*options, f"data.annotations={file}") == 0
    assert train(f"resume={run}", "resume.allow=[data]") == 0
