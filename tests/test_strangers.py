"""A run directory that somebody sends is data: whatever it holds, no code runs, and no file outside it changes."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from PIL import Image
from torch import nn

from tests.parts import make_module, make_trainer
from tests.test_artifact_cli import call as artifact_program
from tests.test_cli import QUICK, call, evaluate, told, train
from tests.test_module import WHOLE, loader
from vlm import artifact, build, files, run, trust
from vlm.callbacks.metrics_file import MetricsFile
from vlm.callbacks.save import Save
from vlm.cli.doctor import doctor
from vlm.connectors.mlp import MLP
from vlm.evaluation.runner import write_samples
from vlm.options import KINDS, bind

__all__ = ["told"]  # a fixture


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


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as its author has it, before it is changed and sent."""
    folder = tmp_path_factory.mktemp("sent") / "run"
    lora = "stage.lora.target_modules=[q_proj,v_proj]"
    assert train(*QUICK, "stage=instruct", lora, "checkpoint.best=val/loss", f"run_dir={folder}") == 0
    return folder


def change(run_dir: Path, key: str, value: Any, *, file: str = "config.yaml") -> None:
    """Write another value into a file of a run."""
    path = run_dir / file
    content = yaml.safe_load(path.read_text())
    *groups, last = key.split("/")
    inner = content
    for group in groups:
        inner = inner[int(group) if isinstance(inner, list) else group]
    inner[last] = value
    path.write_text(yaml.safe_dump(content) if path.suffix == ".yaml" else json.dumps(content))


