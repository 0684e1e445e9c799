"""Read, check and write configs. No part is created here."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf

from vlm.data.augment import Augment
from vlm.data.datamodule import VLMDataModule
from vlm.data.reading import Reading
from vlm.evaluation.answers import MaxNewTokens
from vlm.models.base import Model, check_capabilities
from vlm.module import VLMModule
from vlm.options import (
    bind,
    bind_class,
    check_keys,
    check_mapping,
    check_types,
    check_values,
    find_class,
    parameters,
    shown,
)
from vlm.ranges import BatchSize, Decay, Depth, Name, Number, Pattern, Range, Samples, Seed, Workers
from vlm.renamed import refuse_renamed, rename
from vlm.training import trust
from vlm.training.artifact import commit, temporary_path, write
from vlm.training.optim import Rate, check_lora, check_rates, check_states, check_steps
from vlm.training.run import native_precision
from vlm.training.sharding import check_strategy

MANY = ("evaluators", "callbacks", "logger")  # groups with any number of options, each under a name
BASES = (("encoder", "encoder", "pretrained"), ("llm", "llm", "pretrained"), ("tokenizer", "connector", "tokenizer"))
# Folders of a merged or imported run, which move with it: the section and the key that name each.
Memory = Annotated[Number, Range(0.01, 10**6)]  # units of 10⁹ bytes
NEEDED = ("model", "objective", "data", "stage", "trainer")  # groups with one option, besides the parts of the model
# Keys that are not arguments of a constructor: values at the top level, and sections.
VALUES: dict[str, Any] = {
    **{"seed": Seed, "ckpt": Name | None, "run_dir": Name, "recipe": dict[str, Any] | None},
    **dict.fromkeys(("preflight", "plan", "resume", "sweep"), dict[str, Any]),
}
SECTIONS: dict[str, dict[str, Any]] = {
    "preflight": {"samples": Annotated[int, Range(1, 10**6)], "show": Annotated[int, Range(0, 10**6)]},
    "plan": {"show": bool, "json": Name | None, "probe": bool, "against": Name | None, "memory_gb": Memory | None},
    "resume": {"run": Name | None, "allow": list[Name]},
    "sweep": {
        "metric": Name,
        "match": Literal["steps", "tokens", "seconds"] | None,
        "budget": Annotated[Number, Range(1, 10**15)] | None,
    },
}
STAGE: dict[str, Any] = {  # besides the states of the parts and the arguments of VLMModule
    "name": Annotated[str, Pattern("[^/]+", "align")],  # also a folder
    "task": Literal["caption", "instruct", "mixed"],
    "lr": dict[str, Rate],
    "lora": dict[str, Any],
    "gradient_clip_val": Annotated[Number, Range(0, 10**6)] | None,
    "ema_decay": Decay | None,
}
OPTIONAL = {
    "run",
    "allow",
    "metric",
    "match",
    "budget",
    "show",
    "json",
    "probe",
    "against",
    "memory_gb",
    "task",
    "lora",
    "gradient_clip_val",
    "ema_decay",
}  # keys that may be missing
EVALUATION: dict[str, Any] = {  # top-level keys of conf/eval.yaml
    "ckpt": Name,
    "out": Name | None,
    "num_samples": Samples | None,
    "batch_size": BatchSize,
    "max_new_tokens": MaxNewTokens | None,
    "against": Name | None,
    "num_workers": Workers,
    "data": dict[str, Any],
}
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
OF_TRAINER = {  # fixed arguments of the Trainer
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "check_val_every_n_epoch": None,
    "use_distributed_sampler": False,
}
# Arguments that a callback or logger gets from the run if its constructor has them.
OF_THE_RUN = dict.fromkeys(("run_dir", "max_time", "ema_decay", "manifest", "inherited", "match", "budget"))
NEEDED_CALLBACKS = {  # callbacks that earlier versions did not have in their config
    "save": "save.Save",
    "ema": "ema.EMA",
    "stop_on_time": "stop.StopOnTime",
    "configured_rates": "rates.ConfiguredRates",
}


def model_class(cfg: Mapping[str, Any]) -> type[Model]:
    """The class of the model in a config. Raises ValueError if there is none."""
    if not isinstance(cfg.get("model"), Mapping):
        raise ValueError(f"model={shown(cfg.get('model'))} is not an option of this group; choose model=<option>")
    found: Any = find_class("model", cfg["model"].get("_target_"))
    return found


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config as plain dictionaries and lists."""
    settings: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    for group in MANY:
        settings.setdefault(group, {})
    for group in (*NEEDED, *MANY):
        if not isinstance(settings.get(group), dict):
            raise ValueError(f"the config has no {group}; choose one of the options in conf/{group}")
    for part in model_class(settings).groups(settings):
        if isinstance(settings[part], dict):
            settings[part].pop("lr", None)  # suggestions for stages, already interpolated
    return settings


