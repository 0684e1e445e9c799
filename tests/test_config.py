"""Every option of every group composes and fits its constructor; a slip ends in a line that names the choices."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from tests.helpers.configs import GROUPS, WITHOUT_LLM, composed, needs, options
from vlm import config
from vlm.launch.benchmarks import SHARED
from vlm.launch.entry import CONF, config_error
from vlm.models.composed import Composed
from vlm.options import bind, defaults

OPTIONS = [(group, option) for group in GROUPS for option in options(group)]


@pytest.fixture(scope="module", autouse=True)
def hydra():
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        yield


def settings(*overrides: str) -> dict:
    """The composed config of `overrides` as train.py sees it, of a recipe what its stages share."""
    return config.plain(compose("train", ["recipe=null", *composed(*overrides)]))


def refusal(*overrides: str) -> str:
    """What a user reads who gives these on the command line."""
    try:
        config.check(settings(*overrides))
    except ValueError as error:
        return str(error)
    except Exception as error:
        return config_error(error)
    raise AssertionError(f"{overrides} were taken")


def test_every_group_is_one_that_a_config_names() -> None:
    assert set(GROUPS) == {*config.NEEDED, *config.MANY, *Composed.parts, "debug", "experiment", "sweep", "hydra"}


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda v: v)
def test_every_option_composes_and_binds(group: str, option: str) -> None:
    config.check(settings(f"{group}={option}", *needs(group, option)))


@pytest.mark.parametrize("option", options("benchmark"))
def test_every_benchmark_composes_and_binds(option: str) -> None:
    """Files that the user names are not opened."""
    cfg = compose("eval", ["ckpt=x", f"benchmark={option}"])
    asked = set() if option == "none" else {option}
    assert set(cfg.benchmark) == asked
    for name in asked:
        given = {
            key: value for key, value in cfg.benchmark[name].items_ex(resolve=False) if key not in (*SHARED, "scorer")
        }
        filled = {key: "x" if OmegaConf.is_missing(cfg.benchmark[name], key) else value for key, value in given.items()}
        bind(f"benchmark.{name}", OmegaConf.to_container(OmegaConf.create(filled)))


def test_the_options_of_a_rival_are_those_of_its_class_with_its_defaults() -> None:
    given: Any = OmegaConf.to_container(compose("eval", ["rival=openai"]).rival)
    target = given.pop("_target_")
    own = {"model_name": "???", "cache": None, "extra_body": {}}
    assert given == {**defaults("rival", target), **own}
    assert {*given} & {*config.EVALUATION} == set(), "they need no prefix"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [stage for stage in options("stage") if f"stage={stage}" not in WITHOUT_LLM])
def test_every_pair_of_stage_connector_and_data_composes(stage: str) -> None:
    """Each connector and each dataset with each stage; a connector and a dataset have no options in common."""
    connectors, data = options("connector"), options("data")
    for number in range(max(len(connectors), len(data))):
        connector, source = connectors[number % len(connectors)], data[number % len(data)]
        cfg = settings(f"connector={connector}", f"stage={stage}", f"data={source}", *needs("data", source))
        config.check(cfg)
        assert cfg["stage"]["name"] == stage
        if source == "shapes":
            assert cfg["data"]["task"] == ("caption" if stage == "align" else "instruct")


def test_no_derived_dimension_is_in_a_file() -> None:
    for group in ("connector", "model"):
        for option in options(group):
            keys = settings(f"{group}={option}", *needs(group, option))[group].keys()
            assert not keys & {"vision_width", "llm_width", "grid", "num_tokens"}


def test_automatic_precision_is_one_that_lightning_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = settings("trainer=cpu")
    assert cfg["trainer"]["precision"] == "auto"
    for capabilities, wanted in (({"amx_bf16": True}, "bf16-mixed"), ({"avx2": True}, "32-true")):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda c=capabilities: c, raising=False)
        assert config.precision(cfg) == wanted
    assert config.precision(settings("trainer.precision=32-true")) == "32-true"


@pytest.mark.parametrize(
    "override", ["stage.weight_decay=1", "stage.lr.connector=1", "stage.betas=[0,0.9]", "encoder.mean=[0,1,0.5]"]
)
def test_a_whole_number_is_also_a_float(override: str) -> None:
    config.check(settings(override))


def test_an_experiment_beats_the_stage_debug_both_and_the_command_line_all() -> None:
    experiment = "experiment=llava15_7b"
    assert settings(experiment)["stage"]["min_lr_ratio"] == 0.0
    assert [settings(experiment, *debug)["trainer"]["val_check_interval"] for debug in ([], ["debug=fast"])] == [500, 2]
    assert settings(experiment, "stage.min_lr_ratio=0.1")["stage"]["min_lr_ratio"] == 0.1
    assert settings("debug=fast")["trainer"]["max_steps"] == 4
    assert settings("debug=fast", "trainer.max_steps=7")["trainer"]["max_steps"] == 7


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("connector=foo", ["connector=foo", "choose one of average_pool, ", "linear, mlp"]),
        ("data=foo", ["data=foo", "captions, ", "instruct, "]),
        ("stage=alignn", ["stage=alignn", "did you mean align?"]),
        ("conector=mlp", ["conector", "did you mean connector?"]),
        ("connector.dpth=3", ["connector.dpth", "did you mean depth?", "hidden_width"]),
        ("trainer.max_step=3", ["trainer.max_step", "did you mean max_steps?"]),
        ("data.batchsize=3", ["data.batchsize", "did you mean batch_size?"]),
        ("sed=3", ["there is no option sed", "did you mean seed?"]),
        ("+sed=3", ["there is no option sed", "did you mean seed?"]),
        ("max_steps=3", ["there is no option max_steps; did you mean trainer.max_steps?"]),
        ("pretrained=x", ["there is no option pretrained; did you mean encoder.pretrained or llm.pretrained?"]),
        ("+connector.dpth=3", ["connector.dpth", "did you mean depth?"]),
        ("+stage.min_lr_rato=3", ["stage.min_lr_rato", "did you mean min_lr_ratio?"]),
        ("+stage.lr_floor=0.1", ["the option stage.lr_floor was renamed; use stage.min_lr_ratio"]),
        ("+logger=csvv", ["csvv"]),
        ("data.batch_size=abc", ["data.batch_size='abc' must be a whole number from 1 to 65,536"]),
        ("data.batch_size=2.5", ["data.batch_size=2.5 must be a whole number"]),
        ("data.on_bad_sample=drop", ["data.on_bad_sample='drop' must be one of raise, skip"]),
        ("data.max_bad_ratio=much", ["data.max_bad_ratio='much' must be a number from 0 to 1"]),
        ("data.batch_size=null", ["data.batch_size=null must be a whole number"]),
        ("data.batch_size=true", ["data.batch_size=true must be a whole number"]),
        ("trainer.max_steps=x", ["trainer.max_steps='x' must be a whole number"]),
        ("stage.lr.connector=abc", ["stage.lr.connector='abc' must be a number from 0 to 100"]),
        ("stage.betas=[0.9,b]", ["stage.betas[1]='b' must be a number at least 0 and below 1"]),
        ("connector.depth=two", ["connector.depth='two' must be a whole number"]),
        ("preflight.show=x", ["preflight.show='x' must be a whole number"]),
        ("evaluators.answers.num_samples=true", ["evaluators.answers.num_samples=true must be a whole number"]),
        (
            "stage.llm={last_n:two}",
            ["stage.llm.last_n='two' must be a whole number from 1 to 1,000"],
        ),
        (
            "stage.connector=lora",
            ["stage.connector='lora' is not a state of the connector; choose frozen, full or {only: [<module>]}"],
        ),
        ("stage.connector=frozen", ["every part is frozen, so the stage trains nothing"]),
        ("trainer.precision=bf16-true", ["trainer.precision=bf16-true is not supported; choose one of auto, 32-true"]),
        ("+trainer.max_epochs=1", ["trainer.max_epochs is not supported", "set trainer.max_steps"]),
        ("trainer.max_steps=-1", ["trainer.max_steps=-1 must be a whole number from 1"]),
        ("connector._target_=os.system", ["connector._target_=os.system is not allowed", "vlm."]),
        ("connector._target_=vlm.connectors.none.X", ["connector._target_=vlm.connectors.none.X cannot be imported"]),
        ("objective._target_=subprocess.run", ["objective._target_=subprocess.run is not allowed"]),
        ("+logger={mine:{_target_:subprocess.run}}", ["logger.mine._target_=subprocess.run is not allowed"]),
        (
            "+logger._target_=subprocess.run",
            ["logger._target_=subprocess.run must be a mapping of options"],
        ),
        ("callbacks.stop=5", ["callbacks.stop=5 must be a mapping of options"]),
        ("callbacks.stop._target_=subprocess.run", ["callbacks.stop._target_=subprocess.run is not allowed"]),
        ("model._target_=subprocess.run", ["model._target_=subprocess.run is not allowed"]),
        ("trainer.strategy=fsdp", ["trainer.strategy=fsdp shards", "choose trainer=fsdp"]),
        # a section that has one class names none: a file's would take its place
        (
            "data.augment={_target_:vlm.launch.processes.wait_for}",
            ["data.augment._target_='vlm.launch.processes.wait_for' must be a number"],
        ),
        ("+encoder.tiles._target_=vlm.launch.processes.wait_for", ["there is no option encoder.tiles._target_"]),
        (
            "callbacks.save._target_=vlm.launch.processes.wait_for",
            ["callbacks.save._target_=vlm.launch.processes.wait_for is not"],
        ),
        ("+checkpoint.every_n_steps=5", ["the option checkpoint was renamed; use callbacks.save"]),
        ("trainer.strategy={_target_:os.system}", ["trainer.strategy._target_=os.system is not allowed"]),
        ("data=captions", ["data.annotations must be given; set data.annotations="]),
        ("data.augment={cropped:0.5}", ["data.augment.cropped", "did you mean crop?"]),
    ],
)
def test_a_slip_on_the_command_line(override: str, said: list[str]) -> None:
    told = refusal(override)
    assert "\n" not in told
    assert "_loader" not in told
    for words in said:
        assert words in told, told


@pytest.mark.parametrize(
    ("group", "lines", "said"),
    [
        ("connector", "_target_: vlm.connectors.mlp.MLP\ndpth: 2", ["connector.dpth", "did you mean depth?"]),
        ("connector", "_target_: vlm.connectors.mlp.MLP\ndepth: two", ["connector.depth='two'"]),
        ("connector", "_target_: builtins.eval", ["connector._target_=builtins.eval is not allowed"]),
        ("data", "_target_: vlm.data.sources.shapes.Shapes\nsede: 2", ["data.sede", "did you mean seed?"]),
        (
            "trainer",
            "_target_: lightning.pytorch.Trainer\naccelerator: cpu\nprecision: auto\nmax_epoch: 3",
            ["max_epoch"],
        ),
        (
            "logger",
            "csv: {_target_: lightning.pytorch.loggers.CSVLogger, save_dir: x, nam: y}",
            ["logger.csv.nam", "name"],
        ),
        (
            "logger",
            "mine: {_target_: lightning.pytorch.loggers.WandbLogger, save_dir: x, entty: y}",
            ["logger.mine.entty", "did you mean entity?"],
        ),
        (
            "logger",
            "tb: {_target_: lightning.pytorch.loggers.TensorBoardLogger, save_dir: x, flush_sec: 3}",
            ["did you mean flush_secs?"],
        ),
        ("callbacks", "stop:\n  _target_: vlm.callbacks.stop.StopOnSignal\n  soon: 1", ["callbacks.stop.soon"]),
        ("encoder", "_target_: vlm.encoders.timm.TimmEncoder\nweights: random", ["encoder lacks the option name"]),
    ],
)
def test_a_slip_in_a_file(tmp_path: Path, group: str, lines: str, said: list[str]) -> None:
    (tmp_path / group).mkdir()
    (tmp_path / group / "mine.yaml").write_text(lines + "\n")
    told = refusal(f"{group}=mine", f"hydra.searchpath=[file://{tmp_path}]")
    for words in said:
        assert words in told, told


def test_a_logger_takes_what_it_passes_on() -> None:
    config.check(settings("logger=wandb", "+logger.wandb.entity=us"))
    config.check(settings("logger=tensorboard", "+logger.tensorboard.flush_secs=3"))
    with pytest.raises(ValueError, match=r"logger\.tensorboard\.entity; .*choose one of .*flush_secs"):
        config.check(settings("logger=tensorboard", "+logger.tensorboard.entity=us"))


def test_an_unknown_section_is_refused() -> None:
    cfg = copy.deepcopy(settings())
    cfg["conector"] = {}
    with pytest.raises(ValueError, match="there is no option conector; did you mean connector"):
        config.check(cfg)
