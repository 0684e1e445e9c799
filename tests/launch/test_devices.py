"""The same number everywhere: eight rows at once, one by one, or on two real processes that hold copies or slices."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from safetensors.torch import load_file

from tests.helpers import ranks
from tests.helpers.parts import make_module
from tests.helpers.programs import QUICK, ROOT, call, evaluate, files, read, train
from vlm.data.batching import EvenBatches
from vlm.launch import processes
from vlm.launch.entry import quiet
from vlm.training import artifact
from vlm.training.sharding import check_strategy

# float32 sums in another order; Adam divides a gradient by its own size, so a parameter may move by more than it
FIGURES, TENSORS = {"rtol": 1e-5, "atol": 1e-6, "equal_nan": True}, {"rtol": 0, "atol": 1e-5}
STRATEGIES = ["ddp", "fsdp"]


@pytest.fixture(scope="module", params=[pytest.param("gloo", marks=pytest.mark.slow)])
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[Any, Any]]]:
    """The folder and the results of two processes."""
    folder = tmp_path_factory.mktemp("two ranks")
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.helpers.ranks", str(folder)]
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **shared, "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        told = [process.communicate(timeout=900)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], told
    return folder, [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process makes of all eight rows at once."""
    folder = tmp_path_factory.mktemp("one")
    made = {make.__name__: ranks.fit(folder, make) for make in (ranks.tokens, ranks.layers)}
    return made | {"losses": ranks.fit(folder, ranks.tokens, objective=ranks.TwoLosses())}


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert len(ours["steps"]) == len(theirs["steps"]) == 4
    for step, expected in zip(ours["steps"], theirs["steps"], strict=True):
        figures = {name for name in expected if not name.endswith("_ratio")}  # of padding, which batches differ in
        assert {"train/loss", "train/grad_norm", "train/tokens", "clipped"} <= figures
        for name in figures:
            torch.testing.assert_close(step[name], expected[name], **FIGURES, msg=name)
    torch.testing.assert_close(ours["tensors"], theirs["tensors"], **TENSORS)


def test_rows_one_by_one_are_a_batch(one: dict[str, Any], tmp_path: Path) -> None:
    """Steps in which half of the rows, or all, are text alone; a clip that bites."""
    steps = one["tokens"]["steps"]
    assert [step["train/tokens"] for step in steps] == [18.0, 16.0, 20.0, 18.0]
    assert all(step["train/grad_norm"] > 0.5 for step in steps)
    assert all(step["clipped"] == pytest.approx(0.5, rel=1e-4) for step in steps), "clipped is what was divided"
    assert_same(ranks.fit(tmp_path, ranks.tokens, accumulate=8), one["tokens"])


