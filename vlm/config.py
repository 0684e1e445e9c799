"""Read and check configs: which keys exist, which types they have, what a run's own config says. Makes no part."""

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
from vlm.options import bind, bind_class, find_class, fit, known, mapping, parameters, shown, typed
from vlm.ranges import BatchSize, Decay, Depth, Name, Number, Range, Seed, Written
from vlm.renamed import refuse_renamed, rename
from vlm.training import trust
from vlm.training.artifact import aside, put, write
from vlm.training.optim import Rate, check_lora, check_rates, check_states, check_steps
from vlm.training.run import native_precision
from vlm.training.sharding import check_strategy

MANY = ("evaluators", "callbacks", "logger")  # groups of which a run has any number of options, each below a name
NEEDED = ("model", "objective", "data", "stage", "trainer")  # groups of which it has one, beside its model's parts
# What belongs to no constructor: the values at the top, and the sections whose keys are read one by one.
VALUES: dict[str, Any] = {
    **{"seed": Seed, "ckpt": Name | None, "run_dir": Name, "recipe": dict[str, Any] | None},
    **dict.fromkeys(("preflight", "plan", "resume"), dict[str, Any]),
}
SECTIONS: dict[str, dict[str, Any]] = {
    "preflight": {"samples": Annotated[int, Range(1, 10**6)], "show": Annotated[int, Range(0, 10**6)]},
    "plan": {"show": bool, "json": Name | None},
    "resume": {"run": Name | None, "allow": list[Name]},
}
STAGE: dict[str, Any] = {  # beside the states of the model's parts and the arguments of VLMModule
    "name": Annotated[str, Written("[^/]+", "align")],  # of a folder
    "task": Literal["caption", "instruct", "mixed"],
    "lr": dict[str, Rate],
    "lora": dict[str, Any],
    "gradient_clip_val": Annotated[Number, Range(0, 10**6)] | None,
    "ema_decay": Decay | None,
}
OPTIONAL = {"run", "allow", "show", "json", "task", "lora", "gradient_clip_val", "ema_decay"}  # need not be there
EVALUATION: dict[str, Any] = {  # what conf/eval.yaml has at its top
    "ckpt": Name,
    "out": Name | None,
    "num_samples": Annotated[int, Range(2, 10**8)] | None,  # images are compared
    "batch_size": BatchSize,
    "max_new_tokens": MaxNewTokens,
    "data": dict[str, Any],
}
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
OF_TRAINER = {  # what every trainer here has
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "check_val_every_n_epoch": None,
    "use_distributed_sampler": False,
}
# What a callback or logger is given where its constructor takes it.
OF_THE_RUN = dict.fromkeys(("run_dir", "max_time", "ema_decay", "manifest", "inherited"))
NEEDED_CALLBACKS = {  # which runs of an earlier version had without saying so
    "save": "save.Save",
    "ema": "ema.EMA",
    "stop_on_time": "stop.StopOnTime",
    "configured_rates": "rates.ConfiguredRates",
}


def model_class(cfg: Mapping[str, Any]) -> type[Model]:
    """The class of the model that a config names. Raises ValueError where it names none."""
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
            raise ValueError(f"a run cannot do without {group}; choose one of the options in conf/{group}")
    for part in model_class(settings).groups(settings):
        if isinstance(settings[part], dict):
            settings[part].pop("lr", None)  # advice to a stage, which has read it
    return settings


