"""A sweep: its jobs and their places, what the same command does again, and the file of a sweep of W&B."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

import tests.helpers.programs as programs
from tests.helpers.programs import QUICK, read, train
from vlm import config
from vlm.launch import sweep
from vlm.launch.command_line import translate
from vlm.launch.configs import CONF
from vlm.launch.sweep import place_in_sweep
from vlm.report.jobs import FILE, read_jobs
from vlm.training.run import read_metrics

ROOT = Path(__file__).parents[2]


def place(folder: str, output: str) -> dict[str, str | None]:
    runtime = SimpleNamespace(cwd="/here", output_dir=output)
    return place_in_sweep(SimpleNamespace(runtime=runtime, sweep=SimpleNamespace(dir=folder)))


def test_the_place_of_a_run_in_a_sweep() -> None:
    assert place("multirun/today", "/here/multirun/today/seed=1") == {"sweep": "today", "job": "seed=1"}
    assert place("/there/mine", "/there/mine/a/b") == {"sweep": "mine", "job": "a/b"}
    assert place("multirun/today", "/here/runs/align/tiny") == {"sweep": None, "job": None}


def test_the_sweep_of_wandb_in_the_docs_gives_options_of_train() -> None:
    """W&B's own functions write the command line of a job for the values that its server has chosen."""
    options = yaml.safe_load((ROOT / "docs" / "wandb_sweep.yaml").read_text())
    chosen = {"connector": {"value": "qformer"}, "stage.lr.connector": {"value": 0.00012}}
    assert chosen.keys() == options["parameters"].keys()
    arguments = create_sweep_command_args({"args": chosen})["args_no_hyphens"]
    line = create_sweep_command(options["command"])
    at = line.index("${args_no_hyphens}")
    assert line[at - 1] == "${program}"
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        settings = config.plain(compose("train", [*arguments, *line[at + 1 :], "recipe=null", "run_dir=x"]))
    config.check(settings)
    assert settings["connector"]["_target_"].endswith("QFormer")
    assert settings["stage"]["lr"]["connector"] == 0.00012
    assert "wandb" in settings["logger"]


@pytest.mark.parametrize(
    ("overrides", "sweeper", "num"),
    [
        (["connector=linear,mlp", "seed=0,1,2", "llm=tiny"], {}, 6),
        (["seed=range(0,4)"], {"params": {"connector": "linear,mlp"}}, 8),
        (["connector=mlp"], {"params": {"connector": "linear,mlp"}}, 1),
        (["connector=glob(*)"], {}, None),
        (["stage.lr.connector=interval(0,1)"], {"n_trials": 20}, 20),
    ],
)
def test_number_of_jobs(overrides: list[str], sweeper: dict[str, Any], num: int | None) -> None:
    hydra = {"sweeper": sweeper, "overrides": {"task": overrides}}
    assert sweep.number_of_jobs(OmegaConf.create({"hydra": hydra})) == num


@pytest.mark.slow
def test_the_same_command_does_only_what_is_missing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    returned: list[float] = []

    def job(cfg: Any) -> Any:
        returned.append(programs.training.train(cfg))
        return returned[-1]

    command = ["-m", *QUICK, "seed=0,1", f"hydra.sweep.dir={tmp_path}", "sweep.metric=val/visual_gain"]
    assert programs.call(job, "train", *command) == 0
    said = capfd.readouterr().out
    assert said.index("Job 1 of 2: seed=0") < said.index("Job 2 of 2: seed=1") < said.index("2 finished.")
    gains = [read_metric(tmp_path / f"seed={seed}", "val/visual_gain") for seed in (0, 1)]
    assert returned == gains

    first, second = (tmp_path / f"seed={seed}" / "metrics.json" for seed in (0, 1))
    written = first.stat().st_mtime_ns
    second.unlink()  # as if it was killed while it evaluated
    assert programs.call(job, "train", *command) == 0
    said = capfd.readouterr().out
    assert f"This job is finished: {first.parent}" in said
    assert first.stat().st_mtime_ns == written
    assert "step 1/2" not in said  # the second job resumes after its last step
    assert returned == [*gains, *gains]
    assert len(read(second.with_name("metrics.jsonl"))) == 3

    assert train(*command, "stage.weight_decay=0.5") == 2
    said = capfd.readouterr().err
    assert "holds a run with other settings: stage.weight_decay was 0.0 and is 0.5; set hydra.sweep.dir=" in said


@pytest.mark.slow
def test_a_metric_that_a_run_has_not(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train("-m", *QUICK, "seed=0", f"hydra.sweep.dir={tmp_path}", "sweep.metric=val/los") == 2
    assert "sweep.metric=val/los is not a figure of this run; choose one of" in capfd.readouterr().err


@pytest.mark.slow
def test_a_search_of_optuna_asks_for_the_same_jobs_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["-m", *QUICK, "sweep=lr", "hydra.sweeper.n_trials=2", f"hydra.sweep.dir={tmp_path}"]
    assert train(*command) == 0
    rates = [float(job.options["stage.lr.connector"]) for job in read_jobs(tmp_path / FILE)]
    assert len({*rates}) == 2
    assert all(1e-4 <= rate <= 3e-2 for rate in rates)
    assert "Job 2 of 2: stage.lr.connector=" in capfd.readouterr().out
    assert train(*command) == 0
    assert capfd.readouterr().out.count("This job is finished: ") == 2
    assert [float(job.options["stage.lr.connector"]) for job in read_jobs(tmp_path / FILE)] == rates


def read_metric(run_dir: Path, name: str) -> float:
    return read_metrics(run_dir)[name]


@pytest.mark.parametrize("file", sorted(Path(CONF, "sweep").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_value_of_a_preset_is_an_option(file: Path) -> None:
    params = yaml.safe_load(file.read_text(encoding="utf-8"))["hydra"]["sweeper"]["params"]
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        connector = [f"connector={params['connector']}"] if params.get("connector") == "resampler" else []
        for key, values in params.items():
            for value in ["1e-3"] if "interval" in values else str(values).split(","):
                config.check(config.plain(compose("train", [*connector, f"{key}={value}", "run_dir=x"])))


def test_a_preset_names_its_jobs_by_what_differs() -> None:
    names = translate(["-m", "sweep=connectors", "llm=tiny"], config_name="train")[1]
    assert names == "hydra.job.config.override_dirname.exclude_keys=[llm,sweep]"