def check(cfg: Mapping[str, Any]) -> None:
    """Raise ValueError for an unknown key, a missing key or an invalid value, with the choices."""
    for group in NEEDED:
        if not isinstance(cfg.get(group), Mapping):
            raise ValueError(f"{group}={shown(cfg.get(group))} is not an option of this group; choose {group}=<option>")
    model = model_class(cfg)
    refuse_renamed(cfg)
    check_keys("", cfg, {*NEEDED, *MANY, *model.parts, *VALUES})
    for part in model.groups(cfg):
        if not isinstance(cfg[part], Mapping):
            raise ValueError(f"{part}={shown(cfg[part])} is not an option of this group; choose {part}=<option>")
    check_values("", {key: value for key, value in cfg.items() if key in VALUES}, VALUES)
    for section, hints in SECTIONS.items():
        check_keys(section, cfg.get(section) or {}, hints)
        check_values(section, cfg.get(section) or {}, hints)
        check_required(section, cfg.get(section) or {}, hints.keys() - OPTIONAL)
    _check_budget(cfg.get("sweep") or {})
    _check_stage(cfg["stage"], model)
    if file := (cfg.get("plan") or {}).get("json"):
        check_parent("plan.json", file)
    loader, source = split_data(cfg["data"])
    check_loader("data", loader)
    bind_source("data", source)
    model.check(cfg)
    if (lora_part := model.lora_part()) is not None:
        check_required("stage", cfg["stage"], ("lora",))
        check_lora(cfg["stage"]["lora"], find_class(lora_part, cfg[lora_part]["_target_"]))
    objective: Any = bind("objective", cfg["objective"]).func
    check_capabilities(f"objective={objective.__name__}", objective.needs, model)
    for group in MANY:
        check_mapping(group, cfg[group])
    for name, make in bind_evaluators(cfg).items():
        check_capabilities(f"evaluators.{name}", make.func.needs, model)  # type: ignore[attr-defined]
    _check_trainer(cfg)
    bind_callbacks(cfg, OF_THE_RUN)
    bind_named(cfg, "logger", OF_THE_RUN)


def check_model(cfg: Mapping[str, Any]) -> None:
    """As `check`, for a program that builds the model of a run and uses neither its data nor its trainer."""
    model = model_class(cfg)
    check_values("", {"seed": cfg.get("seed")}, VALUES)
    for part in model.groups(cfg):
        check_mapping(part, cfg[part])
    _check_stage(cfg["stage"], model)
    check_loader("data", split_data(cfg["data"])[0])
    model.check(cfg)


def _check_budget(sweep: Mapping[str, Any]) -> None:
    """Raise ValueError for a budget without its unit, and a unit without its budget."""
    match, budget = sweep.get("match"), sweep.get("budget")
    if match in ("tokens", "seconds") and budget is None:
        raise ValueError(f"sweep.match={match} needs the number of {match} of a job; set sweep.budget=<{match}>")
    if budget is not None and match not in ("tokens", "seconds"):
        raise ValueError(
            f"sweep.budget={budget} is a number of tokens or seconds, and sweep.match is {match or 'null'}; set "
            "sweep.match=tokens or seconds, or trainer.max_steps="
        )


