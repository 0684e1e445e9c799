"""A run directory that somebody sends is data: whatever it holds, no code runs, and no file outside it changes."""

from __future__ import annotations

import itertools
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

from tests.helpers.parts import WHOLE, loader, make_module, make_trainer
from tests.helpers.programs import QUICK, artifact_program, call, evaluate, train
from vlm import config, files
from vlm.callbacks.save import Save
from vlm.cli.doctor import doctor
from vlm.connectors.mlp import MLP
from vlm.evaluation.answers import write_samples
from vlm.loggers.metrics_file import MetricsFile
from vlm.options import KINDS, bind
from vlm.training import artifact, results, run, trust


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
    trainer = make_trainer(tmp_path, logger=MetricsFile(run_dir=tmp_path))
    with pytest.raises(ValueError, match=r"metrics\.jsonl is a link or a pipe and is not written to; remove it"):
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
        run.lock(tmp_path / "run", resumed=resumed)
    assert victim.read_text() == "mine"


def test_links_within_a_directory_and_to_it_stay(tmp_path: Path) -> None:
    """W&B makes some, and a user's runs may lie on another disk."""
    (tmp_path / "disk" / "wandb" / "run-1").mkdir(parents=True)
    (tmp_path / "disk" / "wandb" / "latest-run").symlink_to("run-1")
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    lock = run.lock(tmp_path / "run", resumed=False)
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

    fusion = "tokens"

    def __init__(self, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature


FUNCTIONS = (
    *(
        "vlm.launch.processes.wait_for",
        "vlm.training.artifact.write_json",
        "vlm.callbacks.save.newest_checkpoint",
        "vlm.training.results.finish",
    ),
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
    with pytest.raises(
        ValueError, match=r"torch\.nn\.Identity cannot be the connector: it has no attribute fusion; name"
    ):
        bind("connector", {"_target_": "torch.nn.Identity"})
    with pytest.raises(ValueError, match=r"vlm\.llms\.base\.LanguageModel is abstract and cannot be created"):
        bind("llm", {"_target_": "vlm.llms.base.LanguageModel"})


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as its author has it, before it is changed and sent."""
    folder = tmp_path_factory.mktemp("sent") / "run"
    lora = "stage.lora.target_modules=[q_proj,v_proj]"
    assert train(*QUICK, "stage=instruct", lora, "callbacks.save.best=val/loss", f"run_dir={folder}") == 0
    return folder


def change(run_dir: Path, key: str, value: Any, *, file: str = "config.yaml") -> None:
    """Write another value into a file of a run."""
    path = run_dir / file
    content = (yaml.safe_load if path.suffix == ".yaml" else json.loads)(path.read_text())
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
    "connector/_target_": ("vlm.training.artifact.write_json", "connector._target_=vlm.training.artifact.write_json"),
    "objective/_target_": ("torch.hub.load", "objective._target_=torch.hub.load"),
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
    "callbacks/y": (
        {"_target_": "vlm.launch.processes.wait_for", "command": ["id"]}, "callbacks.y._target_=vlm.launch.processes"
    ),
    "trainer/strategy": ({"_target_": "torch.save"}, "trainer.strategy._target_=torch.save"),
    "ckpt": ("{home}", "ckpt={home}"),
}  # fmt: skip
ATTACKS = [
    *((program, key, *attack) for program in PROGRAMS for key, attack in OF_MODEL.items()),
    *((program, key, *attack) for program in ("resume", "eval") for key, attack in OF_DATA.items()),
    *(("resume", key, *attack) for key, attack in OF_RUN.items()),
]


@pytest.mark.parametrize(
    ("program", "key", "value", "named"),
    [
        # Each attack on one program, and one attack on each; the rest is slow.
        pytest.param(*a, id=f"{a[0]}-{a[1]}", marks=() if a[0] == "resume" or "_target_" in a[1] else pytest.mark.slow)
        for a in ATTACKS
    ],
)
def test_a_stored_config_reaches_nothing_beyond_this_code(
    program: str, key: str, value: Any, named: str, sent: Path, victim: Path, tmp_path: Path, told: Any
) -> None:
    run_dir = shutil.copytree(sent, tmp_path / "run")
    home = str(victim.parent)
    change(run_dir, key, json.loads(json.dumps(value).replace("{home}", home)))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert PROGRAMS[program](run_dir, tmp_path) == 2
    error = told()
    assert "config.yaml was not written by your programs here, or was changed since" in error
    assert named.replace("{home}", home) in error
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.slow
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
    settings, _ = config.read_config(other, given={"connector._target_": "mypkg.MLP"})
    assert settings["connector"]["_target_"] == "mypkg.MLP"
    (other / "config.yaml").write_text(trust.signed((other / "config.yaml").read_text()))
    assert config.read_config(other)[0] == settings, "the user's own run"


def test_trust_in_a_models_code_is_not_taken_from_a_file(sent: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(sent, tmp_path / "run")
    for part in ("llm", "encoder"):
        change(run_dir, f"{part}/trust_remote_code", True)
    settings, _ = config.read_config(run_dir)
    assert (settings["llm"]["trust_remote_code"], settings["encoder"]["trust_remote_code"]) == (False, False)
    settings, _ = config.read_config(run_dir, given={"llm.trust_remote_code": True})
    assert (settings["llm"]["trust_remote_code"], settings["encoder"]["trust_remote_code"]) == (True, False)


@pytest.mark.slow
def test_a_stored_expression_is_text(sent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", CANARY)
    run_dir = shutil.copytree(sent, tmp_path / "run")
    for key in ("data/system_prompt", "cwd", "stage/name"):
        change(run_dir, key, "${oc.env:SECRET}")
    change(run_dir, "choices/debug", None)
    assert evaluate(f"ckpt={run_dir}", "trainer=cpu", "num_samples=2", "batch_size=2") == 0
    (run_dir / "metrics.json").unlink()
    assert train(f"resume={run_dir}", "evaluators.answers.num_samples=3") == 0
    assert [path for path in run_dir.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()] == []
    assert "system_prompt: ${oc.env:SECRET}" in (run_dir / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"connector": "mlp,linear"}, "the choice connector='mlp,linear', which is not the name of an option"),
        ({"connector": "../../x"}, "the choice connector='../../x', which is not the name of an option"),
        ({"llm": "${oc.env:HOME}"}, "the choice llm='${oc.env:HOME}', which is not the name of an option"),
        ({"connector": "mlp hydra.run.dir=/x"}, "which is not the name of an option"),
        ({"connector": 5}, "the choice connector=5, which is not the name of an option"),
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


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in itertools.pairwise("abcdefghij")
)
BROKEN_CONFIGS = {
    "empty": (b"", "has no content"),
    "a list": (b"- a\n", "has no settings"),
    "binary": (bytes(range(256)), "is not UTF-8 text (invalid start byte)"),
    "zeros": (bytes(100), "is not YAML"),
    "cut": (b"encoder:\n  name: x\nconnector:", "is incomplete: its model is 'missing'"),
    "cut in a line": (b"encoder:\n  name: 'x", "is not YAML in line 2 (found unexpected end of stream)"),
    "nested": (b"[" * 100_000, "is not YAML"),
    "alias bomb": (BOMB.encode(), "(it has an alias (*), which a run's config never has)"),
    "too large": (b"#" * (2**20 + 1), "has 1,048,577 bytes, more than the limit of 1,048,576"),
}


@pytest.mark.parametrize(("content", "said"), BROKEN_CONFIGS.values(), ids=list(BROKEN_CONFIGS))
def test_a_broken_config_is_one_sentence(content: bytes, said: str, sent: Path, tmp_path: Path, told: Any) -> None:
    run_dir = shutil.copytree(sent, tmp_path / "run")
    (run_dir / "config.yaml").write_bytes(content)
    for program in PROGRAMS.values():
        assert program(run_dir, tmp_path) == 2
        error = told()
        assert str(run_dir / "config.yaml") in error
        assert said in error


def test_a_config_that_is_a_pipe(sent: Path, tmp_path: Path, told: Any) -> None:
    run_dir = shutil.copytree(sent, tmp_path / "run")
    (run_dir / "config.yaml").unlink()
    os.mkfifo(run_dir / "config.yaml")
    for program in PROGRAMS.values():
        assert program(run_dir, tmp_path) == 2
        assert "config.yaml is not a regular file; replace it with one" in told()


BROKEN_MANIFESTS: dict[str, tuple[dict[str, Any], str]] = {
    "no stages": ({"stages": None}, "is incomplete: its stages is None"),
    "a stage without a run": ({"stages": [{"name": "a"}]}, "is incomplete: it has no stages[0].run"),
    "tensors": ({"tensors": ["connector.a", 5]}, "is incomplete: its tensors[1] is 5"),
    "bases": ({"bases": {"encoder": {"fingerprint": None}, "llm": {}}}, "its bases.encoder.fingerprint is None"),
    "parts": ({"parts": []}, "is incomplete: its parts is []"),
    "code": ({"code": {}}, "is incomplete: it has no code.packages"),
    "version": ({"format_version": "2"}, "is not a manifest: its format_version is '2'"),
    "version 1": ({"format_version": 1, "parts": None}, "is incomplete (TypeError: "),
}


@pytest.mark.slow
@pytest.mark.parametrize(("fields", "said"), BROKEN_MANIFESTS.values(), ids=list(BROKEN_MANIFESTS))
def test_a_broken_manifest_is_one_sentence(
    fields: dict[str, Any], said: str, sent: Path, tmp_path: Path, told: Any
) -> None:
    run_dir = shutil.copytree(sent, tmp_path / "run")
    for key, value in fields.items():
        change(run_dir, key, value, file="artifact/manifest.json")
    programs = [
        lambda: train(*QUICK, f"ckpt={run_dir}", f"run_dir={tmp_path / 'next'}"),
        lambda: artifact_program("show", run_dir),
        lambda: artifact_program("diff", sent, run_dir),
        *(lambda program=program: PROGRAMS[program](run_dir, tmp_path) for program in ("eval", "merge", "doctor")),
    ]
    for program in programs:
        assert program() == 2
        error = told()
        assert str(run_dir / "artifact" / "manifest.json") in error
        assert said in error


def test_a_pattern_of_a_manifest_is_not_matched(sent: Path, tmp_path: Path, told: Any) -> None:
    """Nor is an adapter made that the weights are not of."""
    run_dir = shutil.copytree(sent, tmp_path / "run")
    change(run_dir, "lora/target_modules", "(([a-z]+)+)+[!]", file="artifact/manifest.json")
    assert PROGRAMS["eval"](run_dir, tmp_path) == 0
    change(run_dir, "lora/r", 10**9, file="artifact/manifest.json")
    for program in ("eval", "merge", "doctor"):
        assert PROGRAMS[program](run_dir, tmp_path) == 2
        assert "has an adapter with r=1000000000, and tensors of rank [16]" in told()


def test_a_metrics_line_without_a_step(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 2}\n\xff\xfe\n{"step": 3}\n{"st')
    run.truncate_metrics(tmp_path, step=2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'
    for line in ("{}", "5", "[]", '{"step": null}', '{"step": "x"}'):
        file.write_text(f'{{"step": 1}}\n{line}\n')
        with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 has no step; remove that line"):
            run.truncate_metrics(tmp_path, step=2)


def test_terminal_escapes_are_shown_and_not_obeyed(
    sent: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;title\x07\x1b[2J\x9b31m\ud800"
    run_dir = shutil.copytree(sent, tmp_path / "run")
    change(run_dir, "code/git", evil, file="artifact/manifest.json")
    assert artifact_program("show", run_dir) == 0
    assert artifact_program("diff", sent, run_dir) == 0
    change(run_dir, "quantization", evil, file="artifact/manifest.json")
    assert PROGRAMS["eval"](run_dir, tmp_path) == 2
    results.print_samples([{"id": evil, "prompt": evil, "prediction": evil, "reference": evil, "score": 1.0}])
    results.print_metrics({evil: 1.0})
    seen = "".join(capfd.readouterr())
    assert not {"\x1b", "\x07", "\x9b", "\ud800"} & set(seen)
    assert seen.count("\\x1b]0;title\\x07\\x1b[2J") >= 5
