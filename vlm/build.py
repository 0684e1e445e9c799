"""Config -> parts: the only file that knows what a config holds and makes parts of it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from vlm import trust
from vlm.architecture import from_facts
from vlm.artifact import aside, identity, put, short_hash, write
from vlm.callbacks.ema import EMA
from vlm.callbacks.save import Save
from vlm.callbacks.stop import StopOnTime
from vlm.data.augment import Augment
from vlm.data.datamodule import VLMDataModule
from vlm.data.reading import Reading
from vlm.encoders.tiles import Tiles
from vlm.llms.quantization import check_quantization
from vlm.models.base import Model
from vlm.module import VLMModule
from vlm.optim import Rate, check_rates, check_states, check_steps, round_frozen, set_trainable
from vlm.options import _constructor, bind, bind_class, fit, known, mapping, parameters, shown, typed, unknown_key
from vlm.ranges import BatchSize, Decay, Depth, Name, Number, Range, Samples, Seed, Written
from vlm.run import native_precision
from vlm.schema import VisualSpec
from vlm.sharding import check_strategy
from vlm.text.templates import TEMPLATES

RANDOM_WEIGHTS_SEED = 0  # random base models are the same in every run, as pretrained ones are
Tasks = Literal["caption", "instruct", "mixed"]
PARTS = ("encoder", "connector", "llm")  # for which every stage in conf/ has a state; a model may have others
# What belongs to no constructor: the values at the top, and the sections whose keys are read one by one.
VALUES: dict[str, Any] = {
    **{"seed": Seed, "ckpt": Name | None, "run_dir": Name, "recipe": dict[str, Any] | None},
    **dict.fromkeys(("checkpoint", "preflight", "answers", "plan", "resume"), dict[str, Any]),
}
SECTIONS: dict[str, dict[str, Any]] = {
    "preflight": {"samples": Annotated[int, Range(1, 10**6)], "show": Annotated[int, Range(0, 10**6)]},
    "answers": {
        "num_samples": Samples,
        "batch_size": BatchSize,
        "max_new_tokens": Annotated[int, Range(1, 65_536)],
    },
    "plan": {"show": bool, "json": Name | None},
    "resume": {"run": Name | None, "allow": list[Name]},
    "stage": {  # and the arguments of VLMModule
        "name": Annotated[str, Written("[^/]+", "align")],  # of a folder
        "task": Tasks,
        **dict.fromkeys(PARTS, Any),  # as `check_states` has them
        "lr": dict[str, Rate],
        "lora": dict[str, Any],
        "objective": dict[str, Any],
        "gradient_clip_val": Annotated[Number, Range(0, 10**6)] | None,
        "ema_decay": Decay | None,
    },
}
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
EVALUATION: dict[str, Any] = {  # what conf/eval.yaml has at its top
    "ckpt": Name,
    "out": Name | None,
    "num_samples": Annotated[int, Range(2, 10**8)] | None,  # images are compared
    **{key: SECTIONS["answers"][key] for key in ("batch_size", "max_new_tokens")},
    "data": dict[str, Any],
}
OPTIONAL = {
    *PARTS,
    "run",
    "allow",
    "show",
    "json",
    "gradient_clip_val",
    "ema_decay",
}  # need not be there
OF_TRAINER = {  # what every trainer here has
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "check_val_every_n_epoch": None,
    "use_distributed_sampler": False,
}
SAVED = dict.fromkeys(("run_dir", "manifest", "inherited"))  # what the checkpoint section does not say
GROUPS = ("encoder", "connector", "llm", "model", "data", "stage", "trainer", "logger", "callbacks")
NEEDED = ("encoder", "connector", "llm", "model", "data", "stage", "trainer")  # of the groups; a run has these


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config as plain dictionaries and lists."""
    settings: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    for group in GROUPS:
        if group not in settings and group in ("logger", "callbacks"):
            settings[group] = {}
        elif not isinstance(settings.get(group), dict):
            raise ValueError(f"a run cannot do without {group}; choose one of the options in conf/{group}")
    settings["connector"].pop("lr", None)  # advice to a stage, which has read it
    return settings


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
    run_dir: Path, *, given: Mapping[str, Any] | None = None, sections: Iterable[str] = (*trust.MODEL, "data")
) -> tuple[dict[str, Any], dict[str, str | None]]:
    """The settings and choices of a run, to build its model and data from, with those that the user has `given`.

    Raises ValueError where the directory holds none, or where those of `sections`, which alone are to be used, are
    somebody else's and reach beyond this code.
    """
    settings, choices, is_own = stored_config(run_dir)
    for key, value in (given or {}).items():
        *groups, last = key.split(".")
        inner = settings
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    if not is_own:
        settings = trust.restrict(settings, run_dir=run_dir, sections=tuple(sections), said=given or ())
    return settings, choices


