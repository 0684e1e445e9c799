"""Recipes: the stages that an experiment names, one after the other, each a `train.py` that starts from the one before.

<dir>/options.json              the options of each stage when the recipe was started
<dir>/1-align/, 2-instruct/, …  a run directory a stage
<dir>/recipe.json               the figures after every stage
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.table import Table
from rich.text import Text

from vlm import config
from vlm.launch import plan
from vlm.launch.against import read_prediction
from vlm.launch.entry import CONF, config_error, fail
from vlm.launch.overrides import for_shell, override
from vlm.launch.processes import FORWARDED, num_processes, searchpath, wait_for
from vlm.launch.resume import FREE, within
from vlm.options import check_keys
from vlm.training import run
from vlm.training.artifact import write_json
from vlm.training.results import format_metric, is_score, names_beside

OURS = ("ckpt", "run_dir", "resume", "recipe", "experiment", "debug", "plan")  # a stage in a file cannot set these
FIGURES = ("val/loss", "val/visual_gain", "val/exact_match")
BY_TYPE, TEXT = "val/accuracy/", "text/"
CONTINUE = "give the same command again to continue there"


@dataclass(frozen=True)
class Stage:
    """A stage's name, its run directory, its options without the paths, and the config that they compose."""

    name: str
    run_dir: Path
    options: list[str]
    cfg: DictConfig


def run_stages(cfg: DictConfig) -> Path | None:
    """Run or plan every stage of `cfg.recipe`; what an earlier call has finished is left as it is.

    Returns the run directory of the last stage, or None for a plan.
    """
    root = Path(HydraConfig.get().runtime.output_dir)
    stages = read_stages(cfg, root)
    if plan.wanted(cfg):
        for number, stage in enumerate(stages):
            _print_command(stage.name, "train.py", _start_options(stages, number))
            if file := cfg.plan.json:
                stage.cfg.plan.json = _of_stage(file, stage.name)
            plan.plan(stage.cfg)
        return None
    if (num := num_processes()) > 1:
        raise ValueError(
            f"a recipe starts its stages itself, but {num} processes were started with it; start one, or each stage by "
            "its own command with recipe=null"
        )
    predicted = {}
    for stage in stages if cfg.plan.against else ():
        read_prediction(file := _of_stage(cfg.plan.against, stage.name))
        predicted[stage.name] = [override("plan.against", file)]
    with run.lock(root, resumed=False) or nullcontext():  # each stage has a directory of its own
        _check_options(root, stages)
        for number, stage in enumerate(stages):
            if run.status(stage.run_dir) == "finished":
                run.CONSOLE.print(f"{stage.name} is finished: {stage.run_dir}", soft_wrap=True)
            elif (stage.run_dir / "config.yaml").exists():
                options = [override("resume", str(stage.run_dir)), *filter(_may_change, stage.options)]
                _run(stage.name, "train.py", options)
            else:
                _run(stage.name, "train.py", [*_start_options(stages, number), *predicted.get(stage.name, ())])
            if run.status(stage.run_dir) == "time_up":
                fail(f"{stage.name} reached trainer.max_time; {CONTINUE}")
            if cfg.recipe.get("eval") and not _figures(stage, cfg):
                (stage.run_dir / "eval" / "results.json").unlink(missing_ok=True)  # of other options
                _run(f"evaluation of {stage.name}", "eval.py", _evaluation(stage, cfg))
        _report(root, stages, cfg)
    return stages[-1].run_dir


def read_stages(cfg: DictConfig, root: Path) -> list[Stage]:
    """The stages of a recipe, each composed and checked before the first one starts.

    A stage's options in the file stand between its experiment and debug=: where debug or the command line says
    something of the same key, they are left out. Raises ValueError where a stage does not compose.
    """
    listed, given = _listed(cfg), _given()
    if "stage" in given.values():
        names = ", ".join(entry["stage"] for entry in listed)
        raise ValueError(f"this recipe runs the stages {names}; leave out stage=, or add recipe=null for a plain run")
    choices: Any = HydraConfig.get().runtime.choices
    first = [f"experiment={choices.experiment}", "recipe=null"] if choices.experiment else []
    general = [line for line, key in given.items() if key.partition(".")[0] not in OURS or key == "debug"]
    start = [line for line, key in given.items() if key == "ckpt"]
    stronger = {*given.values(), *(_keys(compose(f"debug/{choices.debug}")) if choices.debug else ())}
    stages = []
    for number, entry in enumerate(listed, start=1):
        name = f"{number}-{entry['stage']}"
        own = [override(key, value) for key, value in entry.items() if key not in stronger]
        options = [*first, *own, *general, *(start if number == 1 else ())]
        try:
            if barred := [key for key in entry if key.partition(".")[0] in OURS]:
                raise ValueError(f"{barred[0]} cannot be set by a stage; give it on the command line")
            composed = compose("train", [*options, override("run_dir", str(root / name))])
            if not plan.wanted(cfg):  # which needs no data
                config.check(settings := config.plain(composed))
                _check_evaluation(settings, _asked(cfg))
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(f"stage {name} of the recipe: {config_error(error)}") from error
        except ValueError as error:
            raise ValueError(f"stage {name} of the recipe: {error}") from error
        stages.append(Stage(name=name, run_dir=root / name, options=options, cfg=composed))
    return stages


