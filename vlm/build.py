"""Config -> parts: the only file that knows what a config holds and makes parts of it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from vlm import trust
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
from vlm.optim import check_rates, check_states, check_steps, round_frozen, set_trainable
from vlm.options import _constructor, bind, bind_class, known, parameters, typed
from vlm.run import native_precision
from vlm.schema import VisualSpec
from vlm.sharding import check_strategy

RANDOM_WEIGHTS_SEED = 0  # random base models are the same in every run, as pretrained ones are
STAGE_KEYS = {
    *("name", "task", "encoder", "connector", "llm", "lr", "lora", "objective"),
    *("gradient_clip_val", "ema_decay"),
}
SECTIONS = {
    "preflight": {"samples", "show"},
    "answers": {"num_samples", "batch_size", "max_new_tokens"},
    "plan": {"show", "json"},
    "resume": {"run", "allow"},
    "stage": STAGE_KEYS,  # and the arguments of VLMModule
}
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
SAVED = dict.fromkeys(("run_dir", "manifest", "inherited"))  # what the checkpoint section does not say
GROUPS = ("encoder", "connector", "llm", "model", "data", "stage", "trainer", "logger", "callbacks")
VALUES = ("seed", "ckpt", "resume", "run_dir", "checkpoint", "preflight", "answers", "plan", "recipe")


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
    for section, keys in SECTIONS.items():
        extra = parameters(VLMModule) if section == "stage" else {}
        known(section, cfg.get(section) or {}, keys | (extra.keys() - {"model"}))
    typed(
        "stage", {k: v for k, v in cfg["stage"].items() if k in parameters(VLMModule)} | {"objective": None}, VLMModule
    )
    build_ema(cfg["stage"])
    model: Any = _constructor("model", cfg["model"].get("_target_"))
    check_states(cfg["stage"], model)
    check_rates(cfg["stage"], model, lr=cfg["stage"]["lr"], layer_decay=cfg["stage"].get("layer_decay"))
    bind_class("checkpoint", Save, cfg["checkpoint"], SAVED)
    for section in ("preflight", "answers"):
        for key, value in cfg[section].items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{section}.{key}={value!r} is not a whole number")
            if section == "answers" and value < 1:
                raise ValueError(f"answers.{key}={value} leaves nothing to answer; set it to 1 or more")
    allow = (cfg.get("resume") or {}).get("allow", [])
    if not isinstance(allow, list) or not all(isinstance(key, str) for key in allow):
        raise ValueError(f"resume.allow={allow!r} is no list of keys; write 'resume.allow=[trainer.max_steps]'")
    if (show := cfg.get("plan", {}).get("show", False)) not in (True, False):
        raise ValueError(f"plan={show!r} is neither true nor false")
    loader, source = split_data(cfg["data"])
    typed("data", loader, VLMDataModule)
    if augment := loader.get("augment"):
        bind_class("data.augment", Augment, augment)
    bind_class("data.reading", Reading, loader.get("reading") or {})
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
    _check_llm(cfg, connector=connector, llm=llm)
    bind("model", cfg["model"], derived=dict.fromkeys(("encoder", "connector", "llm")))
    bind("stage.objective", cfg["stage"]["objective"])
    quantization, ema_decay = cfg["llm"].get("quantization", "none"), cfg["stage"].get("ema_decay")
    check_strategy(cfg["trainer"], quantization=quantization, ema_decay=ema_decay)
    check_steps(cfg["trainer"])
    trainer = {**cfg["trainer"], "precision": precision(cfg)}
    if isinstance(trainer.get("strategy"), dict):
        bind("trainer.strategy", trainer.pop("strategy"))
    bind("trainer", trainer, derived={"callbacks": None, "logger": None})
    for group in ("callbacks", "logger"):
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
                f"{group}.{name}={options} stands where a name has options below it; write {group}.<name>.{name}="
            )
    return [bind(f"{group}.{name}", options) for name, options in given.items()]


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
    known("stage.lora", cfg["stage"]["lora"], parameters(llm.add_lora).keys() - {"self"})
    typed("stage.lora", cfg["stage"]["lora"], llm.add_lora)


def _of_loader(cfg: Mapping[str, Any], option: str) -> Any:
    """The value of a loader's option, which a data file need not have."""
    return cfg["data"].get(option, parameters(VLMDataModule)[option].default)


def split_data(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the loader, which every source shares, and those of the source."""
    shared = parameters(VLMDataModule).keys()
    loader = {key: value for key, value in options.items() if key in shared}
    return loader, {key: value for key, value in options.items() if key not in shared}


def bind_source(name: str, options: Mapping[str, Any]) -> partial[Any]:
    """The call that makes a split of a source; those that it mixes are bound first, each with its own options."""
    if isinstance(mixed := options.get("sources"), dict):
        parts = {key: bind_source(f"{name}.sources.{key}", split_data(part)[1]) for key, part in mixed.items()}
        options = {**options, "sources": parts}
    return bind(name, options, derived={"split": "train"})


def split_tiles(options: Mapping[str, Any]) -> tuple[dict[str, Any], Tiles]:
    """The options of the encoder, and the tiling around it."""
    encoder = dict(options)
    tiles = encoder.pop("tiles", None) or {}
    return encoder, bind_class("encoder.tiles", Tiles, tiles)()


def build_model(cfg: Mapping[str, Any]) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model on its pretrained bases, and the manifest that says which they are."""
    bf16, stage = "bf16" in precision(cfg), cfg["stage"]
    # What trains is loaded in float32, so that no value of it is rounded; an adapter's LLM is frozen itself.
    rounded = bf16 and stage["llm"] in ("frozen", "lora")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_WEIGHTS_SEED)
        options, tiles = split_tiles(cfg["encoder"])
        encoder = bind("encoder", options)().requires_grad_(False)
        llm = bind("llm", cfg["llm"], {"dtype": "bfloat16" if rounded else "float32"})().requires_grad_(False)
    llm.check_length(_of_loader(cfg, "max_length"))
    if _of_loader(cfg, "packing") and cfg["llm"]["weights"] != "meta":
        llm.check_packing()
    bases = {"encoder": identity(encoder, options), "llm": identity(llm, cfg["llm"])}
    torch.manual_seed(cfg["seed"])
    derived = {
        "vision_width": encoder.width,
        "grid": tuple(encoder.grid),
        "llm_width": llm.width,
        "output_rms": llm.embed_rms,
    }
    connector = bind("connector", cfg["connector"], derived)()
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
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": None,
        "use_distributed_sampler": False,
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
