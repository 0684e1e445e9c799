"""The command line: what a run leaves behind, what follows from it, and what a user reads who slips."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from tests.helpers.programs import FILES, METRICS, QUICK, ROOT, TINY, evaluate, files, of_answers, read, train
from vlm import build
from vlm.training.run import log_config


@pytest.fixture(scope="session")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run of the first stage by the command of the README, in a folder with a space."""
    run = tmp_path_factory.mktemp("a run") / "first one"
    command = [sys.executable, "train.py", "llm=tiny", "encoder=tiny", "debug=fast", f"run_dir={run}"]
    return run, subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_run_says_what_it_does_before_it_does_it(aligned: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, ended = aligned
    lines = (
        "Data: 1,000,000 training samples, 256 validation samples, of which a validation reads 4\n",
        "CPU: ",
        "Training: 4 steps of 2 samples (under 0.01 epochs), validation every 2 steps and at the end; the loss is "
        "printed every step\n",
        "step 1/4  loss ",
        "step 4/4  loss ",
        "validation at step 4: val/loss ",
        "Training ended after step 4; evaluating: answers\n",
        "Status: finished (all steps and metrics are done)\n",
    )
    places = [ended.stdout.index(line) for line in lines]
    assert places == sorted(places)


def test_a_run_leaves_what_the_design_says(aligned) -> None:
    run, done = aligned
    assert done.returncode == 0, done.stderr
    assert files(run) == FILES
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics.keys() == METRICS
    assert metrics["val/visual_gain"] == pytest.approx(metrics["val/loss_shuffled"] - metrics["val/loss"], abs=1e-6)
    assert metrics["params/total"] > metrics["params/trainable"] > 0
    assert metrics["status"] == "finished"
    assert metrics["val/lm_loss"] == metrics["val/loss"], "the only loss of the objective"
    for words in ("Trainable parameters", "Preflight", "val/visual_gain", "4 of 4 answers to validation samples"):
        assert words in done.stdout
    assert "val/loss and val/visual_gain hold val/lm_loss" in done.stdout
    assert str(run) in done.stdout.splitlines()[-1]


def test_metrics_are_logged_from_step_1(aligned) -> None:
    lines = read(aligned[0] / "metrics.jsonl")
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "val/loss" in line] == [2, 4]
    final = json.loads((aligned[0] / "metrics.json").read_text())
    last = [line for line in lines if "val/loss" in line][-1]
    assert {name: final[name] for name in last if name != "step"} == {k: v for k, v in last.items() if k != "step"}


def test_samples_and_manifest_say_what_they_are_of(aligned) -> None:
    run, _ = aligned
    samples = read(run / "samples.jsonl")
    assert [sample["id"] for sample in samples] == [f"shapes/0/val/{i}" for i in (0, 64, 128, 192)]
    names = ["id", "type", "prompt", "prediction", "reference", "score", "correct"]
    assert [list(sample) for sample in samples] == [names] * 4
    manifest = json.loads((run / "artifact" / "manifest.json").read_text())
    assert manifest["stages"][0]["name"] == "align"
    assert manifest["tensors"]
    assert all(name.startswith("connector.") for name in manifest["tensors"])
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4