def _check_evaluation(settings: dict[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise ValueError where eval.py would refuse the options it will be given."""
    options = [override(f"++{key}" if key.startswith("data.") else key, value) for key, value in asked.items()]
    data = OmegaConf.merge(settings["data"], compose("eval", options).data)
    config.check({**settings, "data": OmegaConf.to_container(data)})


def _listed(cfg: DictConfig) -> list[dict[str, Any]]:
    """The stages as the experiment has them. Raises ValueError where it has none."""
    recipe: Any = OmegaConf.to_container(cfg.recipe) if OmegaConf.is_config(cfg.recipe) else cfg.recipe
    if not isinstance(recipe, dict):
        raise ValueError(f"recipe={recipe} has no stages; write recipe.stages=[{{stage: align}}, {{stage: instruct}}]")
    check_keys("recipe", recipe, {"stages", "eval", "run_dir"})
    stages = recipe.get("stages")
    if not isinstance(stages, list) or not stages or not all(isinstance(s, dict) and "stage" in s for s in stages):
        raise ValueError(
            f"recipe.stages={stages} must be a list of stages; write [{{stage: align}}, {{stage: instruct}}]"
        )
    if not isinstance(recipe.get("eval") or {}, dict):
        raise ValueError(
            f"recipe.eval={recipe['eval']} must be a mapping of options of eval.py; write {{data.task: instruct}}"
        )
    return stages


def _given() -> dict[str, str]:
    """Each override that the user gave, with the key or group that it is of."""
    hydra = HydraConfig.get()
    task = {line: OverridesParser.create().parse_override(line).key_or_group for line in hydra.overrides.task}
    return task | dict.fromkeys(searchpath(hydra), "hydra.searchpath")


def _keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """The dotted names of all values."""
    for key in map(str, node):
        yield from _keys(node[key], f"{prefix}{key}.") if isinstance(node[key], DictConfig) else (prefix + key,)


def _of_stage(file: str, name: str) -> str:
    """The plan of a stage, beside the name that the command line gives."""
    return str(Path(file).with_stem(f"{Path(file).stem}-{name}"))


def _start_options(stages: Sequence[Stage], number: int) -> list[str]:
    """The options of train.py that start a stage."""
    before = [override("ckpt", str(stages[number - 1].run_dir))] if number else []
    return [*stages[number].options, *before, override("run_dir", str(stages[number].run_dir))]


def _evaluation(stage: Stage, cfg: DictConfig) -> list[str]:
    """The options of eval.py that measure a stage, on one device, with what all stages are measured with."""
    keys = ("num_samples", "batch_size", "max_new_tokens")
    answers = {key: value for key in keys if (value := OmegaConf.select(stage.cfg, f"evaluators.answers.{key}"))}
    machine = {f"trainer.{key}": stage.cfg.trainer[key] for key in ("accelerator", "precision")}
    options = {"ckpt": str(stage.run_dir), **answers, **machine, "trainer.devices": 1, **_asked(cfg)}
    return [override(key, value) for key, value in options.items()]


def _asked(cfg: DictConfig) -> dict[str, Any]:
    """What the recipe measures all stages with, but for what the command line says of the runs themselves."""
    asked: Any = OmegaConf.to_container(cfg.recipe.get("eval") or OmegaConf.create())
    given = set(_given().values())
    return {key: value for key, value in asked.items() if key not in given}


def _check_options(root: Path, stages: Sequence[Stage]) -> None:
    """Store the options of a new recipe. Raises ValueError where those of one that continues have changed."""
    now = {stage.name: stage.options for stage in stages}
    file = root / "options.json"
    if file.exists():
        _compare(json.loads(file.read_text(encoding="utf-8")), now, root)
    else:
        write_json(file, now)


def _compare(before: Mapping[str, list[str]], now: Mapping[str, list[str]], root: Path) -> None:
    """Raise ValueError naming the options that only one of the two has."""

    def only(these: Mapping[str, list[str]], those: Mapping[str, list[str]]) -> str:
        own = (o for name in these for o in these[name] if o not in those.get(name, []) and not _may_change(o))
        return " ".join(dict.fromkeys(own))

    differs = {"with": only(before, now), "without": only(now, before)}
    if any(differs.values()):
        found = " and ".join(f"{word} {options}" for word, options in differs.items() if options)
        raise ValueError(
            f"the recipe in run_dir={root} was started {found}; give that command again to continue it, or another "
            "run_dir"
        )


def _may_change(option: str) -> bool:
    """Whether an option may change when a stage resumes."""
    return within(option.partition("=")[0].lstrip("+~"), (*FREE, "hydra.searchpath"))


def _print_command(what: str, program: str, options: Sequence[str]) -> None:
    """Print a command so that it can be copied."""
    file = Path(CONF).parent / program
    shown = file.name if file.parent == Path.cwd() else str(file)
    line = f"\n{what}: python {' '.join(map(for_shell, [shown, *options]))}"
    run.CONSOLE.print(line, soft_wrap=True)


def _run(what: str, program: str, options: Sequence[str]) -> None:
    """Start a program of the project and wait for its end; exit with its code if that is not 0."""
    _print_command(what, program, options)
    code = wait_for([sys.executable, str(Path(CONF).parent / program), *options])
    if code:
        ended = "was stopped" if code - 128 in FORWARDED else f"ended with exit code {code}"
        print(f"Error: {what} {ended}; {CONTINUE}", file=sys.stderr)
        sys.exit(code)


def _figures(stage: Stage, cfg: DictConfig) -> dict[str, float] | None:
    """What eval.py has measured of a stage with the recipe's options; None where it has not."""
    file = stage.run_dir / "eval" / "results.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return results["metrics"] if results.get("options") == _evaluation(stage, cfg) else None


def _report(root: Path, stages: Sequence[Stage], cfg: DictConfig) -> None:
    """Print the figures after every stage and write them to recipe.json."""
    evaluated = bool(cfg.recipe.get("eval"))
    rows: list[dict[str, Any]] = [
        {
            "name": stage.name,
            "run": str(stage.run_dir),
            "metrics": run.read_metrics(stage.run_dir),
            "eval": _figures(stage, cfg) if evaluated else None,
        }
        for stage in stages
    ]
    experiment = HydraConfig.get().runtime.choices["experiment"]
    asked = _asked(cfg) if evaluated else None
    write_json(root / "recipe.json", {"experiment": experiment, "eval": asked, "stages": rows})
    table = Table(title="After each stage")
    table.add_column("metric")
    for stage in stages:
        table.add_column(stage.name, justify="right")
    kinds = (TEXT,) if evaluated else (TEXT, BY_TYPE)
    _section(table, "on its own data", [row["metrics"] for row in rows], kinds)
    if evaluated:
        same = ", ".join(f"{key}={value}" for key, value in _asked(cfg).items())
        _section(table, f"on {same}", [row["eval"] for row in rows], (BY_TYPE,))
    run.CONSOLE.print(table)
    run.CONSOLE.print(f"Recipe: {root / 'recipe.json'}", soft_wrap=True)


def _section(table: Table, title: str, figures: Sequence[Mapping[str, float]], kinds: tuple[str, ...]) -> None:
    """A row a figure: those that every stage has, then those whose names begin with one of `kinds`.

    A score has its 95 % interval, and below it the best answers without the image and the number of answers.
    """
    table.add_section()
    table.add_row(Text(title, "bold"))
    for name in (*FIGURES, *sorted({name for each in figures for name in each if name.startswith(kinds)})):
        table.add_row(name, *(_cell(name, each) for each in figures))
        if any(is_score(name, each) for each in figures):
            for other in (names_beside(name).no_image, names_beside(name).num):
                table.add_row(other, *(_cell(other, each) for each in figures))


def _cell(name: str, figures: Mapping[str, float]) -> str:
    if name not in figures:
        return ""
    low, high = (figures.get(each) for each in (names_beside(name).low, names_beside(name).high))
    if low is None or high is None:
        value = figures[name]
        return format_metric(int(value) if "/num_" in name else value)
    return f"{format_metric(figures[name])} [{low:.3f}, {high:.3f}]"