def _check_stage(stage: Mapping[str, Any], model: type[Model]) -> None:
    arguments = parameters(VLMModule).keys() - {"model", "objective", "evaluators"}
    check_keys("stage", stage, {*STAGE, *model.parts, *arguments})
    check_values("stage", stage, STAGE)
    check_required("stage", stage, STAGE.keys() - OPTIONAL)
    check_keys("stage.lr", stage["lr"], {*model.parts, "objective"})
    for part in model.parts:
        if isinstance(state := stage.get(part), Mapping):
            check_values(f"stage.{part}", state, {"last_n": Depth, "only": list[Name]})
    check_types("stage", {key: value for key, value in stage.items() if key not in STAGE}, VLMModule)
    check_states(stage, model)
    check_rates(stage, model, lr=stage["lr"], layer_decay=stage.get("layer_decay"))


def _check_trainer(cfg: Mapping[str, Any]) -> None:
    trainer = cfg["trainer"]
    if not isinstance(strategy := trainer.get("strategy", "auto"), str):
        bind("trainer.strategy", strategy)
    quantization = next((part["quantization"] for part in cfg.values() if _is_quantized(part)), "none")
    check_strategy(trainer, quantization=quantization, ema_decay=cfg["stage"].get("ema_decay"))
    check_steps(trainer)
    check_required("trainer", trainer, ("_target_", "accelerator", "precision"))
    options = {key: value for key, value in trainer.items() if key not in ("precision", "strategy")}
    bind("trainer", options, derived={**OF_TRAINER, **dict.fromkeys(("callbacks", "logger", "default_root_dir"))})
    precision(cfg)


