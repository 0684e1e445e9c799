"""Config -> model, data, objective, module, trainer."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from vlm.config import (
    OF_TRAINER,
    bind_callbacks,
    bind_evaluators,
    bind_named,
    bind_source,
    loader_option,
    model_class,
    precision,
    split_data,
)
from vlm.data.datamodule import VLMDataModule
from vlm.data.reading import Reading
from vlm.data.sample_reader import SampleReader
from vlm.models.base import Model
from vlm.module import VLMModule
from vlm.objectives.base import Objective
from vlm.options import bind, parameters
from vlm.ranges import NUM_STEPS
from vlm.schema import Split
from vlm.text.encode import TextEncoder
from vlm.training.artifact import short_hash
from vlm.training.optim import cast_frozen, set_trainable


def build_model(cfg: Mapping[str, Any]) -> tuple[Model, dict[str, Any]]:
    """The model with pretrained weights, and the manifest that identifies it."""
    bf16 = "bf16" in precision(cfg)
    model = model_class(cfg).build(cfg, bf16=bf16)
    model.check_rows(max_length=loader_option(cfg, "max_length"), packing=loader_option(cfg, "packing"))
    manifest = {
        **model.identity(cfg),
        "quantization": model.quantization,
        "chat_template": model.chat_template or f"the tokenizer's own, {short_hash(model.tokenizer.chat_template)}",
        "num_image_tokens": model.visual_spec().num_tokens,
    }
    if bf16:
        cast_frozen(model, cfg["stage"])
    return model, manifest


def build_data(
    cfg: Mapping[str, Any], run_dir: Path | None, *, splits: tuple[Split, ...] = ("train", "val")
) -> VLMDataModule:
    """The data, not yet connected. It needs no model, so that a missing file is reported before one loads."""
    loader, source = split_data(cfg["data"])
    return VLMDataModule(
        source=bind_source("data", source),
        bad_samples_file=run_dir / "bad_samples.jsonl" if run_dir else None,
        splits=splits,
        **loader,
    )


def connect_data(data: VLMDataModule, cfg: Mapping[str, Any], model: Model) -> VLMDataModule:
    """Connect the data to the model's VisualSpec, tokenizer and template and to the objective's form of rows."""
    objective: Any = bind("objective", cfg["objective"]).func
    data.connect(
        spec=model.visual_spec(),
        tokenizer=model.tokenizer,
        chat_template=model.chat_template,
        max_answers=model.max_answers,
        form=objective.form,
    )
    return data


def build_reader(cfg: Mapping[str, Any], model: Model) -> SampleReader:
    """Encodes conversations for the model as its data does, without that data; answers are supervised at the end."""
    spec, system_prompt = model.visual_spec(), loader_option(cfg, "system_prompt")
    text = TextEncoder(
        tokenizer=model.tokenizer,
        num_image_tokens=spec.num_tokens,
        max_length=loader_option(cfg, "max_length"),
        chat_template=model.chat_template,
        tile_rows=spec.tile_rows,
        row_separator=spec.row_separator,
        num_packed=spec.num_packed,
        image_token=spec.image_token,
        train_on="last_assistant",
        system_prompt=None if system_prompt is None else system_prompt.replace(r"\<image>", "<image>"),
    )
    return SampleReader(text=text, spec=spec, reading=Reading(**(loader_option(cfg, "reading") or {})))


def check_rows(before: Mapping[str, str], now: Mapping[str, str], remedy: str) -> None:
    """Raise ValueError if a split has other rows than before, by their fingerprints."""
    for split, found in now.items():
        if before.get(split, found) != found:
            raise ValueError(
                f"the rows of the {split} split differ from those that this run was trained on (fingerprint {found}, "
                f"before {before[split]}): annotations were edited or reordered; restore them, or use {remedy}"
            )


def build_objective(cfg: Mapping[str, Any]) -> Objective:
    """The objective of the config."""
    objective: Objective = bind("objective", cfg["objective"])()
    return objective


def build_module(cfg: Mapping[str, Any], model: Model, objective: Objective) -> VLMModule:
    """The training module of a stage; sets which parameters are trainable."""
    stage = cfg["stage"]
    set_trainable(model, {part: stage[part] for part in model.parts}, stage.get("lora") or {})
    options = {key: value for key, value in stage.items() if key in parameters(VLMModule)}
    options["betas"] = tuple(options["betas"])  # YAML has no tuples
    evaluators = {name: make() for name, make in bind_evaluators(cfg).items()}
    module = VLMModule(model=model, objective=objective, evaluators=evaluators, **options)
    module.parameter_groups()  # refuses a parameter without a learning rate before anything is read
    return module


def num_steps(cfg: Mapping[str, Any], data: VLMDataModule | None = None, *, num_ranks: int = 1) -> int:
    """The optimizer steps of a run: `trainer.max_steps`, or with `auto` those of `data.epochs`, or `NUM_STEPS`.

    The data, if they are known, must be connected.
    """
    trainer = cfg["trainer"]
    if trainer["max_steps"] != "auto":
        return int(trainer["max_steps"])
    steps = data and data.steps(batches_per_step=trainer["accumulate_grad_batches"] * num_ranks)
    return steps or NUM_STEPS


def build_trainer(cfg: Mapping[str, Any], run_dir: Path, *, max_steps: int = NUM_STEPS, **of_the_run: Any) -> Any:
    """Lightning's Trainer with the configured callbacks and loggers; `max_steps` counts where the config says auto.

    Their constructors get `run_dir`, `max_time`, `ema_decay`, `match`, `budget` and the values `of_the_run` that they
    accept.
    """
    of_the_run |= {
        "run_dir": run_dir,
        "max_time": cfg["trainer"].get("max_time"),
        **{key: (cfg.get("sweep") or {}).get(key) for key in ("match", "budget")},
        "ema_decay": (cfg.get("stage") or {}).get("ema_decay"),
    }
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # importing it sets INFO, which prints much
    options = {**cfg["trainer"], "precision": precision(cfg)}
    if options.get("max_steps") == "auto":
        options["max_steps"] = max_steps
    derived = {
        "callbacks": [make() for make in bind_callbacks(cfg, of_the_run).values()],
        "logger": [make() for make in bind_named(cfg, "logger", of_the_run).values()] or False,
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
    """The error of Lightning's Trainer, with a remedy if the machine lacks a device."""
    text = " ".join(str(error).split()).rstrip(".")
    if re.search(r"backend found|can not run on your system|your machine only has|not available|not met", text):
        return (
            f"this machine cannot run this trainer: {text}{'' if text[-1:] == '!' else '.'} Choose trainer=cpu or auto"
        )
    return text if text.startswith("trainer.") else f"Lightning's Trainer refuses its options: {text}; see trainer.*"