@pytest.mark.parametrize("case", ["tokens", "layers", "losses"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_are_one(two: Any, one: dict[str, Any], strategy: str, case: str) -> None:
    """LoRA, half an encoder; cross-attention, recomputed layers, tied embeddings; two losses, one with a parameter."""
    ours = two[1][0][strategy, case]
    assert_same(ours, one[case])
    assert ("objective.scale" in ours["tensors"]) == (case == "losses")
    for name in ("val/loss", "val/loss_shuffled", "val/loss_blank", "val/visual_gain"):
        torch.testing.assert_close(ours["val"][name], one[case]["val"][name], **FIGURES, msg=name)
    assert all(rank[strategy, case]["answers"].tolist() == one[case]["answers"].tolist() for rank in two[1])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rank_without_pictures_to_compare(two: Any, strategy: str, tmp_path: Path) -> None:
    """The gain is that of the other rank's rows, and the loss that of all."""
    alone = ranks.unlike(tmp_path)
    for rank in two[1]:
        ours = rank[strategy, "unlike"]
        assert ours["val/num_not_compared"] == alone["val/num_not_compared"] == 2
        for name in ("val/loss", "val/loss_shuffled", "val/loss_blank", "val/visual_gain"):
            assert ours[name] == pytest.approx(alone[name], rel=1e-5, abs=1e-6)


def test_two_ranks_keep_the_average_of_one(two: Any, one: dict[str, Any], tmp_path: Path) -> None:
    alone = ranks.fit(tmp_path, ranks.tokens, ema_decay=0.9)
    assert_same(two[1][0]["ddp", "average"], alone)
    moved = [(alone["tensors"][name] - tensor).abs().max() for name, tensor in one["tokens"]["tensors"].items()]
    assert max(moved) > 10 * TENSORS["atol"], "an average is not what it is of"


def test_two_ranks_that_accumulate_are_one(two: Any, one: dict[str, Any]) -> None:
    assert_same(two[1][0]["fsdp", "accumulated"], one["tokens"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rank_that_is_not_finite_stops_all(two: Any, strategy: str) -> None:
    folder, results = two
    names = ", ".join(f"sample/{number}" for number in range(8))
    for result in results:
        assert result[strategy, "stopped"].startswith(
            f"lm_loss is nan at step 3, samples {names}; the weights of step 2"
        )
    with artifact.safe_open(
        folder / f"stopped_{strategy}" / "artifact" / "weights.safetensors", framework="pt"
    ) as file:
        assert file.metadata()["step"] == "2"


@pytest.fixture(scope="module")
def alone(two: Any) -> Path:
    """The run of the two ranks by one process, which adds up two batches of two rows."""
    run = two[0] / "alone"
    arguments = ["trainer=cpu", "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=4", f"run_dir={run}"]
    assert train(*ranks.RUN, *arguments) == 0
    return run


def figures(run: Path) -> list[dict[str, float]]:
    odd = ("perf/", "train/padding", "val/visual_rms")  # of the first rank's own batches
    return [{n: v for n, v in line.items() if not n.startswith(odd)} for line in read(run / "metrics.jsonl")]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_is_the_same_on_two_ranks(two: Any, alone: Path, strategy: str) -> None:
    run = two[0] / strategy
    ours, theirs = figures(run), figures(alone)
    assert [line["step"] for line in ours] == [1, 2, 2, 3, 4, 4]
    for line, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(line, expected, **FIGURES)
    left, expected = ({name for name in files(folder) if not name.startswith("eval/")} for folder in (run, alone))
    assert left == expected
    ours, theirs = (load_file(folder / "artifact" / "weights.safetensors") for folder in (run, alone))
    torch.testing.assert_close(ours, theirs, **TENSORS)
    assert read(run / "samples.jsonl") == read(alone / "samples.jsonl")


@pytest.mark.parametrize("run", ["fsdp", "dropout"])
def test_a_run_of_two_ranks_goes_on_bit_for_bit(two: Any, run: str) -> None:
    """One that is sliced, and one in which each rank draws the dropout of a LoRA."""
    folder, _ = two
    assert figures(folder / f"{run} resumed") == figures(folder / run)
    tensors = [load_file(folder / name / "artifact" / "weights.safetensors") for name in (f"{run} resumed", run)]
    torch.testing.assert_close(*tensors, rtol=0, atol=0)


def test_a_sliced_run_is_evaluated_by_one_process(two: Any, alone: Path) -> None:
    found = []
    for run in (two[0] / "fsdp", alone):
        assert evaluate(f"ckpt={run}", "trainer=cpu", "num_samples=4", "batch_size=2", "max_new_tokens=2") == 0
        found.append(json.loads((run / "eval" / "results.json").read_text())["metrics"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_a_sweep_over_ranks_of_their_own(two: Any, tmp_path: Path) -> None:
    """Lightning's own start of a second rank, in both jobs of a sweep."""
    options = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.val_check_interval=4"]
    command = [sys.executable, str(ROOT / "train.py"), "-m", *ranks.RUN, *options, "seed=0,1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    runs = sorted(tmp_path.glob("multirun/*/seed=*"))
    assert [run.name for run in runs] == ["seed=0", "seed=1"]
    assert not (tmp_path / "runs").exists()
    assert done.stdout.count("Trainable parameters") == 2, "one rank talks"
    losses = [
        [line["train/loss"] for line in read(run / "metrics.jsonl") if "train/loss" in line]
        for run in (*runs, two[0] / "ddp")
    ]
    assert list(map(len, losses)) == [4, 4, 4]
    assert losses[0] == losses[2] != losses[1]


def test_ranks_from_outside_must_share_a_directory(monkeypatch: pytest.MonkeyPatch, told: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train(*QUICK) == 2
    assert told() == "Error: 2 processes were started and need one run directory between them; set run_dir=<folder>"


def machine(monkeypatch: pytest.MonkeyPatch, *, gpus: int = 0, cores: int = 2, **trainer: Any) -> None:
    """Check a trainer on a machine with so many devices."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: gpus)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    options = {"_target_": "lightning.pytorch.Trainer", "accelerator": "cpu", "precision": "32-true", **trainer}
    processes.check_machine({"trainer": options}, Path())


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ({"devices": 3}, "trainer.devices=3 is more than the number of CPU cores here, 2; set 2 at most"),
        ({"devices": "99"}, "trainer.devices=99 is more than the number of CPU cores here, 2; set 2 at most"),
        (
            {"devices": -1},
            "trainer.devices=-1 is for GPUs, and this run is on the CPU; set a number of processes, such ",
        ),
        ({"devices": [0, 1]}, "trainer.devices=[0, 1] is for GPUs, and this run is on the CPU"),
        (
            {"devices": 1, "num_nodes": 5},
            "trainer.num_nodes=5 needs the command on 5 machines, and it was started on 1; start it with torchrun or",
        ),
        (
            {"devices": 9, "accelerator": "auto", "gpus": 8},
            "trainer.devices=9 is more than the number of GPUs here, 8; set 8 at most",
        ),
    ],
)
def test_more_than_the_machine_has(trainer: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        machine(monkeypatch, **trainer)


TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "20", "LOCAL_WORLD_SIZE": "4"}
SRUN = {"SLURM_NTASKS": "20", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "5", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    "environment",
    [
        {**TORCHRUN, "GROUP_RANK": "0", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"},
        {**SRUN, "SLURM_JOB_NAME": "train", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_ID": "1"},
    ],
)
def test_many_machines_with_a_launcher(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    machine(monkeypatch, devices=4, num_nodes=5)


def test_processes_that_would_each_train_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in TORCHRUN.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match=r"^20 processes were started, but trainer\.devices=1 uses 1; set trainer=ddp"):
        machine(monkeypatch, devices=1)


def test_a_trainer_is_refused_before_anything_loads(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm.build.build_model", None)
    assert train(*QUICK, "trainer.devices=1000") == 2
    assert told().startswith("Error: trainer.devices=1000 is more than the number of CPU cores here, ")


def test_a_launcher_that_is_not_installed(told: Any) -> None:
    assert train("-m", *QUICK, "hydra/launcher=ray", "hydra.launcher._target_=hydra_plugins.none.Ray") == 2
    error = told()
    assert "this hydra/launcher is not installed" in error
    assert "pip install 'vlm-template[launchers]'" in error


@pytest.mark.slow
def test_a_sweep_on_ray(tmp_path: Path) -> None:
    """The command of docs/scaling.md, as it stands, with the smallest parts."""
    tiny = ["llm=tiny", "encoder=tiny", "debug=fast", "trainer=cpu"]
    command = [sys.executable, str(ROOT / "train.py"), "-m", "hydra/launcher=ray", "seed=0,1", *tiny]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    runs = sorted(tmp_path.glob("multirun/*/*/metrics.json"))
    assert [f"seed={seed}" in run.parent.name for seed, run in enumerate(runs)] == [True, True]
    assert len({json.loads(run.read_text())["val/loss"] for run in runs}) == 2


@pytest.mark.slow
def test_a_job_that_fails_on_ray_is_not_started_again(tmp_path: Path) -> None:
    tiny = ["llm=tiny", "encoder=tiny", "debug=fast", "trainer=cpu", "encoder.image_size=40"]
    sweep = ["hydra/launcher=ray", "connector=pixel_shuffle,linear"]
    command = [sys.executable, str(ROOT / "train.py"), "-m", *sweep, *tiny]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: 1 job of the sweep failed, the others ran: connector=pix")
    (run,) = tmp_path.glob("multirun/*/*/metrics.json")
    assert run.parent.name == "connector=linear"


def test_losses_of_unlike_counts_are_not_added_up(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lm_loss over 2, size_loss over 1, which .*accumulate_grad_batches=1"):
        ranks.fit(tmp_path, ranks.tokens, accumulate=8, objective=ranks.TwoLosses())


def test_two_losses_are_the_sum_of_their_means(one: dict[str, Any]) -> None:
    model, states = ranks.tokens()
    make_module(model, states=states)
    batch = ranks.part_of(ranks.STEPS[0], 0, 8, 4)
    output = ranks.TwoLosses()(model, batch)
    assert output.counts == {"lm_loss": 18, "size_loss": 6}
    mean = output.sums["lm_loss"] / 18 + output.sums["size_loss"] / 6
    mean.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    first = one["losses"]["steps"][0]
    assert first["train/loss"] == pytest.approx(mean.item(), rel=1e-5)
    assert first["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_a_machine_without_slurm_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    launcher = ["hydra/launcher=submitit_slurm", f"hydra.sweep.dir={tmp_path}"]
    assert train("-m", *QUICK, *launcher, "seed=0,1") == 2
    assert told().startswith('Error: SLURM refused the jobs: Could not detect "srun"')


def test_every_rank_validates_as_often() -> None:
    for num, size, num_ranks in ((8, 4, 2), (9, 4, 2), (7, 3, 3), (128, 8, 8), (4, 8, 2)):
        parts = [list(EvenBatches(range(num), batch_size=size, rank=r, num_ranks=num_ranks)) for r in range(num_ranks)]
        assert len({len(part) for part in parts}) == 1
        rows = [batch for part in parts for batch in part]
        assert sorted(index for batch in rows for row in batch for index in row) == list(range(num))
        assert max(map(len, rows)) <= size
    with pytest.raises(ValueError, match="validation has 3 samples for 2 processes"):
        EvenBatches(range(3), batch_size=4, rank=0, num_ranks=2)


def test_what_sharding_cannot_do() -> None:
    sharded = {"strategy": {"_target_": "vlm.training.sharding.FullyShard"}}
    with pytest.raises(ValueError, match="quantization=nf4 makes weights that cannot be sharded"):
        check_strategy(sharded, quantization="nf4", ema_decay=None)
    with pytest.raises(ValueError, match="averages full tensors"):
        check_strategy(sharded, quantization="none", ema_decay=0.9)
    check_strategy({"strategy": "ddp", "accumulate_grad_batches": 2}, quantization="nf4", ema_decay=0.9)
    for name in ("DDPStrategy", "FSDPStrategy", "DeepSpeedStrategy"):
        strategy = {"_target_": f"lightning.pytorch.strategies.{name}"}
        with nullcontext() if name == "DDPStrategy" else pytest.raises(ValueError, match=f"{name} does not save"):
            check_strategy({"strategy": strategy}, quantization="nf4", ema_decay=0.9)


def test_slurm_saves_queues_again_and_goes_on(tmp_path: Path) -> None:
    """The script with stand-ins: a signal before the end, a second start, one that the user cancels, one that ends.

    SLURM tells the steps and the script; an `srun` that is told itself kills its tasks.
    """
    for name, lines in {
        "srun": 'exec "$@"',
        "scontrol": 'echo "scontrol $*" >> log',
        "squeue": "if [ -e cancelled ]; then echo COMPLETING; else echo RUNNING; fi",
        "python": """
            echo "$*" >> log; mkdir -p run; touch run/config.yaml
            [ -e over ] && exit 0
            kill -TERM "$PPID"; exit 143""",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4", "RUN": "run"}
    env = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "docs" / "slurm.sh"), "trainer=fsdp"]
    codes = [subprocess.run(command, cwd=tmp_path, env=env, timeout=60).returncode for _ in range(2)]
    for name in ("cancelled", "over"):
        (tmp_path / name).touch()
        codes.append(subprocess.run(command, cwd=tmp_path, env=env, timeout=60).returncode)
    assert codes == [143, 143, 143, 0]
    assert (tmp_path / "log").read_text().splitlines() == [
        "train.py trainer=fsdp run_dir=run trainer.num_nodes=2 trainer.devices=4",
        "scontrol requeue 7",
        "train.py resume=run",
        "scontrol requeue 7",
        "train.py resume=run",
        "train.py resume=run",
    ]


def test_a_rank_that_is_killed_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Lightning's observer of the other ranks says so and kills what is left."""
    child = subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    child.wait(60)
    ended: list[bool] = []
    monkeypatch.setattr(_ChildProcessObserver, "_terminate_all", lambda self: ended.append(True))
    quiet()
    assert _ChildProcessObserver(main_pid=os.getpid(), child_processes=[child])._run()
    assert ended == [True]
    why = "was killed by SIGKILL, so the run was stopped"
    error = f"Error: rank 1 (process {child.pid}) {why}; continue with resume=<run dir>\n"
    assert capfd.readouterr().err == error


def test_the_ranks_that_are_left_say_so_in_one_sentence(told: Any) -> None:
    """As gloo says it to a rank whose peer is gone."""

    def job(cfg: Any) -> None:
        raise RuntimeError(
            "[/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:27864: Connection reset by peer. This"
        )

    assert call(job, "train", *QUICK) == 2
    assert told() == (
        "Error: another process of this run has ended (Connection reset by peer); continue with resume=<run dir>"
    )
