"""The place of a run in a sweep, and the file of a sweep of W&B."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from vlm import config
from vlm.launch.configs import CONF
from vlm.launch.sweep import place_in_sweep

ROOT = Path(__file__).parents[2]


def place(sweep: str, output: str) -> dict[str, str | None]:
    runtime = SimpleNamespace(cwd="/here", output_dir=output)
    return place_in_sweep(SimpleNamespace(runtime=runtime, sweep=SimpleNamespace(dir=sweep)))


def test_the_place_of_a_run_in_a_sweep() -> None:
    assert place("multirun/today", "/here/multirun/today/seed=1") == {"sweep": "today", "job": "seed=1"}
    assert place("/there/mine", "/there/mine/a/b") == {"sweep": "mine", "job": "a/b"}
    assert place("multirun/today", "/here/runs/align/tiny") == {"sweep": None, "job": None}


def test_the_sweep_of_wandb_in_the_docs_gives_options_of_train() -> None:
    """W&B's own functions write the command line of a job for the values that its server has chosen."""
    sweep = yaml.safe_load((ROOT / "docs" / "wandb_sweep.yaml").read_text())
    chosen = {"connector": {"value": "qformer"}, "stage.lr.connector": {"value": 0.00012}}
    assert chosen.keys() == sweep["parameters"].keys()
    arguments = create_sweep_command_args({"args": chosen})["args_no_hyphens"]
    line = create_sweep_command(sweep["command"])
    at = line.index("${args_no_hyphens}")
    assert line[at - 1] == "${program}"
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        settings = config.plain(compose("train", [*arguments, *line[at + 1 :], "recipe=null", "run_dir=x"]))
    config.check(settings)
    assert settings["connector"]["_target_"].endswith("QFormer")
    assert settings["stage"]["lr"]["connector"] == 0.00012
    assert "wandb" in settings["logger"]