def check(cfg: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the choices, where a file or the command line has a key or value that nothing takes."""
    for group in NEEDED:
        if not isinstance(cfg.get(group), Mapping):
            raise ValueError(f"{group}={shown(cfg.get(group))} is not an option of this group; choose {group}=<option>")
    model = model_class(cfg)
    refuse_renamed(cfg)
    known("", cfg, {*NEEDED, *MANY, *model.parts, *VALUES})
    for part in model.groups(cfg):
        if not isinstance(cfg[part], Mapping):
            raise ValueError(f"{part}={shown(cfg[part])} is not an option of this group; choose {part}=<option>")
    fit("", {key: value for key, value in cfg.items() if key in VALUES}, VALUES)
    for section, hints in SECTIONS.items():
        known(section, cfg.get(section) or {}, hints)
        fit(section, cfg.get(section) or {}, hints)
        complete(section, cfg.get(section) or {}, hints.keys() - OPTIONAL)
    _check_stage(cfg["stage"], model)
    if file := (cfg.get("plan") or {}).get("json"):
        existing_parent("plan.json", file)
    loader, source = split_data(cfg["data"])
    check_loader("data", loader)
    bind_source("data", source)
    model.check(cfg)
    if (adapted := model.lora_part()) is not None:
        complete("stage", cfg["stage"], ("lora",))
        check_lora(cfg["stage"]["lora"], find_class(adapted, cfg[adapted]["_target_"]))
    objective: Any = bind("objective", cfg["objective"]).func
    check_capabilities(f"objective={objective.__name__}", objective.needs, model)
    for group in MANY:
        mapping(group, cfg[group])
    for name, make in bind_evaluators(cfg).items():
        check_capabilities(f"evaluators.{name}", make.func.needs, model)  # type: ignore[attr-defined]
    _check_trainer(cfg)
    bind_callbacks(cfg, OF_THE_RUN)
    bind_named(cfg, "logger", OF_THE_RUN)


def _check_stage(stage: Mapping[str, Any], model: type[Model]) -> None:
    arguments = parameters(VLMModule).keys() - {"model", "objective", "evaluators"}
    known("stage", stage, {*STAGE, *model.parts, *arguments})
    fit("stage", stage, STAGE)
    complete("stage", stage, STAGE.keys() - OPTIONAL)
    known("stage.lr", stage["lr"], {*model.parts, "objective"})
    for part in model.parts:
        if isinstance(state := stage.get(part), Mapping):
            fit(f"stage.{part}", state, {"last_n": Depth})
    typed("stage", {key: value for key, value in stage.items() if key not in STAGE}, VLMModule)
    check_states(stage, model)
    check_rates(stage, model, lr=stage["lr"], layer_decay=stage.get("layer_decay"))


def _check_trainer(cfg: Mapping[str, Any]) -> None:
    trainer = cfg["trainer"]
    if not isinstance(strategy := trainer.get("strategy", "auto"), str):
        bind("trainer.strategy", strategy)
    quantization = next((part["quantization"] for part in cfg.values() if _is_quantized(part)), "none")
    check_strategy(trainer, quantization=quantization, ema_decay=cfg["stage"].get("ema_decay"))
    check_steps(trainer)
    complete("trainer", trainer, ("_target_", "accelerator", "precision"))
    options = {key: value for key, value in trainer.items() if key not in ("precision", "strategy")}
    bind("trainer", options, derived={**OF_TRAINER, **dict.fromkeys(("callbacks", "logger", "default_root_dir"))})
    precision(cfg)


def _is_quantized(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("quantization", "none") != "none"


def migrated(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run of an earlier version in the form of today; others as they are."""
    settings = rename(settings)
    strategy = settings["trainer"].get("strategy")
    if isinstance(strategy, dict) and strategy.get("_target_") == "vlm.sharding.FullyShard":  # its module of before
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
        callbacks.pop("metrics_file", None)  # a logger now
        for name, target in NEEDED_CALLBACKS.items():
            callbacks[name] = {"_target_": f"vlm.callbacks.{target}"}
        callbacks["save"] |= settings.pop("checkpoint")
        settings["callbacks"] = callbacks
    logger = settings["logger"] or {}
    if "_target_" in logger:  # a single one, whose options were not below a name
        name = str(logger["_target_"]).rpartition(".")[2].removesuffix("Logger").lower()
        logger = {name: logger}
    settings["logger"] = {"metrics_file": {"_target_": "vlm.loggers.metrics_file.MetricsFile"}, **logger}
    return settings


def bind_named(cfg: Mapping[str, Any], group: str, derived: Mapping[str, Any] | None = None) -> dict[str, partial[Any]]:
    """The calls that make the options of a group of which a run has any number; null leaves one out.

    Each is given those of `derived` that its constructor takes.
    """
    given = {name: options for name, options in cfg[group].items() if options is not None}
    calls = {}
    for name, options in given.items():
        if not isinstance(options, Mapping):
            raise ValueError(
                f"{group}.{name}={options} stands where a name has options below it; write {group}.<name>.{name}=, or "
                f"{group}.{name}=null for none of that name"
            )
        taken = parameters(find_class(f"{group}.{name}", options.get("_target_"))) if derived else {}
        calls[name] = bind(f"{group}.{name}", options, {k: v for k, v in (derived or {}).items() if k in taken})
    return calls


def bind_callbacks(cfg: Mapping[str, Any], derived: Mapping[str, Any]) -> dict[str, partial[Any]]:
    """The calls that make the callbacks, in the order in which they are to be called: by `order`, then as listed."""
    calls = bind_named(cfg, "callbacks", derived)
    return dict(sorted(calls.items(), key=lambda pair: getattr(pair[1].func, "order", 0)))


def bind_evaluators(cfg: Mapping[str, Any]) -> dict[str, partial[Any]]:
    """The calls that make the evaluators; a scorer, which has options of its own, is made for the one that has it."""
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
    """The options of the loader, which every source shares, and those of the source."""
    shared = parameters(VLMDataModule).keys()
    loader = {key: value for key, value in options.items() if key in shared}
    return loader, {key: value for key, value in options.items() if key not in shared}


def check_loader(name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option of the loader that it cannot use."""
    typed(name, options, VLMDataModule)
    if augment := options.get("augment"):
        bind_class(f"{name}.augment", Augment, augment)
    bind_class(f"{name}.reading", Reading, options.get("reading") or {})


def bind_source(name: str, options: Mapping[str, Any]) -> partial[Any]:
    """The call that makes a split of a source; those that it mixes are bound first, each with its own options."""
    if isinstance(mixed := options.get("sources"), dict):
        parts = {}
        for key, part in mixed.items():
            mapping(f"{name}.sources.{key}", part)
            loader, source = split_data(part)
            check_loader(f"{name}.sources.{key}", loader)
            parts[key] = bind_source(f"{name}.sources.{key}", source)
        options = {**options, "sources": parts}
    return bind(name, options, derived={"split": "train"})


def of_loader(cfg: Mapping[str, Any], option: str) -> Any:
    """The value of a loader's option, which a data file need not have."""
    return cfg["data"].get(option, parameters(VLMDataModule)[option].default)


def precision(cfg: Mapping[str, Any]) -> str:
    """The precision to compute in; `auto` asks the machine. What trains is kept in float32 with each of them."""
    asked = str(cfg["trainer"]["precision"])
    if asked not in PRECISIONS:
        raise ValueError(f"trainer.precision={asked} is not known; choose one of {', '.join(PRECISIONS)}")
    return native_precision(cfg["trainer"]["accelerator"]) if asked == "auto" else asked


def check_evaluation(cfg: Any) -> None:
    """Raise ValueError for a value of eval.py's own that it cannot use; `check` looks at its data and trainer."""
    settings: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    # A section that is not among them may be that of a part of the run's model.
    known("", {key: value for key, value in settings.items() if not isinstance(value, dict)}, {*EVALUATION, "trainer"})
    fit("", {key: value for key, value in settings.items() if key in EVALUATION}, EVALUATION)
    mapping("trainer", settings.get("trainer"))


def complete(name: str, given: Mapping[str, Any], needed: Iterable[str]) -> None:
    """Raise ValueError where a section lacks a key that is read from it."""
    if missing := [key for key in sorted(needed) if key not in given]:
        raise ValueError(f"{name} lacks the option {missing[0]}; set {name}.{missing[0]}=")


def existing_parent(option: str, file: str) -> None:
    """Raise ValueError where a file cannot be written: there is no folder for it, or it is one."""
    if Path(file).is_dir():
        raise ValueError(f"{option}={file} is a folder; name a file in it")
    if not Path(file).parent.is_dir():
        raise ValueError(f"{option}={file} cannot be written: there is no folder {Path(file).parent}; make it first")


def write_config(
    run_dir: Path, settings: Mapping[str, Any], choices: Mapping[str, str | None], run_id: str | None = None
) -> None:
    """config.yaml: the resolved settings, which option each group had, and the folder that relative paths are from.

    `run_id` is what the run's checkpoints and artifact carry too.
    """
    file = run_dir / "config.yaml"
    content = OmegaConf.create({**settings, "choices": dict(choices), "cwd": os.getcwd(), "run_id": run_id})
    write(aside(file), trust.signed(OmegaConf.to_yaml(content)))
    put(file)


def read_config(
    run_dir: Path, *, given: Mapping[str, Any] | None = None, with_data: bool = False
) -> tuple[dict[str, Any], dict[str, str | None]]:
    """The settings and choices of a run, to build its model from, with those that the user has `given`.

    Raises ValueError where the directory holds none, or where those of the model, and of its data and evaluators if
    they are to be used too, are somebody else's and reach beyond this code.
    """
    settings, choices, is_own = stored_config(run_dir)
    for key, value in (given or {}).items():
        *groups, last = key.split(".")
        inner = settings
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    if not is_own:
        used = (*trust.of_model(settings), *(("evaluators", "data") if with_data else ()))
        settings = trust.restrict(settings, run_dir=run_dir, sections=used, said=given or ())
    return settings, choices


def stored_config(run_dir: Path) -> tuple[dict[str, Any], dict[str, str | None], bool]:
    """The settings and choices of a run as they are stored, and whether the user's own programs wrote them here."""
    settings, is_own = trust.stored_config(run_dir)
    for key in ("cwd", "run_id"):
        settings.pop(key, None)
    if (merged := run_dir / "llm").is_dir():  # it goes where its run goes
        settings["llm"]["pretrained"] = str(merged.absolute())
    choices = settings.pop("choices")
    return migrated(settings), choices, is_own


def given(cfg: DictConfig, sections: Iterable[str]) -> dict[str, Any]:
    """The values in some sections of a config, each under its key in full."""
    found: Any = {section: OmegaConf.to_container(cfg[section], resolve=True) for section in sections}
    return {key: value for key, value in trust.leaves(found) if key not in found}


def names_rows(keys: Iterable[str]) -> bool:
    """Whether some of the keys say which rows there are, not only how they are loaded."""
    loader = {f"data.{key}" for key in parameters(VLMDataModule)} - {"data.filter"}
    return any(key.startswith("data.") and key not in loader for key in keys)


def run_id(run_dir: Path) -> str | None:
    """What tells a run from all others; None for one of an earlier version."""
    found = trust.stored_config(run_dir)[0].get("run_id")
    return found if isinstance(found, str) else None


def enter_folder_of(run_dir: Path) -> None:
    """Go where the user's own run was started, if that is here, so that its relative paths mean what they meant."""
    stored, is_own = trust.stored_config(run_dir)
    folder = stored.get("cwd")
    if is_own and folder and Path(folder).is_dir():
        os.chdir(folder)
