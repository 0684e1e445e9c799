"""The composition of tests (tests/helpers/composing.py) against Hydra's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from tests.helpers import composing
from tests.helpers.configs import COMPOSED, FILES
from vlm.launch.entry import CONF

OTHER = {"train": ["run_dir=other", "stage.lr.connector=7", "seed=7"], "eval": ["ckpt=x", "out=other"]}


def composed(program: str, *overrides: str, folder: str = CONF) -> dict[str, Any]:
    """The config with Hydra's part, unresolved: what its interpolations name is in it."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(folder, version_base="1.3"):
        config: Any = OmegaConf.to_container(compose(program, list(overrides), return_hydra_config=True))
    return config


def as_hydra_does(patch: pytest.MonkeyPatch) -> None:
    for owner, name, original, _ in composing.REPLACED:
        if original is None:
            patch.delattr(owner, name)
        else:
            patch.setattr(owner, name, original)


@pytest.mark.parametrize(
    ("program", "overrides"),
    [
        ("train", COMPOSED),
        ("train", ["experiment=llava15_7b", "debug=fast", "+stage.x={a:[1,null]}", "seed=1e3"]),
        ("train", ["stage=instruct", "data=captions", *FILES, "connector=qformer", "~callbacks.save"]),
        ("train", ["sweep=connectors", "logger=[tensorboard,wandb]", "hydra.job.chdir=true"]),
        ("eval", ["ckpt=x", "benchmark=[shapes,text]", "benchmark.shapes.num_scenes=3"]),
    ],
)
def test_configs_are_those_of_hydra(program: str, overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    composing.loaded.clear()
    for before in ([], overrides):  # what one composition changes is not in the next
        composed(program, *before, "hydra.job.name=other", *OTHER[program])
        assert {program, "hydra/config"} <= composing.loaded.keys()
    fast = composed(program, *overrides)
    as_hydra_does(monkeypatch)
    assert str(fast) == str(composed(program, *overrides))  # in the same order


def test_a_folder_of_ones_own_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for value in (1, 2):
        (tmp_path / "mine" / "own.yaml").write_text(f"value: {value}\n")
        config = composed("train", *COMPOSED, f"hydra.searchpath=[file://{tmp_path}]", "+mine=own")
        assert config["mine"] == {"value": value}