def given(cfg: DictConfig, sections: Iterable[str]) -> dict[str, Any]:
    """The values in some sections of a config, each under its key in full."""
    found: Any = {section: OmegaConf.to_container(cfg[section], resolve=True) for section in sections}
    return {key: value for key, value in trust.leaves(found) if key not in found}


def names_rows(keys: Iterable[str]) -> bool:
    """Whether some of the keys say which rows there are, not only how they are loaded."""
    loader = {f"data.{key}" for key in parameters(VLMDataModule)} - {"data.filter"}
    return any(key.startswith("data.") and key not in loader for key in keys)


def stored_config(run_dir: Path) -> tuple[dict[str, Any], dict[str, str | None], bool]:
    """The settings and choices of a run as they are stored, and whether the user's own programs wrote them here."""
    settings, is_own = trust.stored_config(run_dir)
    for key in ("cwd", "run_id"):
        settings.pop(key, None)
    if (merged := run_dir / "llm").is_dir():  # it goes where its run goes
        settings["llm"]["pretrained"] = str(merged.absolute())
    settings["logger"] = named_loggers(settings["logger"] or {})
    return settings, settings.pop("choices"), is_own


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


def check(cfg: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the choices, where a file or the command line has a key or value that nothing takes."""
    known("", cfg, {*GROUPS, *VALUES})
    for group in NEEDED:
        if not isinstance(cfg.get(group), Mapping):
            raise ValueError(f"{group}={shown(cfg.get(group))} is not an option of this group; choose {group}=<option>")
    fit("", {key: value for key, value in cfg.items() if key in VALUES}, VALUES)
    model: Any = _constructor("model", cfg["model"].get("_target_"))
    for section, hints in SECTIONS.items():
        extra = {*model.parts, *parameters(VLMModule)} - {"model"} if section == "stage" else set()
        known(section, cfg.get(section) or {}, hints.keys() | extra)
        fit(section, cfg.get(section) or {}, hints)
        complete(section, cfg.get(section) or {}, hints.keys() - OPTIONAL)
    known("stage.lr", cfg["stage"]["lr"], {*model.parts, *PARTS})
    for part in model.parts:
        if isinstance(state := cfg["stage"].get(part), Mapping):
            fit(f"stage.{part}", state, {"last_n": Depth})
    typed("stage", {k: v for k, v in cfg["stage"].items() if k not in SECTIONS["stage"]}, VLMModule)
    check_states(cfg["stage"], model)
    check_rates(cfg["stage"], model, lr=cfg["stage"]["lr"], layer_decay=cfg["stage"].get("layer_decay"))
    bind_class("checkpoint", Save, cfg["checkpoint"], SAVED)
    if file := (cfg.get("plan") or {}).get("json"):
        existing_parent("plan.json", file)
    loader, source = split_data(cfg["data"])
    check_loader("data", loader)
    bind_source("data", source)
    encoder, tiles = split_tiles(cfg["encoder"])
    bind("encoder", encoder)
    sizes = dict.fromkeys(("vision_width", "llm_width", "grid", "output_rms"))
    connector: Any = bind("connector", cfg["connector"], derived=sizes).func
    llm = bind("llm", cfg["llm"], derived={"dtype": "float32"}).func
    if tiles.grids and connector.fusion != "tokens":
        raise ValueError(
            f"connector {connector.__name__} shows the llm one image at a time and encoder.tiles.grids="
            f"{tiles.grids} makes several of one; set encoder.tiles.grids=[] or connector=mlp"
        )
    for part in ("encoder", "llm"):
        if isinstance(facts := cfg[part].get("config"), Mapping) and "model_type" in facts:
            from_facts(facts, option=f"{part}.config")
    _check_llm(cfg, connector=connector, llm=llm)
    bind("model", cfg["model"], derived=dict.fromkeys(("encoder", "connector", "llm")))
    bind("stage.objective", cfg["stage"]["objective"])
    quantization, ema_decay = cfg["llm"].get("quantization", "none"), cfg["stage"].get("ema_decay")
    if not isinstance(strategy := cfg["trainer"].get("strategy", "auto"), str):
        bind("trainer.strategy", strategy)
    check_strategy(cfg["trainer"], quantization=quantization, ema_decay=ema_decay)
    check_steps(cfg["trainer"])
    complete("trainer", cfg["trainer"], ("_target_", "accelerator", "precision"))
    trainer = {key: value for key, value in cfg["trainer"].items() if key not in ("precision", "strategy")}
    bind("trainer", trainer, derived={**OF_TRAINER, **dict.fromkeys(("callbacks", "logger", "default_root_dir"))})
    precision(cfg)
    for group in ("callbacks", "logger"):
        mapping(group, cfg[group])
        _bind_named(cfg, group)


def named_loggers(logger: Mapping[str, Any]) -> dict[str, Any]:
    """The loggers of a run by name; one of an earlier version had a single logger, whose options were not below one."""
    if "_target_" not in logger:
        return dict(logger)
    name = str(logger["_target_"]).rpartition(".")[2].removesuffix("Logger").lower()
    return {name: dict(logger)}


def _bind_named(cfg: Mapping[str, Any], group: str) -> list[partial[Any]]:
    """The calls that make the loggers or callbacks, each of which has its options below a name; null leaves one out."""
    given = {name: options for name, options in cfg[group].items() if options is not None}
    for name, options in given.items():
        if not isinstance(options, Mapping):
            raise ValueError(
                f"{group}.{name}={options} stands where a name has options below it; write {group}.<name>.{name}=, or "
                f"{group}.{name}=null for none of that name"
            )
    return [bind(f"{group}.{name}", options) for name, options in given.items()]


def check_evaluation(cfg: Any) -> None:
    """Raise ValueError for a value of eval.py's own that it cannot use; `check` looks at its data and trainer."""
    settings: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    known("", settings, {*EVALUATION, "trainer", *PARTS})
    fit("", {key: value for key, value in settings.items() if key in EVALUATION}, EVALUATION)
    mapping("trainer", settings.get("trainer"))


def existing_parent(option: str, file: str) -> None:
    """Raise ValueError where a file cannot be written: there is no folder for it, or it is one."""
    if Path(file).is_dir():
        raise ValueError(f"{option}={file} is a folder; name a file in it")
    if not Path(file).parent.is_dir():
        raise ValueError(f"{option}={file} cannot be written: there is no folder {Path(file).parent}; make it first")


def _check_llm(cfg: Mapping[str, Any], *, connector: Any, llm: Any) -> None:
    """Raise ValueError, before anything is loaded, where connector, LLM and stage are right each and wrong together."""
    options, state = cfg["llm"], cfg["stage"]["llm"]
    if connector.fusion not in llm.fusions:
        raise ValueError(
            f"connector {connector.__name__} attaches to the layers of a decoder-only llm, but {options['pretrained']} "
            "has an encoder and a decoder; choose another llm, or a connector for its input such as connector=mlp"
        )
    quantization = options.get("quantization", "none")
    if quantization != "none" and state not in ("frozen", "lora"):
        raise ValueError(
            f"stage.llm={state} cannot train weights that llm.quantization={quantization} has rounded; "
            "set stage.llm=lora or llm.quantization=none"
        )
    check_quantization(quantization, weights=options["weights"])
    if (template := options.get("chat_template")) is not None and template not in TEMPLATES:
        raise ValueError(unknown_key(f"llm.chat_template={template}", TEMPLATES, asked=template))
    if isinstance(modules := cfg["stage"]["lora"].get("target_modules"), str):
        _check_pattern("stage.lora.target_modules", modules)
    known("stage.lora", cfg["stage"]["lora"], parameters(llm.add_lora).keys() - {"self"})
    typed("stage.lora", cfg["stage"]["lora"], llm.add_lora)


def complete(name: str, given: Mapping[str, Any], needed: Iterable[str]) -> None:
    """Raise ValueError where a section lacks a key that is read from it."""
    if missing := [key for key in sorted(needed) if key not in given]:
        raise ValueError(f"{name} lacks the option {missing[0]}; set {name}.{missing[0]}=")


def _check_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}={shown(pattern)} is no regular expression ({error}); give a list of names") from error


