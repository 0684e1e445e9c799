"""`plan=true`: sizes, memory and time of a run before it starts; nothing is downloaded and nothing is written.

Every part is built on PyTorch's meta device, where a tensor is a shape and a type: so sizes can be counted. Memory of
activations and seconds of a step are measured (vlm/launch/probe.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from torch import nn

from vlm import build, config
from vlm.launch import probe
from vlm.launch.against import compared
from vlm.launch.probe import without_weights
from vlm.training import artifact, run

# Bytes a weight that bitsandbytes quantizes. NF4 adds to its half byte a scale of 8 bits for every 64 weights, and to
# these one of 32 bits for every 256 (double quantization, arXiv 2305.14314).
QUANTIZED = {"int8": 1.0, "nf4": (4 + 8 / 64 + 32 / (64 * 256)) / 8}


def wanted(cfg: DictConfig) -> bool:
    return bool(OmegaConf.select(cfg, "plan.show") or OmegaConf.select(cfg, "plan.json"))


def plan(cfg: DictConfig) -> None:
    """Print the plan of a run, and write it where `plan.json` says."""
    for key in OmegaConf.missing_keys(cfg):
        if key.startswith("data."):  # a plan needs no data: the source's refusal of these words is shown
            OmegaConf.update(cfg, key, "not given")
    settings = config.plain(cfg)
    config.check(without_weights(settings))
    model, objective = build_meta(settings)
    report, remark = describe(settings, model)
    if settings["plan"].get("probe", True):
        add_prediction(report, settings, model)
    hydra = HydraConfig.get().runtime
    counts = run.count_parameters(model, objective) | report["parts"]
    run.print_parts(counts, hydra.choices, settings["stage"], decayed=model.layer_decay_part)
    run.CONSOLE.print(render(report, remark))
    if error := report.get("probe", {}).get("error"):
        run.CONSOLE.print(f"Neither activations nor seconds were measured: {error}", soft_wrap=True)
    if settings["plan"]["json"]:
        artifact.write_json(Path(settings["plan"]["json"]), report)
    with suppress(OSError):  # one with something in it
        Path(hydra.output_dir).rmdir()  # Hydra made this folder, but a plan writes nothing into it


def build_meta(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """Model and objective on the meta device as the stage would train them, types and trainable state set."""
    model, objective = probe.parts_on_meta(settings)
    with torch.device("meta"):
        build.build_module(settings, model, objective)
    return model, objective


def describe(settings: Mapping[str, Any], model: Any) -> tuple[dict[str, Any], str]:
    """The plan as JSON takes it, and a remark on how `tokens_per_sample` was measured.

    The total of a part is that of the published model; `loaded` of it are held in memory and run. Where images are
    tiled, `visual_tokens_per_image` is the most that an image can have.
    """
    tokens, remark = _tokens_per_sample(settings, model)
    parts = run.count_parameters(model)
    for part, counts in parts.items():
        if published := getattr(getattr(model, part), "published_size", None):
            counts |= {"total": published(), "loaded": counts["total"]}
    per_image = model.num_visual_tokens * model.visual_spec().max_tiles
    report = {
        "precision": config.precision(settings),
        "parts": parts,
        "visual_tokens_per_image": per_image,
        "visual_tokens_per_tile": model.num_visual_tokens,
        "tokens_per_sample": tokens,
        "memory_gb": memory_gb(
            model,
            quantization=model.quantization,
            averaged=settings["stage"].get("ema_decay") is not None,
        ),
    }
    return report, remark


def memory_gb(model: Any, *, quantization: str, averaged: bool = False) -> dict[str, float]:
    """Gigabytes (10⁹ bytes) that training holds beside activations, on one device without sharding."""
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    if quantization != "none":
        linear = (m for layer in model.blocks(model.lora_part()) for m in layer.modules() if isinstance(m, nn.Linear))
        for weight in (m.weight for m in linear if not m.weight.requires_grad):  # those of an adapter are trained
            stored += weight.numel() * (QUANTIZED[quantization] - weight.element_size())
    held = {"weights": stored, "gradients": trained, "optimizer_states": probe.ADAMW_STATES * trained}
    if averaged:
        held["average"] = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    return {name: size / probe.GB for name, size in {**held, "total": sum(held.values())}.items()}


def add_prediction(report: dict[str, Any], settings: Mapping[str, Any], model: Any) -> None:
    """Add what the probe measured to a report: memory with activations, the peak, and seconds; else why it could not.

    `settings` are stored with it, for the run that is compared with this plan.
    """
    if (tokens := report["tokens_per_sample"]) is None:
        report["probe"] = {"error": "there are no data to take a step with"}
        return
    data, memory = settings["data"], report["memory_gb"]
    tokens_per_batch = data["max_length"] if data["packing"] else tokens
    tokens_per_batch = data["batch_tokens"] if data["batching"] == "tokens" else tokens_per_batch * data["batch_size"]
    try:
        found = probe.probe(
            settings,
            held_gb=memory["total"],
            num_parameters=sum(counts.get("loaded", counts["total"]) for counts in report["parts"].values()),
            tokens_per_batch=tokens_per_batch,
            depth=type(model).depth(settings),
        )
    except RuntimeError as error:
        report["probe"] = {"error": str(error)}
        return
    memory["activations"] = found.activations_gb
    memory["total"] = memory.pop("total") + found.activations_gb  # the last row
    steps = settings["trainer"]["max_steps"]
    report |= {
        "peak_memory_gb": found.peak_memory_gb,
        "step_seconds": found.step_seconds,
        "fit_seconds": steps * found.step_seconds if steps > 0 else None,
        "probe": {
            "device": probe.device(),
            "measured": [asdict(each) for each in found.probes],
        },
        "settings": {section: settings[section] for section in compared(settings)},
    }


def render(report: Mapping[str, Any], remark: str) -> Table:
    table = Table(title=f"Plan at precision {report['precision']}, for one device")
    table.add_column("quantity")
    table.add_column("value", justify="right")
    table.add_column("remark")
    tokens = report["tokens_per_sample"]
    for part, counts in report["parts"].items():
        if (loaded := counts.get("loaded", counts["total"])) != counts["total"]:
            table.add_row(f"{part}: loaded and run", f"{loaded:,}", f"of {counts['total']:,} parameters")
    visual, per_tile = report["visual_tokens_per_image"], report["visual_tokens_per_tile"]
    most = f"at most: {visual // per_tile} tiles of {per_tile:,}" if visual != per_tile else ""
    table.add_row("visual tokens per image", f"{visual:,}", most)
    table.add_row("tokens per sample", "unknown" if tokens is None else f"{tokens:,.0f}", remark)
    for name, size in report["memory_gb"].items():
        without = name == "total" and "activations" not in report["memory_gb"]
        table.add_row(f"memory: {name.replace('_', ' ')}", f"{size:,.3f} GB", "without activations" if without else "")
    if "peak_memory_gb" in report:
        device, measured = report["probe"]["device"], report["probe"]["measured"]
        whose = f"of the {device.upper()}" if device != "cpu" else "of the process, with its libraries"
        table.add_row("peak memory", f"{report['peak_memory_gb']:,.3f} GB", whose)
        table.add_row("seconds per step", f"{report['step_seconds']:,.3f}", _measured(measured))
        if report["fit_seconds"] is not None:
            table.add_row(
                "time for all steps", str(timedelta(seconds=round(report["fit_seconds"]))), "without validations"
            )
    return table


def _measured(probes: Sequence[Mapping[str, Any]]) -> str:
    """What the probe ran."""
    last = probes[-1]
    depths = [str(each["depth"]) for each in probes if each["depth"] is not None]
    what = f"models of {' and '.join(depths)} blocks" if depths else "the model"
    weights = "random weights" if last["weights"] == "random" else "its own weights"
    rows = f", {last['rows']:.0%} of a batch" if last["rows"] < 1 else ""
    return f"mean of {last['steps']} steps here, {what} with {weights}{rows}"


def _tokens_per_sample(settings: Mapping[str, Any], model: Any) -> tuple[float | None, str]:
    """Mean tokens of some training samples, visual ones included, and with which tokenizer; None if there are none."""
    tokenizer = model.use_local_tokenizer(settings)
    data = {**settings["data"], "max_length": 10**9}  # a row too long for training also counts
    try:
        module = build.connect_data(build.build_data({**settings, "data": data}, None), settings, model)
        report, _ = module.preflight(num_samples=settings["preflight"]["samples"], show=0)
    except (ValueError, OSError) as error:
        return None, str(error)
    return sum(report.tokens) / len(report.tokens), f"mean of {len(report.tokens)} samples, with {tokenizer}"
