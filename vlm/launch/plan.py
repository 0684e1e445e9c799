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
from vlm.launch import probe, suggest
from vlm.launch.against import compared
from vlm.launch.probe import without_weights
from vlm.ranges import Number
from vlm.training import artifact, run

# Bytes a weight that bitsandbytes quantizes. NF4 adds to its half byte a scale of 8 bits for every 64 weights, and to
# these one of 32 bits for every 256 (double quantization, arXiv 2305.14314).
QUANTIZED = {"int8": 1.0, "nf4": (4 + 8 / 64 + 32 / (64 * 256)) / 8}


def wanted(cfg: DictConfig) -> bool:
    return any(OmegaConf.select(cfg, f"plan.{key}") for key in ("show", "json", "memory_gb"))


def plan(cfg: DictConfig) -> None:
    """Print the plan of a run, and write it where `plan.json` says. Raises ValueError with `plan.against`."""
    if cfg.plan.against:
        raise ValueError(
            f"plan.against={cfg.plan.against} compares a run with its plan, but plan=true, plan.json and "
            "plan.memory_gb start no run; leave out plan.against, or leave out the others"
        )
    for key in OmegaConf.missing_keys(cfg):
        if key.startswith("data."):  # a plan needs no data: the source's refusal of these words is shown
            OmegaConf.update(cfg, key, "not given")
    settings = config.plain(cfg)
    config.check(without_weights(settings))
    model, objective = build_meta(settings)
    report, remark = describe(settings, model)
    memory = settings["plan"].get("memory_gb")
    if settings["plan"].get("probe", True):
        add_prediction(report, settings, model)
        if memory is not None and "error" not in report["probe"]:
            add_suggestions(report, settings, memory)
    elif memory is not None:
        raise ValueError(f"plan.memory_gb={memory} needs a probe of the activations; leave out plan.probe=false")
    hydra = HydraConfig.get().runtime
    counts = run.count_parameters(model, objective) | report["parts"]
    run.print_parts(counts, hydra.choices, settings["stage"], decayed=model.layer_decay_part)
    run.CONSOLE.print(render(report, remark))
    if "suggestions" in report:
        _print_suggestions(report)
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
    tokens, steps, remark = _read_samples(settings, model)
    parts = run.count_parameters(model)
    for part, counts in parts.items():
        if published := getattr(getattr(model, part), "published_size", None):
            counts |= {"total": published(), "loaded": counts["total"]}
    spec = model.visual_spec()
    per_image = spec.max_packed or model.num_visual_tokens * spec.max_tiles
    report = {
        "precision": config.precision(settings),
        "parts": parts,
        "visual_tokens_per_image": per_image,
        "visual_tokens_per_tile": model.num_visual_tokens,
        "tokens_per_sample": sum(tokens) / len(tokens) if tokens else None,
        "tokens_of_longest_sample": max(tokens) if tokens else None,
        "steps": steps,
        "memory_gb": _memory_gb(settings, model),
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
        report["probe"] = {"error": "there are no data to take a step with; data=shapes gives a first estimate"}
        return
    memory = report["memory_gb"]
    try:
        found = _probe(settings, model, tokens=tokens)
    except RuntimeError as error:
        report["probe"] = {"error": str(error)}
        return
    memory["activations"] = found.activations_gb
    memory["total"] = memory.pop("total") + found.activations_gb  # the last row
    steps = report["steps"]
    report |= {
        "peak_memory_gb": found.peak_memory_gb,
        "step_seconds": found.step_seconds,
        "fit_seconds": steps * found.step_seconds,
        "probe": {
            "device": probe.device(),
            "measured": [asdict(each) for each in found.probes],
        },
        "settings": {section: settings[section] for section in compared(settings)},
    }


def _probe(
    settings: Mapping[str, Any], model: Any, *, tokens: float, num_timed: int = probe.TIMED_STEPS
) -> probe.Prediction:
    """The probe of a model on the meta device, with so many tokens per sample."""

    def held_gb(depth: int | None) -> float:
        if depth is None:
            return _memory_gb(settings, model)["total"]
        shallow = type(model).with_depth(settings, depth)
        return _memory_gb(shallow, build_meta(shallow)[0])["total"]

    data = settings["data"]
    per_row = data["max_length"] if data["packing"] else tokens
    return probe.probe(
        settings,
        held_gb=held_gb,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        tokens_per_batch=data["batch_tokens"] if data["batching"] == "tokens" else per_row * data["batch_size"],
        depth=type(model).depth(settings),
        num_timed=num_timed,
    )


def _memory_gb(settings: Mapping[str, Any], model: Any) -> dict[str, float]:
    averaged = settings["stage"].get("ema_decay") is not None
    return memory_gb(model, quantization=model.quantization, averaged=averaged)


def add_suggestions(report: dict[str, Any], settings: Mapping[str, Any], gpu_gb: Number) -> None:
    """Add to a report which options fit into the memory of a GPU.

    A row is as long as the longest of the samples that were read, because the longest batch decides.
    """
    settings = suggest.for_gpu(settings)
    data, longest = settings["data"], report["tokens_of_longest_sample"]
    by_tokens = data["batching"] == "tokens"  # then a batch is counted in tokens, and one row must fit
    per_row = 1 if by_tokens else data["max_length"] if data["packing"] else longest

    def measure(options: dict[str, Any]) -> suggest.Way:
        changed = suggest.with_options(settings, options)
        config.check(without_weights(changed))
        model, _ = build_meta(changed)
        held = _memory_gb(changed, model)["total"]
        if held > (1 - suggest.RESERVE) * gpu_gb:
            return suggest.Way(options, held_gb=held, row_gb=0.0)  # not even without activations
        found = _probe(changed, model, tokens=report["tokens_per_sample"], num_timed=0)
        last = found.probes[-1]
        row_gb = found.batch_gb * last.rows / last.positions * per_row
        return suggest.Way(options, held_gb=held, row_gb=row_gb, update_gb=found.update_gb)

    size = probe.size_of_batch(settings)
    try:
        found, smallest = suggest.suggest(
            list(suggest.changes(settings)),
            measure,
            rows_option=f"data.{size}",
            rows=data[size],
            least_rows=longest if by_tokens else 1,
            accumulate_grad_batches=settings["trainer"]["accumulate_grad_batches"],
            memory_gb=gpu_gb,
        )
    except RuntimeError as error:
        report["suggestions"] = {"error": str(error)}
        return
    report["suggestions"] = {
        "gpu_gb": gpu_gb,
        "precision": config.precision(settings),
        "fitting": [asdict(each) for each in found],
        "smallest": asdict(smallest),
    }


def _print_suggestions(report: Mapping[str, Any]) -> None:
    found = report["suggestions"]
    if "error" in found:
        run.CONSOLE.print(f"There are no suggestions, because the probe failed: {found['error']}", soft_wrap=True)
        return
    gpu = f"a GPU of {found['gpu_gb']:g} GB, of which {suggest.RESERVE:.0%} stay free"
    if found["fitting"]:
        run.CONSOLE.print(f"Options that fit into {gpu}; the first changes the training least:", soft_wrap=True)
        table = Table()
        table.add_column("memory", justify="right", no_wrap=True)
        table.add_column("options")
        for each in found["fitting"]:
            table.add_row(f"{each['memory_gb']:,.2f} GB", " ".join(each["options"]) or "as they are")
        run.CONSOLE.print(table)
    else:
        least = found["smallest"]
        options = " ".join(least["options"]) or "the options as they are"
        run.CONSOLE.print(
            f"Nothing fits into {gpu}: the smallest way takes at least {least['memory_gb']:,.2f} GB, with {options}; "
            "choose a smaller llm, fewer visual tokens or a smaller data.max_length",
            soft_wrap=True,
        )
    run.CONSOLE.print(
        f"These numbers are counted tensors at precision {found['precision']}, with rows of "
        f"{report['tokens_of_longest_sample']:,} tokens (the longest sample read); longer rows need more.",
        soft_wrap=True,
    )


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
        total = str(timedelta(seconds=round(report["fit_seconds"])))
        table.add_row(f"time for {report['steps']:,} steps", total, "without validations")
    return table


def _measured(probes: Sequence[Mapping[str, Any]]) -> str:
    """What the probe ran."""
    last = probes[-1]
    depths = [str(each["depth"]) for each in probes if each["depth"] is not None]
    what = f"models of {' and '.join(depths)} blocks" if depths else "the model"
    weights = "random weights" if last["weights"] == "random" else "its own weights"
    rows = f", {last['rows']:.0%} of a batch" if last["rows"] < 1 else ""
    return f"mean of {last['steps']} steps here, {what} with {weights}{rows}"


def _read_samples(settings: Mapping[str, Any], model: Any) -> tuple[list[int], int, str]:
    """Tokens of some training samples, visual ones included, the optimizer steps on one device, and a remark.

    Without data there are no tokens, and the remark says why.
    """
    tokenizer = model.use_local_tokenizer(settings)
    try:
        data = build.build_data(settings, None)
        max_length, data.max_length = data.max_length, 10**9  # a row too long for training also counts
        build.connect_data(data, settings, model)
        report, _ = data.preflight(num_samples=settings["preflight"]["samples"], show=0)
    except (ValueError, OSError) as error:
        return [], build.num_steps(settings), str(error)
    data.max_length = max_length
    steps = build.num_steps(settings, data)
    return report.tokens, steps, f"mean of {len(report.tokens)} samples, with {tokenizer}"