def _of_loader(cfg: Mapping[str, Any], option: str) -> Any:
    """The value of a loader's option, which a data file need not have."""
    return cfg["data"].get(option, parameters(VLMDataModule)[option].default)


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


def split_tiles(options: Mapping[str, Any]) -> tuple[dict[str, Any], Tiles]:
    """The options of the encoder, and the tiling around it."""
    encoder = dict(options)
    return encoder, bind_class("encoder.tiles", Tiles, encoder.pop("tiles", {}))()


def build_model(cfg: Mapping[str, Any]) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model on its pretrained bases, and the manifest that says which they are."""
    bf16, stage = "bf16" in precision(cfg), cfg["stage"]
    # What trains is loaded in float32, so that no value of it is rounded; an adapter's LLM is frozen itself.
    rounded = bf16 and stage["llm"] in ("frozen", "lora")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_WEIGHTS_SEED)
        options, tiles = split_tiles(cfg["encoder"])
        encoder = bind("encoder", options)().requires_grad_(False)
        seen = {"vision_width": encoder.width, "grid": tuple(encoder.grid)}
        with torch.device("meta"):  # what does not fit is said before the LLM is loaded
            bind("connector", cfg["connector"], {**seen, "llm_width": 64, "output_rms": 1.0})()
        llm = bind("llm", cfg["llm"], {"dtype": "bfloat16" if rounded else "float32"})().requires_grad_(False)
    llm.check_length(_of_loader(cfg, "max_length"))
    if _of_loader(cfg, "packing") and cfg["llm"]["weights"] != "meta":
        llm.check_packing()
    bases = {"encoder": identity(encoder, options), "llm": identity(llm, cfg["llm"])}
    torch.manual_seed(cfg["seed"])
    connector = bind("connector", cfg["connector"], {**seen, "llm_width": llm.width, "output_rms": llm.embed_rms})()
    model = bind("model", cfg["model"], {"encoder": encoder, "connector": connector, "llm": llm})()
    if bf16:
        round_frozen(model, stage)
    manifest = {
        "parts": {
            "connector": dict(cfg["connector"]),
            "encoder": {
                **{key: options.get(key) for key in ("_target_", "layer")},
                "image_size": list(encoder.image_size),
                "transform": asdict(encoder.transform),
                "tiles": asdict(tiles),
            },
        },
        "bases": bases,
        "quantization": cfg["llm"].get("quantization", "none"),
        "chat_template": cfg["llm"]["chat_template"]
        or f"the tokenizer's own, {short_hash(llm.tokenizer.chat_template)}",
        "num_image_tokens": placeholders(connector),
    }
    return model, manifest


def placeholders(connector: Any) -> int:
    """How many places an image takes in a row of text."""
    return connector.num_tokens if connector.fusion == "tokens" else 0


def build_data(cfg: Mapping[str, Any], model: Any, run_dir: Path | None) -> VLMDataModule:
    """The data, told what a picture and a word are to the model."""
    loader, source = split_data(cfg["data"])
    data = VLMDataModule(
        source=bind_source("data", source),
        bad_samples_file=run_dir / "bad_samples.jsonl" if run_dir else None,
        **loader,
    )
    spec = VisualSpec(
        num_tokens=placeholders(model.connector),
        image_size=model.encoder.image_size,
        transform=model.encoder.transform,
    )
    _, tiles = split_tiles(cfg["encoder"])
    if tiles.grids:
        transform, separator = tiles.around(model.encoder.transform), "\n" if tiles.row_separator else ""
        spec = replace(spec, transform=transform, tile_rows=transform.rows, row_separator=separator)
    llm, template = model.llm, cfg["llm"]["chat_template"]
    data.connect(spec=spec, tokenizer=llm.tokenizer, chat_template=template, max_answers=llm.max_answers)
    return data


def check_rows(before: Mapping[str, str], now: Mapping[str, str], remedy: str) -> None:
    """Raise ValueError where a split that both name has other rows than those of before."""
    for split, found in now.items():
        if before.get(split, found) != found:
            raise ValueError(
                f"the rows of the {split} split are not those that this run was trained with (fingerprint {found}, "
                f"then {before[split]}): annotations were edited or put in another order; restore them, or use {remedy}"
            )


def build_module(cfg: Mapping[str, Any], model: Model) -> VLMModule:
    """The training module of a stage, its trainable parameters set."""
    stage = cfg["stage"]
    set_trainable(model, {part: stage[part] for part in model.parts}, stage["lora"])
    options = {key: value for key, value in stage.items() if key in parameters(VLMModule) and key != "objective"}
    options["betas"] = tuple(options["betas"])  # YAML knows no tuples
    return VLMModule(model=model, objective=bind("stage.objective", stage["objective"])(), **options)


def build_ema(stage: Mapping[str, Any]) -> list[EMA]:
    """The callback that averages what a stage trains, where it wants one."""
    if (decay := stage.get("ema_decay")) is None:
        return []
    return [bind_class("stage", EMA, {"ema_decay": decay})()]


def build_trainer(cfg: Mapping[str, Any], run_dir: Path, extra: list[Any]) -> Any:
    """Lightning's Trainer with the configured callbacks and loggers, and `extra` callbacks."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its small talk; importing it had set INFO
    callbacks = [make() for make in _bind_named(cfg, "callbacks")]
    if (max_time := cfg["trainer"].get("max_time")) is not None:
        callbacks.append(StopOnTime(max_time=max_time))
    options = {**cfg["trainer"], "precision": precision(cfg)}
    derived = {
        "callbacks": [*callbacks, *extra],
        "logger": [make() for make in _bind_named(cfg, "logger")] or False,
        "default_root_dir": str(run_dir),
        **OF_TRAINER,
    }
    try:
        if isinstance(options.get("strategy"), dict):
            options["strategy"] = bind("trainer.strategy", options["strategy"])()
        return bind("trainer", options, derived)()
    except (MisconfigurationException, ImportError, TypeError, ValueError) as error:
        raise ValueError(_trainer_refusal(error)) from error


def _trainer_refusal(error: Exception) -> str:
    """What Lightning's Trainer says of its options, and whether it is the machine that lacks something."""
    text = " ".join(str(error).split()).rstrip(".")
    if re.search(r"backend found|can not run on your system|your machine only has|not available|not met", text):
        return (
            f"this machine cannot run this trainer: {text}{'' if text[-1:] == '!' else '.'} Choose trainer=cpu or auto"
        )
    return text if text.startswith("trainer.") else f"Lightning's Trainer refuses its options: {text}; see trainer.*"


def precision(cfg: Mapping[str, Any]) -> str:
    """The precision to compute in; `auto` asks the machine. What trains is kept in float32 with each of them."""
    asked = str(cfg["trainer"]["precision"])
    if asked not in PRECISIONS:
        raise ValueError(f"trainer.precision={asked} is not known; choose one of {', '.join(PRECISIONS)}")
    return native_precision(cfg["trainer"]["accelerator"]) if asked == "auto" else asked