def _is_quantized(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("quantization", "none") != "none"


def migrated(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run, migrated from earlier versions."""
    settings = rename(settings)
    strategy = settings["trainer"].get("strategy")
    if (
        isinstance(strategy, dict) and strategy.get("_target_") == "vlm.sharding.FullyShard"
    ):  # its module in earlier versions
        settings["trainer"]["strategy"] = {**strategy, "_target_": "vlm.training.sharding.FullyShard"}
    if "objective" not in settings and "objective" in (stage := settings["stage"]):
        settings["stage"] = {key: value for key, value in stage.items() if key != "objective"}
        settings["objective"] = stage["objective"]
    if "evaluators" not in settings:
        callbacks = dict(settings["callbacks"] or {})
        forgetting = {"_target_": "vlm.evaluation.forgetting.Forgetting"}
        settings["evaluators"] = {
            "visual_gain": {"_target_": "vlm.evaluation.visual_gain.VisualGain"},
            **({"forgetting": {**callbacks.pop("forgetting"), **forgetting}} if "forgetting" in callbacks else {}),
            "answers": {
                "_target_": "vlm.evaluation.answers.Answers",
                "scorer": {"_target_": "vlm.evaluation.scorers.exact_match.ExactMatch"},
                **settings.pop("answers"),
            },
        }
        callbacks.pop("metrics_file", None)  # now a logger
        for name, target in NEEDED_CALLBACKS.items():
            callbacks[name] = {"_target_": f"vlm.callbacks.{target}"}
        callbacks["save"] |= settings.pop("checkpoint")
        settings["callbacks"] = callbacks
    logger = settings["logger"] or {}
    if "_target_" in logger:  # earlier versions had one logger without a name
        name = str(logger["_target_"]).rpartition(".")[2].removesuffix("Logger").lower()
        logger = {name: logger}
    settings["logger"] = {"metrics_file": {"_target_": "vlm.loggers.metrics_file.MetricsFile"}, **logger}
    return settings


def bind_named(cfg: Mapping[str, Any], group: str, derived: Mapping[str, Any] | None = None) -> dict[str, partial[Any]]:
    """The constructor calls of a group with any number of options; null removes one.

    Each gets the arguments in `derived` that its constructor has.
    """
    given = {name: options for name, options in cfg[group].items() if options is not None}
    calls = {}
    for name, options in given.items():
        if not isinstance(options, Mapping):
            raise ValueError(
                f"{group}.{name}={options} must be a mapping of options; set {group}.<name>.{name}=, or "
                f"{group}.{name}=null to remove it"
            )
        accepted = parameters(find_class(f"{group}.{name}", options.get("_target_"))) if derived else {}
        calls[name] = bind(f"{group}.{name}", options, {k: v for k, v in (derived or {}).items() if k in accepted})
    return calls


def bind_callbacks(cfg: Mapping[str, Any], derived: Mapping[str, Any]) -> dict[str, partial[Any]]:
    """The constructor calls of the callbacks, sorted by `order`, then as listed."""
    calls = bind_named(cfg, "callbacks", derived)
    return dict(sorted(calls.items(), key=lambda pair: getattr(pair[1].func, "order", 0)))


def bind_evaluators(cfg: Mapping[str, Any]) -> dict[str, partial[Any]]:
    """The constructor calls of the evaluators; their scorers are created first."""
    scorers, rest = {}, {}
    for name, options in cfg["evaluators"].items():
        rest[name] = options
        if isinstance(options, Mapping) and isinstance(options.get("scorer"), Mapping):
            scorers[name] = bind(f"evaluators.{name}.scorer", options["scorer"])()
            rest[name] = {key: value for key, value in options.items() if key != "scorer"}
    return {
        name: bind_named({"evaluators": {name: options}}, "evaluators", {"scorer": scorers.get(name)})[name]
        for name, options in rest.items()
        if options is not None
    }


def split_data(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of VLMDataModule, and those of the source."""
    names = parameters(VLMDataModule).keys()
    loader = {key: value for key, value in options.items() if key in names}
    return loader, {key: value for key, value in options.items() if key not in names}


def check_loader(name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError for an invalid option of VLMDataModule."""
    check_types(name, options, VLMDataModule)
    if augment := options.get("augment"):
        bind_class(f"{name}.augment", Augment, augment)
    bind_class(f"{name}.reading", Reading, options.get("reading") or {})


def bind_source(name: str, options: Mapping[str, Any]) -> partial[Any]:
    """The constructor call of a source without its split; the sources of a mixture are bound first."""
    if isinstance(mixed := options.get("sources"), dict):
        parts = {}
        for key, part in mixed.items():
            check_mapping(f"{name}.sources.{key}", part)
            loader, source = split_data(part)
            check_loader(f"{name}.sources.{key}", loader)
            parts[key] = bind_source(f"{name}.sources.{key}", source)
        options = {**options, "sources": parts}
    return bind(name, options, derived={"split": "train"})


def loader_option(cfg: Mapping[str, Any], option: str) -> Any:
    """The value of an option of VLMDataModule, or its default."""
    return cfg["data"].get(option, parameters(VLMDataModule)[option].default)


def precision(cfg: Mapping[str, Any]) -> str:
    """The precision of the Trainer; `auto` depends on the machine. Trainable parameters are always float32."""
    asked = str(cfg["trainer"]["precision"])
    if asked not in PRECISIONS:
        raise ValueError(f"trainer.precision={asked} is not supported; choose one of {', '.join(PRECISIONS)}")
    return native_precision(cfg["trainer"]["accelerator"]) if asked == "auto" else asked


def check_evaluation(cfg: Any) -> None:
    """Raise ValueError for an invalid option of eval.py; `check` checks its data and trainer."""
    settings: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    # Other sections may belong to the parts of the run's model.
    check_keys(
        "", {key: value for key, value in settings.items() if not isinstance(value, dict)}, {*EVALUATION, "trainer"}
    )
    check_values("", {key: value for key, value in settings.items() if key in EVALUATION}, EVALUATION)
    check_mapping("trainer", settings.get("trainer"))


def check_required(name: str, given: Mapping[str, Any], needed: Iterable[str]) -> None:
    """Raise ValueError if a section lacks a required key."""
    if missing := [key for key in sorted(needed) if key not in given]:
        raise ValueError(f"{name} lacks the option {missing[0]}; set {name}.{missing[0]}=")


def check_parent(option: str, file: str) -> None:
    """Raise ValueError if a file cannot be written because it is a folder or its folder is missing."""
    if Path(file).is_dir():
        raise ValueError(f"{option}={file} is a folder; give a file in it")
    if not Path(file).parent.is_dir():
        raise ValueError(f"{option}={file} cannot be written: there is no folder {Path(file).parent}; create it first")


def write_config(
    run_dir: Path, settings: Mapping[str, Any], choices: Mapping[str, str | None], run_id: str | None = None
) -> None:
    """Write config.yaml: the resolved settings, the chosen options, the working directory and `run_id`, signed."""
    file = run_dir / "config.yaml"
    content = OmegaConf.create({**settings, "choices": dict(choices), "cwd": os.getcwd(), "run_id": run_id})
    write(temporary_path(file), trust.signed(OmegaConf.to_yaml(content)))
    commit(file)


def read_config(
    run_dir: Path, *, given: Mapping[str, Any] | None = None, with_data: bool = False
) -> tuple[dict[str, Any], dict[str, str | None]]:
    """The settings and chosen options of a run, updated with the values `given` by the user (dotted key -> value).

    Raises ValueError if there is no config, or if the config is not the user's own and its model (with `with_data` also
    its data and evaluators) is unsafe, as in `vlm.training.trust.restrict`.
    """
    settings, choices, is_own = stored_config(run_dir)
    for key, value in (given or {}).items():
        *groups, last = key.split(".")
        inner = settings
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    if not is_own:
        sections = (*trust.model_sections(settings), *(("evaluators", "data") if with_data else ()))
        settings = trust.restrict(settings, run_dir=run_dir, sections=sections, given=given or ())
    return settings, choices


def stored_config(run_dir: Path) -> tuple[dict[str, Any], dict[str, str | None], bool]:
    """The stored settings and chosen options of a run, and whether the user's own programs wrote them."""
    settings, is_own = trust.stored_config(run_dir)
    for key in ("cwd", "run_id"):
        settings.pop(key, None)
    for folder, part, key in BASES:
        if (base := run_dir / folder).is_dir():
            settings[part][key] = str(base.absolute())
    choices = settings.pop("choices")
    return migrated(settings), choices, is_own


def given(cfg: DictConfig, sections: Iterable[str]) -> dict[str, Any]:
    """The values in some sections of a config, by full key."""
    found: Any = {section: OmegaConf.to_container(cfg[section], resolve=True) for section in sections}
    return {key: value for key, value in trust.leaves(found) if key not in found}


def selects_rows(keys: Iterable[str]) -> bool:
    """Whether some of the keys select the rows of the data, not only how they are loaded."""
    loader = {f"data.{key}" for key in parameters(VLMDataModule)} - {"data.filter"}
    return any(key.startswith("data.") and key not in loader for key in keys)


def run_id(run_dir: Path) -> str | None:
    """The unique id of a run; None for earlier versions."""
    found = trust.stored_config(run_dir)[0].get("run_id")
    return found if isinstance(found, str) else None


def enter_folder_of(run_dir: Path) -> None:
    """Change to the working directory of the user's own run, if it exists, so that its relative paths are valid."""
    stored, is_own = trust.stored_config(run_dir)
    folder = stored.get("cwd")
    if is_own and folder and Path(folder).is_dir():
        os.chdir(folder)