PROGRAMS: dict[str, Any] = {
    "resume": lambda run, out: train(f"resume={run}"),
    "eval": lambda run, out: evaluate(f"ckpt={run}", "trainer=cpu", "num_samples=2", "batch_size=2"),
    "merge": lambda run, out: artifact_program("merge", run, out / "merged"),
    "doctor": lambda run, out: call(
        doctor, "doctor", *QUICK, "data.num_train=4", "data.num_val=4", f"ckpt={run}", "doctor.score=true",
        "doctor.languages=false", f"doctor.out={out / 'report'}", "run_dir=x",
    ),
}  # fmt: skip
CANARY = "the user's secret"
OF_MODEL = {
    "connector/_target_": ("vlm.artifact.write_json", "connector._target_=vlm.artifact.write_json"),
    "stage/objective/_target_": ("torch.hub.load", "stage.objective._target_=torch.hub.load"),
    "model/_target_": ("mypkg.Model", "model._target_=mypkg.Model"),
    "llm/pretrained": ("{home}", "llm.pretrained={home}"),
    "encoder/name": ("local-dir:{home}", "encoder.name=local-dir:{home}"),
    "llm/package": ("antigravity", "llm.package=antigravity"),
    "llm/attention": ("stranger/kernel", "llm.attention=stranger/kernel"),
    "stage/lora/target_modules": ("(q+)+_proj$", "stage.lora.target_modules=(q+)+_proj$"),
}
OF_DATA = {
    "data": (
        {"_target_": "vlm.data.sources.instruct.Instruct", "annotations": "{home}/a.json", "images": None},
        "data.annotations={home}/a.json",
    ),
    "data/filter": ("../notes.txt", "data.filter=../notes.txt"),
    "data/replay_annotations": ("{home}/notes.txt", "data.replay_annotations={home}/notes.txt"),
}
OF_RUN = {
    "logger": ({"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "{home}"}, "logger.csv.save_dir={home}"),
    "callbacks/x": (
        {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "dirpath": "home"}, "callbacks.x.dirpath=home"
    ),
    "callbacks/y": ({"_target_": "vlm.cli.launch.wait_for", "command": ["id"]}, "callbacks.y._target_=vlm.cli.launch"),
    "trainer/strategy": ({"_target_": "torch.save"}, "trainer.strategy._target_=torch.save"),
    "ckpt": ("{home}", "ckpt={home}"),
}  # fmt: skip
ATTACKS = [
    *((program, key, *attack) for program in PROGRAMS for key, attack in OF_MODEL.items()),
    *((program, key, *attack) for program in ("resume", "eval") for key, attack in OF_DATA.items()),
    *(("resume", key, *attack) for key, attack in OF_RUN.items()),
]


@pytest.mark.parametrize(("program", "key", "value", "named"), ATTACKS, ids=[f"{a[0]}-{a[1]}" for a in ATTACKS])
def test_a_stored_config_reaches_nothing_beyond_this_code(
    program: str, key: str, value: Any, named: str, sent: Path, victim: Path, tmp_path: Path, told: Any
) -> None:
    run_dir = shutil.copytree(sent, tmp_path / "run")
    home = str(victim.parent)
    change(run_dir, key, json.loads(json.dumps(value).replace("{home}", home)))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert PROGRAMS[program](run_dir, tmp_path) == 2
    error = told()
    assert "config.yaml was not written by your own programs here, or was changed since" in error
    assert named.replace("{home}", home) in error
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_the_user_says_again_counts(
    sent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Any
) -> None:
    """A path and a package of one's own; an unchanged copy needs no word."""
    file = tmp_path / "captions.jsonl"
    for number in range(12):
        Image.new("RGB", (40, 30), (20 * number, 99, 200)).save(tmp_path / f"{number}.png")
    rows = [{"image": f"{number}.png", "caption": f"color number {number}"} for number in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own, copy = tmp_path / "own", tmp_path / "elsewhere" / "copy"
    again = [f"data.annotations={file}", f"data.images={tmp_path}"]
    data = ["data=captions", *again, "data.val_fraction=0.4"]
    options = ["trainer=cpu", "num_samples=4", "batch_size=2"]
    assert train(*QUICK, *data, f"run_dir={own}") == 0
    shutil.copytree(own, copy)
    assert evaluate(f"ckpt={copy}", *options) == 0
    change(copy, "seed", 1)
    assert evaluate(f"ckpt={copy}", *options, f"out={tmp_path / 'out'}") == 2
    assert f"({' '.join(again)})" in told()
    assert evaluate(f"ckpt={copy}", *options, *again, f"out={tmp_path / 'out'}") == 0
    assert train(f"resume={copy}", "resume.allow=[seed]") == 2
    assert f"({' '.join(again)})" in told()
    assert train(f"resume={copy}", *again) == 0

    monkeypatch.setitem(sys.modules, "mypkg", SimpleNamespace(MLP=MLP))  # type: ignore[arg-type]
    other = shutil.copytree(sent, tmp_path / "other")
    change(other, "connector/_target_", "mypkg.MLP")
    settings, _ = build.read_config(other, given={"connector._target_": "mypkg.MLP"})
    assert settings["connector"]["_target_"] == "mypkg.MLP"
    (other / "config.yaml").write_text(trust.signed((other / "config.yaml").read_text()))
    assert build.read_config(other)[0] == settings, "the user's own run"


def test_trust_in_a_models_code_is_not_taken_from_a_file(sent: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(sent, tmp_path / "run")
    for part in ("llm", "encoder"):
        change(run_dir, f"{part}/trust_remote_code", True)
    settings, _ = build.read_config(run_dir)
    assert (settings["llm"]["trust_remote_code"], settings["encoder"]["trust_remote_code"]) == (False, False)
    settings, _ = build.read_config(run_dir, given={"llm.trust_remote_code": True})
    assert (settings["llm"]["trust_remote_code"], settings["encoder"]["trust_remote_code"]) == (True, False)


def test_a_stored_expression_is_text(sent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", CANARY)
    run_dir = shutil.copytree(sent, tmp_path / "run")
    for key in ("data/system_prompt", "cwd", "stage/name"):
        change(run_dir, key, "${oc.env:SECRET}")
    change(run_dir, "choices/debug", None)
    assert evaluate(f"ckpt={run_dir}", "trainer=cpu", "num_samples=2", "batch_size=2") == 0
    (run_dir / "metrics.json").unlink()
    assert train(f"resume={run_dir}", "answers.num_samples=3") == 0
    assert [path for path in run_dir.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()] == []
    assert "system_prompt: ${oc.env:SECRET}" in (run_dir / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"connector": "mlp,linear"}, "the choice connector='mlp,linear', which names no option"),
        ({"connector": "../../x"}, "the choice connector='../../x', which names no option"),
        ({"llm": "${oc.env:HOME}"}, "the choice llm='${oc.env:HOME}', which names no option"),
        ({"connector": "mlp hydra.run.dir=/x"}, "which names no option"),
        ({"connector": 5}, "the choice connector=5, which names no option"),
    ],
)
def test_a_stored_choice_is_an_options_name(
    choices: dict[str, Any], said: str, sent: Path, tmp_path: Path, told: Any
) -> None:
    run_dir = shutil.copytree(sent, tmp_path / "run")
    change(run_dir, "choices", choices)
    assert train(f"resume={run_dir}") == 2
    assert said in told()


def test_a_stored_choice_is_none_of_hydra(sent: Path) -> None:
    content, own = trust.stored_config(sent)
    assert own
    honest = trust.group_choices(content)
    assert honest["connector"] == "mlp"
    evil = ("hydra", "hydra/callbacks", "hydra.searchpath", "+hydra.callbacks.a", "~a", "connector@hydra.callbacks")
    found = trust.group_choices({"choices": {**content["choices"], **dict.fromkeys(evil, "mlp")}})
    assert found == honest