@pytest.fixture(scope="session")
def instructed(aligned, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second stage from the first, LoRA on the LLM."""
    run = tmp_path_factory.mktemp("runs") / "second"
    arguments = [*TINY, "stage=instruct", f"ckpt={aligned[0]}", f"run_dir={run}", "trainer.max_steps=2"]
    assert train(*arguments, "evaluators.answers.num_samples=2", "data.num_val_samples=2") == 0
    return run


def test_the_next_stage_starts_from_a_run(aligned, instructed: Path) -> None:
    manifest = json.loads((instructed / "artifact" / "manifest.json").read_text())
    assert [stage["name"] for stage in manifest["stages"]] == ["align", "instruct"]
    assert manifest["lora"]["r"] == 16
    assert {name.split(".")[0] for name in manifest["tensors"]} == {"connector", "llm"}
    assert all("lora_" in name for name in manifest["tensors"] if name.startswith("llm."))
    assert {name for name in files(instructed) if not name.startswith("eval/")} == FILES  # another test evaluates it
    assert [record["type"] for record in read(instructed / "samples.jsonl")] == ["count", "comparison"]


@pytest.mark.slow
def test_a_third_stage_tunes_the_encoder_and_saves_the_average(instructed: Path, tmp_path: Path) -> None:
    """Its artifact holds what each stage has trained; what is evaluated from it is what the run has validated."""
    run = tmp_path / "third"
    options = ["stage=vision_tune", "stage.encoder.last_n=1", "stage.lr.encoder=0.01", "stage.ema_decay=0.5"]
    few = ["trainer.max_steps=2", "evaluators.answers.num_samples=2", "data.num_val_samples=2"]
    assert train(*TINY, *options, *few, f"ckpt={instructed}", f"run_dir={run}") == 0
    earlier, now = (load_file(folder / "artifact" / "weights.safetensors") for folder in (instructed, run))
    last_block = {
        f"encoder.model.blocks.1.{layer}.{kind}"
        for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    }
    assert now.keys() == earlier.keys() | last_block
    changed = {name for name in earlier if not torch.equal(now[name], earlier[name])}
    assert {name.split(".")[0] for name in changed} == {"connector"}
    manifest = json.loads((run / "artifact" / "manifest.json").read_text())
    assert [stage["name"] for stage in manifest["stages"]] == ["align", "instruct", "vision_tune"]
    assert set(manifest["tensors"]) == now.keys()
    assert manifest["lora"]["r"] == 16

    trained = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert trained.keys() == {f"model.{name}" for name in now if "lora_" not in name}
    assert not torch.equal(
        trained["model.encoder.model.blocks.1.mlp.fc1.weight"], now["encoder.model.blocks.1.mlp.fc1.weight"]
    )
    assert evaluate(f"ckpt={run}", "trainer=cpu", "num_samples=2", "batch_size=2", "max_new_tokens=2") == 0
    ours = json.loads((run / "eval" / "results.json").read_text())["metrics"]
    theirs = json.loads((run / "metrics.json").read_text())
    assert {name: ours[name] for name in ("val/loss", "val/loss_blank")} == pytest.approx(
        {name: theirs[name] for name in ("val/loss", "val/loss_blank")}, rel=1e-3
    )


def test_evaluation_of_a_run(instructed: Path) -> None:
    assert evaluate(f"ckpt={instructed}", "trainer=cpu", "num_samples=6", "batch_size=3", "max_new_tokens=2") == 0
    results = json.loads((instructed / "eval" / "results.json").read_text())
    records = read(instructed / "eval" / "samples.jsonl")
    types = {record["type"] for record in records}
    assert len(types) > 1
    of_validation = {name for name in METRICS if name.startswith("val/")} - of_answers("caption")
    assert results["metrics"].keys() == of_validation | of_answers(*types)
    assert results["num_samples"] == len(records) == 6


def test_evaluation_repeats_the_figures_of_the_run(aligned) -> None:
    run, _ = aligned
    assert evaluate(f"ckpt={run}", "num_samples=4", "batch_size=2", "max_new_tokens=2") == 0
    ours = json.loads((run / "eval" / "results.json").read_text())["metrics"]
    theirs = json.loads((run / "metrics.json").read_text())
    for name in ("val/loss", "val/loss_shuffled", "val/loss_blank"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("out=/dev/null", "out=/dev/null cannot be made because /dev/null is not a folder; give out=<folder>"),
        ("data.foo=1", "there is no option data.foo; choose one of image_size"),
        ("data.batch_size=0", "data.batch_size=0 must be a whole number from 1 to 65,536"),
        ("trainer.num_nodes=5", "trainer.num_nodes=5 needs the command on 5 machines, and it was started on 1"),
    ],
)
def test_an_evaluation_is_refused_before_anything_loads(
    aligned, typed: str, said: str, told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm.build.build_model", None)
    assert evaluate(f"ckpt={aligned[0]}", "trainer=cpu", typed) == 2
    assert said in told()


def test_a_directory_holds_one_run(aligned, told) -> None:
    before = {path: path.stat().st_mtime_ns for path in aligned[0].rglob("*")}
    assert train(*QUICK, f"run_dir={aligned[0]}") == 2
    assert "already holds a run; choose another directory" in told()
    assert {path: path.stat().st_mtime_ns for path in aligned[0].rglob("*")} == before


@pytest.mark.parametrize("program", [train, evaluate])
def test_a_checkpoint_that_is_no_run(tmp_path: Path, program, told) -> None:
    options = [*QUICK, f"run_dir={tmp_path / 'new'}"] if program is train else ["trainer=cpu"]
    assert program(*options, f"ckpt={tmp_path / 'none'}") == 2
    assert f"ckpt={tmp_path / 'none'} is not a run directory" in told()


def test_evaluation_needs_a_run(told) -> None:
    assert evaluate() == 2
    assert told() == "Error: ckpt must be given; set ckpt=<value>"


@pytest.mark.parametrize(
    ("change", "field", "values"),
    [
        ("llm.config.hidden_size=32", "bases.llm.config.hidden_size = 64, here it is 32", []),
        ("+llm.config.rms_norm_eps=1e-3", "bases.llm.config.rms_norm_eps = 1e-06, here it is 0.001", []),
        ("encoder.model_args.depth=1", "bases.encoder.config.model_args.depth = 2, here it is 1", []),
        ("encoder.image_size=32", "parts.encoder.image_size = [64, 64], here it is [32, 32]", []),
        ("connector=linear", "parts.connector", ["vlm.connectors.linear.Linear", "vlm.connectors.mlp.MLP"]),
    ],
)
def test_a_checkpoint_of_other_parts(aligned, tmp_path: Path, change: str, field: str, values: list, told) -> None:
    assert train(*TINY, change, f"ckpt={aligned[0]}", f"run_dir={tmp_path / 'new'}") == 2
    line = told()
    assert field in line
    assert all(value in line for value in values)


def test_a_slip_is_one_line(tmp_path: Path, told) -> None:
    assert train(*QUICK, f"run_dir={tmp_path / 'new'}", "connector=foo") == 2
    assert "choose one of average_pool, " in told()
    assert not (tmp_path / "new").exists()


def test_a_slip_leaves_no_file(tmp_path: Path, told) -> None:
    assert train(*QUICK, f"run_dir={tmp_path / 'new'}", "data.batch_size=abc") == 2
    assert "data.batch_size='abc'" in told()
    assert files(tmp_path) == set()


@pytest.fixture
def captions(tmp_path: Path) -> list[str]:
    """Twenty captions, one of them of a truncated picture."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for index in range(20):
        Image.new("RGB", (40, 30), (12 * index, 99, 200)).save(folder / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.png", "caption": f"color number {index}"}) + "\n")
    whole = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train.jsonl").write_text("".join(lines))
    (tmp_path / "val.jsonl").write_text("".join(lines[4:10]))
    names = ("annotations=train.jsonl", "val_annotations=val.jsonl", "images=pictures")
    options = [f"data.{key}={tmp_path / value}" for key, value in (name.split("=") for name in names)]
    return [*QUICK, "data=captions", *options, "trainer.max_steps=10", "trainer.val_check_interval=10"]


def test_a_bad_sample_is_named_and_the_run_goes_on(
    captions: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(*captions, f"run_dir={run}", "data.max_bad_ratio=0.06", "logger=csv") == 0
    (line,) = read(run / "bad_samples.jsonl")
    assert line["index"] == 3
    assert "3.png" in line["error"]
    assert files(run) - FILES == {"bad_samples.jsonl", "csv/metrics.csv", "csv/hparams.yaml"}
    shared = "6 of 6 validation images are also in the training split, the first one '4.png', in train '4.png'"
    assert shared in capfd.readouterr().out


@pytest.mark.slow
def test_a_bad_held_out_sample_is_not_asked_about(captions: list[str], tmp_path: Path) -> None:
    """Not at the end of a run, and not by an evaluation."""
    run, lines = tmp_path / "run", (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[10:]))
    (tmp_path / "val.jsonl").write_text("".join(lines[:4]))
    four = ["data.num_val_samples=4", "evaluators.answers.num_samples=4", "data.max_bad_ratio=0.3"]
    assert train(*captions, *four, f"run_dir={run}") == 0
    (line,) = read(run / "bad_samples.jsonl")
    assert (line["split"], line["index"]) == ("val", 3)
    assert evaluate(f"ckpt={run}", "trainer=cpu", "num_samples=4", "batch_size=2", "max_new_tokens=2") == 0
    for file in (run / "samples.jsonl", run / "eval" / "samples.jsonl"):
        assert [record["reference"] for record in read(file)] == [f"color number {index}" for index in range(3)]


def test_missing_data_is_reported_before_the_model_loads(
    captions: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Any
) -> None:
    run = tmp_path / "run"
    assert train(*captions, f"run_dir={run}", "data.max_bad_ratio=0.06") == 0
    (tmp_path / "val.jsonl").unlink()
    monkeypatch.setattr(build, "build_model", lambda _: pytest.fail("a model was loaded"))
    said = f"Error: there is no file '{tmp_path}/val.jsonl'; set data.val_annotations= to the annotation file"
    assert train(*captions, f"run_dir={tmp_path / 'second'}") == 2
    assert told() == said
    assert evaluate(f"ckpt={run}", "trainer=cpu") == 2
    assert told() == said


def test_a_bad_sample_stops_the_run_that_wants_it(captions: list[str], tmp_path: Path, told) -> None:
    assert train(*captions, f"run_dir={tmp_path / 'run'}", "data.on_bad_sample=raise") == 2
    line = told()
    assert "3.png" in line
    assert "1 bad sample of 20, 0 allowed" in line


@pytest.mark.slow
def test_a_sweep_has_a_directory_each(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    assert train("-m", "connector=linear,mlp", *QUICK, "logger=csv", f"hydra.sweep.dir={sweep}") == 0
    runs = sorted(path for path in sweep.iterdir() if path.is_dir())
    assert [sorted(set(run.name.split(",")) & {"connector=linear", "connector=mlp"}) for run in runs] == [
        ["connector=linear"],
        ["connector=mlp"],
    ]
    for run in runs:
        assert files(run) == FILES | {"csv/metrics.csv", "csv/hparams.yaml"}
        assert str(run) in (run / "config.yaml").read_text()
    assert evaluate(f"ckpt={runs[1]}", "trainer=cpu", "num_samples=2", "batch_size=2", "max_new_tokens=2") == 0
    assert (runs[1] / "eval" / "results.json").exists()
    assert train(*QUICK, f"ckpt={runs[1]}", f"run_dir={tmp_path / 'lr=1e-3,b=2'}") == 0
    assert files(tmp_path / "lr=1e-3,b=2") == FILES


def test_a_sweep_with_too_long_a_name_is_one_sentence(tmp_path: Path, told: Any) -> None:
    assert train("-m", *QUICK, f"data.system_prompt={'x' * 300},y", f"hydra.sweep.dir={tmp_path}") == 2
    assert "too long a name for a job's folder; add 'hydra.sweep.subdir=${hydra.job.num}'" in told()


@pytest.mark.slow
def test_each_job_of_a_sweep_has_its_own_run_of_wandb(tmp_path: Path) -> None:
    wandb.teardown()  # what an earlier test of this process has set up
    assert (
        train("-m", "seed=0,1", *QUICK, "logger=wandb", "logger.wandb.offline=true", f"hydra.sweep.dir={tmp_path}") == 0
    )
    ids = [str(OmegaConf.load(file).logger.wandb.id) for file in sorted(tmp_path.glob("*/config.yaml"))]
    assert len(set(ids)) == 2
    assert sorted(file.name for file in tmp_path.glob("**/*.wandb")) == sorted(f"run-{id_}.wandb" for id_ in ids)


@pytest.mark.slow
def test_threads_and_workers_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert train(*QUICK, "data.num_workers=1", f"run_dir={tmp_path / 'run'}") == 0
    printed = capfd.readouterr().out
    assert "\nCPU: 2 threads for the model, 1 data worker (data.num_workers)\n" in printed
    assert "\nperf: attention=blocks padding=none\n" in printed


@pytest.mark.slow
def test_an_interrupt_ends_with_the_artifact(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = [*QUICK, "trainer.max_steps=100000", "trainer.val_check_interval=100000", f"run_dir={run}"]
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen([sys.executable, "train.py", *options], cwd=ROOT, stdout=out, stderr=out)
        try:
            until = time.monotonic() + 120
            while not ((run / "metrics.jsonl").exists() and read(run / "metrics.jsonl")):
                assert process.poll() is None, (tmp_path / "out").read_text()
                assert time.monotonic() < until
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            code = process.wait(timeout=60)
        finally:
            process.kill()
    text = (tmp_path / "out").read_text()
    assert code == 130, text
    assert "Traceback" not in text
    assert files(run) == FILES
    assert json.loads((run / "artifact" / "manifest.json").read_text())["tensors"]


def test_a_logger_that_cannot_start_is_one_sentence() -> None:
    class NoAccount:
        def log_hyperparams(self, options: Any) -> None:
            raise RuntimeError("No API key configured.\nUse `wandb login`")

    message = r"the logger mine could not start: No API key configured.; logger.mine.offline=true needs no account"
    with pytest.raises(ValueError, match=message):
        log_config(SimpleNamespace(loggers=[NoAccount()]), {"logger": {"mine": {"offline": False}}})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that the test misses")
def test_a_gpu_that_is_not_there_is_one_sentence() -> None:
    settings = {"trainer": {"_target_": "lightning.pytorch.Trainer", "accelerator": "gpu", "precision": "32-true"}}
    with pytest.raises(ValueError, match=r"No supported gpu backend found! Choose trainer=cpu or auto"):
        build.build_trainer({**settings, "callbacks": {}, "logger": {}}, Path("unused"))


def test_an_add_on_of_lightning_that_refuses_is_one_sentence(tmp_path: Path, told: Any) -> None:
    option = "+callbacks.mine={_target_:lightning.pytorch.callbacks.EarlyStopping,monitor:val/foo}"
    assert train(*QUICK, option, f"run_dir={tmp_path / 'run'}") == 2
    line = told()
    assert line.startswith("Error: Lightning's EarlyStopping refuses its options: ")
    assert "metric `val/foo` which is not" in line
    assert line.endswith("see callbacks.*")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["trainer.strategy=ddp_spawn"], "trainer.strategy=ddp_spawn starts processes without the command line"),
        (
            ["+trainer.profiler=foo"],
            "trainer.profiler='foo' must be one of simple, advanced, pytorch or null",
        ),
        (["+trainer.barebones=true"], "Lightning's Trainer refuses its options: `Trainer(barebones=True, "),
        (["trainer.accelerator=tpu"], "this machine cannot run this trainer: Requirement 'torch_xla"),
    ],
)
def test_the_machine_is_blamed_only_for_its_own(options: list[str], said: str, tmp_path: Path, told: Any) -> None:
    assert train(*QUICK, *options, f"run_dir={tmp_path / 'run'}") == 2
    line = told()
    assert said in line
    assert ("this machine" in line) == ("tpu" in options[0])


@pytest.mark.slow
def test_several_loggers_and_a_run_of_an_earlier_version(tmp_path: Path) -> None:
    """Both are built and go on with a resumed run; the flat form that one logger had is still read."""
    run, old = tmp_path / "run", tmp_path / "old"
    assert train(*QUICK, "logger=[csv,tensorboard]", "logger.csv.name=table", f"run_dir={run}") == 0
    config = OmegaConf.load(run / "config.yaml")
    assert list(config.logger) == ["metrics_file", "csv", "tensorboard"]
    assert config.choices.logger == "[csv,tensorboard]"
    events = list((run / "tensorboard").glob("events*"))
    assert {"table/metrics.csv", "table/hparams.yaml"} < files(run)
    assert events
    shutil.copytree(run, old)

    longer = ["trainer.max_steps=4", "resume.allow=[trainer.max_steps]"]
    assert train(f"resume={run}", *longer, "logger.csv.name=again") == 0
    assert (run / "again" / "from_step_2" / "metrics.csv").exists()
    assert len(list((run / "tensorboard").glob("events*"))) > len(events)

    config.logger, config.choices.logger = config.logger.csv, "csv"
    (old / "config.yaml").write_text(OmegaConf.to_yaml(config).replace(str(run), str(old)))
    assert "logger:\n  _target_: lightning" in (old / "config.yaml").read_text()
    assert train(f"resume={old}", *longer) == 0
    assert (old / "table" / "from_step_2" / "metrics.csv").exists()
    assert list(OmegaConf.load(old / "config.yaml").logger) == ["metrics_file", "csv"]


@pytest.mark.skipif(sys.platform != "linux", reason="no GNU OpenMP")
@pytest.mark.parametrize(
    ("given", "count"), [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")]
)
def test_threads_that_wait_sleep_early(given: dict[str, str], count: str) -> None:
    (library,) = Path(torch.__file__).parent.glob("lib/libgomp*")  # reads its settings when it is loaded
    script = f"import ctypes; from vlm.launch.entry import sleep_early; sleep_early(); ctypes.CDLL({str(library)!r})"
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {**given, "OMP_DISPLAY_ENV": "VERBOSE", "PYTHONPATH": str(ROOT)}
    seen = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert f"GOMP_SPINCOUNT = '{count}'" in seen.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc")
@pytest.mark.parametrize(("given", "kept"), [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "1000000"}, False)])
def test_freed_memory_is_kept(given: dict[str, str], kept: bool) -> None:
    """Freed tensors of 24 MB stay in the process, so that the next ones are not taken from the system anew."""
    script = """
import resource, torch
from vlm.launch.entry import keep_freed_memory
keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
seen = []
for _ in range(10):
    held = [torch.ones(6_000_000) for _ in range(6)]; del held
    seen.append(faults())
print(seen[-1] - seen[4])
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    environment |= {**given, "PYTHONPATH": str(ROOT)}
    seen = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert (int(seen.stdout) < 24_000_000 / 4096) == kept, seen.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text alone", "one picture"])
def test_a_validation_without_two_pictures_is_said_before_the_first_step(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It trains and is evaluated to the end, without a visual gain."""
    Image.new("RGB", (32, 32), (200, 0, 0)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "So."}]
    pictured = [{"from": "human", "value": "<image>\nHow?"}, turns[1]]
    records = [{"id": str(number), "conversations": turns} for number in range(8)]
    if kind == "one picture":
        records = [{"id": str(number), "image": "a.png", "conversations": pictured} for number in range(8)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    words = ["data=instruct", f"data.annotations={tmp_path}/data.json", f"data.images={tmp_path}"]
    words += [f"data.val_annotations={tmp_path}/data.json", "data.num_workers=0"]
    run = tmp_path / "run"
    assert train(*QUICK, *words, f"run_dir={run}") == 0
    said = capfd.readouterr().out
    remark = "There will be no val/visual_gain: no validation batch has two different images"
    assert remark in said
    assert said.index(remark) < said.index("step 1/2")
    metrics = json.loads((run / "metrics.json").read_text())
    assert "val/loss" in metrics
    assert not {"val/visual_gain", "val/loss_shuffled", "val/loss_blank"} & metrics.keys()
    assert metrics.get("val/num_not_compared", 0) == (2 if kind == "one picture" else 0)
    assert evaluate(f"ckpt={run}", "num_samples=2", "batch_size=2", "trainer=cpu") == 0
    assert remark in capfd.readouterr().out
    refused = tmp_path / "refused"
    assert train(*QUICK, *words, f"run_dir={refused}", "callbacks.save.best=val/visual_gain") == 2
    assert "callbacks.save.best=val/visual_gain needs a visual gain, but no validation batch" in capfd.readouterr().err
    assert not (refused / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_stage_may_change_the_template_and_the_resize_if_it_says_so(tmp_path: Path, told: Any) -> None:
    """The change is in the lineage, also after the run has resumed; a stage after it need not say it again."""
    first, second, third = (tmp_path / name for name in ("1", "2", "3"))

    def changes(run_dir: Path) -> list[dict[str, Any]]:
        stages = json.loads((run_dir / "artifact" / "manifest.json").read_text())["stages"]
        return [stage["changes"] for stage in stages]

    plain = ["llm.chat_template=caption", "encoder.resize=crop"]
    assert train(*QUICK, *plain, f"run_dir={first}") == 0
    tiles = ["encoder.tiles.grids=[[1,2],[2,2]]", "encoder.tiles.unpad=true", "data.max_length=2048"]
    changed = ["llm.chat_template=chatml", "encoder.resize=pad", *tiles]
    assert train(*QUICK, changed[1], f"run_dir={second}", f"ckpt={first}") == 2
    assert told() == (
        f"Error: ckpt={first} was trained with llm.chat_template=caption, here it is chatml; set "
        "llm.chat_template=caption, or, if this stage is to change it, give llm.chat_template=chatml on the command "
        "line or in the recipe's stage"
    )
    assert train(*QUICK, *changed, f"run_dir={second}", f"ckpt={first}") == 0
    expected = {
        "llm.chat_template": ["caption", "chatml"],
        "encoder.resize": ["crop", "pad"],
        "encoder.tiles.grids": [[], [[1, 2], [2, 2]]],
        "encoder.tiles.unpad": [False, True],
    }
    assert changes(second) == [{}, expected]
    assert train(f"resume={second}", "trainer.max_steps=3", "resume.allow=[trainer.max_steps]") == 0
    assert changes(second) == [{}, expected]
    assert train(*QUICK, "encoder.resize=pad", *tiles, f"run_dir={third}", f"ckpt={second}") == 0
    assert changes(third) == [{}, expected, {}]
