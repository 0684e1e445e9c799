"""Merge an adapter into its LLM: a folder that Transformers reads, and a run whose base model it is."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from safetensors import SafetensorError
from torch import Tensor

from vlm import build, config, files
from vlm.identity import identity
from vlm.launch.entry import CONF
from vlm.launch.overrides import for_shell, override
from vlm.text.templates import resolve
from vlm.training import artifact, run, trust
from vlm.training.sharding import gather

TOLERANCE = 1e-4  # of the largest logit; float32 rounds differently once two matrices are merged


def merge(
    ckpt: Path,
    out: Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    given: Mapping[str, Any] | None = None,
) -> None:
    """Write `out/llm`, the LLM with all that was trained in it, and around it a run directory without an adapter.

    `given` are options that the user has repeated, because a run from elsewhere may not set them.

    Raises ValueError where there is nothing to merge, or the merged LLM would compute something else.
    """
    ckpt, out = ckpt.absolute(), out.absolute()
    manifest = artifact.read_manifest(ckpt)
    settings, choices = config.read_config(ckpt, given=given)
    run_id = config.run_id(ckpt)
    if not any(name.startswith("llm.") for name in manifest["tensors"]):
        raise ValueError(f"ckpt={ckpt} trained nothing in its llm, so there is nothing to merge; use it as it is")
    if manifest["quantization"] != "none":
        raise ValueError(
            f"ckpt={ckpt} was trained with an LLM in {manifest['quantization']}, and a LoRA cannot be merged into "
            "quantized weights; use it as it is"
        )
    if added := manifest["bases"].get("llm", {}).get("added_tokens"):
        raise ValueError(f"ckpt={ckpt} has llm.added_tokens={added}, which cannot be merged; use the run as it is")
    if out.exists():
        raise ValueError(f"out={out} exists already; choose another folder")
    config.enter_folder_of(ckpt)
    model = _model(ckpt, settings)
    _merge(model.llm)
    model.llm.to(getattr(torch, dtype))

    llm = {**settings["llm"], "pretrained": str(out / "llm"), "weights": "pretrained", "package": None}
    stages = [*manifest["stages"], {"name": "merge", "run": str(out), "options": {"ckpt": str(ckpt)}}]
    bases = {**manifest["bases"], "llm": {**identity(model.llm, llm), "pretrained": llm["pretrained"]}}
    kept = [name for name in manifest["tensors"] if not name.startswith("llm.")]
    rates = settings["stage"]["lr"]
    lr = {**rates, "connector": rates["connector"] or 1.0}  # a full connector needs a rate, though nothing is trained
    stage = {**settings["stage"], "llm": "frozen", "connector": "full", "lr": lr}  # for an evaluation to build
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        folder = Path(work) / "done"
        tokenizer = model.llm.tokenizer
        tokenizer.chat_template = resolve(llm["chat_template"], tokenizer)  # that of the training
        try:
            with files.named(out / "llm"):
                model.llm.model.save_pretrained(folder / "llm")
                tokenizer.save_pretrained(folder / "llm")
        except SafetensorError as error:  # a full disk
            raise ValueError(f"could not write {out / 'llm'}: {error}; nothing is left of it") from error
        artifact.save(
            folder / "artifact",
            tensors=gather(model, kept),
            manifest={**manifest, "bases": bases, "lora": None, "stages": stages, "code": run.provenance()},
            step=manifest["step"],
        )
        config.write_config(folder, {**settings, "llm": llm, "stage": stage, "run_dir": str(out)}, choices, run_id)
        for file in (folder / "llm").iterdir():
            shutil.copymode(folder / "config.yaml", file)  # safetensors writes files that only their owner can read
        folder.rename(out)
    options = [override("ckpt", str(out)), *_parts({**settings, "llm": llm}, trust.group_choices({"choices": choices}))]
    message = f"Merged run: {out}\nA next stage: python train.py {' '.join(map(for_shell, options))}"
    run.CONSOLE.print(message, soft_wrap=True, markup=False, highlight=False)


def _parts(settings: Mapping[str, Any], choices: Mapping[str, str]) -> list[str]:
    """The options of train.py that make the same parts: each group's choice, and what differs from that."""
    groups = [part for part in ("encoder", "connector", "llm", "model") if part in choices]
    options = [override(part, choices[part]) for part in groups]
    with initialize_config_dir(CONF, version_base="1.3"):
        try:
            cfg = compose("train", options)
        except HydraException:  # an option in a config folder of the user's
            return options
    usual = dict(trust.leaves({part: OmegaConf.to_container(cfg[part], resolve=True) for part in groups}))
    ours = trust.leaves({part: settings[part] for part in groups})
    changed = [(key, value) for key, value in ours if key not in usual or usual[key] != value]
    return [*options, *(override(key if key in usual else f"+{key}", value) for key, value in changed)]


def _model(ckpt: Path, settings: dict[str, Any]) -> Any:
    """The trained model in float32 on the CPU."""
    exact = {**settings["trainer"], "accelerator": "cpu", "precision": "32-true"}
    model, manifest = build.build_model({**settings, "trainer": exact})
    artifact.load(ckpt, model=model, manifest=manifest, run_id=config.run_id(ckpt))
    return model.eval()  # an adapter comes with its dropout


@torch.no_grad()
def _merge(llm: Any) -> None:
    """Merge the adapter. Raises ValueError unless the logits stay, as they do not where it changes tied matrices."""
    before = _logits(llm)
    llm.merge_lora()
    difference, largest = float((_logits(llm) - before).abs().max()), float(before.abs().max())
    if not difference <= TOLERANCE * largest:
        raise ValueError(
            f"merged, the llm's logits differ by {difference:.2g} of {largest:.2g}; an adapter that changes tied "
            "matrices cannot be merged: use the run as it is"
        )


def _logits(llm: Any) -> Tensor:
    """Those of a short answer to a short prompt."""
    positions = torch.arange(16)[None]  # 1 T, and as good ids as any
    return llm(llm.embed(positions), positions >= 0, positions, positions >= 8)  # M V
