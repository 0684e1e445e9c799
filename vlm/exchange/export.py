"""A trained run as a folder that Transformers reads: built, checked in a fresh process, then moved into place."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar

from vlm import build, config
from vlm.connectors.qformer import QFormer
from vlm.data.datamodule import VLMDataModule
from vlm.exchange import adapter, blip2, check, instructblip, llava, own
from vlm.exchange.processor import IMAGE_TOKEN, export_generation, export_template, export_tokenizer
from vlm.models.composed import Composed
from vlm.training import artifact, run

MERGED_TOLERANCE = 1e-4  # of the largest logit; float32 rounds differently once two matrices are merged


class Exported(NamedTuple):
    """What was written: the class of the model, whether it runs code of its folder, and how far it agrees with the run.

    `obstacles` are what the class of Transformers that is `nearest` to the model cannot hold.
    """

    kind: str
    runs_code: bool
    nearest: str
    obstacles: list[str]
    agreement: check.Agreement


def export(
    ckpt: Path,
    out: Path,
    *,
    lora: Literal["merge", "keep"] = "merge",
    dtype: Literal["float32", "bfloat16"] = "float32",
    num_samples: int = 4,
    max_new_tokens: int = 32,
    given: Mapping[str, Any] | None = None,
) -> Exported:
    """Write `out`, a folder with weights, config, processor, chat template and generation config.

    `given` are options of the run by their full key, such as where its data lies. All is computed on the CPU in
    float32. With `dtype=bfloat16` the weights are rounded first, so that the comparison is as strict.

    Raises ValueError where the run or `out` cannot be used, and Drift where the folder answers differently; nothing is
    left of it then.
    """
    ckpt, out = ckpt.absolute(), out.absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"out={out} exists and is not an empty folder; choose another one")
    manifest = artifact.read_manifest(ckpt)
    if manifest["quantization"] != "none":
        raise ValueError(
            f"ckpt={ckpt} was trained with an LLM in {manifest['quantization']}, whose weights no export writes; train "
            "with llm.quantization=none"
        )
    if added := manifest["bases"].get("llm", {}).get("added_tokens"):
        raise ValueError(
            f"ckpt={ckpt} has llm.added_tokens={added}, for which no export has a place; use the run as it is"
        )
    if lora == "keep" and not manifest["lora"]:
        raise ValueError(f"ckpt={ckpt} has no LoRA to keep apart; leave out lora=keep")
    tokens = (manifest["lora"] or {}).get("tokens", "all")
    if lora == "keep" and tokens != "all":
        raise ValueError(
            f"ckpt={ckpt} was trained with stage.lora.tokens={tokens}, which the model itself must apply; leave out "
            "lora=keep"
        )
    merged = bool(lora == "merge" and manifest["lora"] and tokens == "all")
    disable_progress_bar()
    with _opened(ckpt, given or {}) as (model, data, settings):
        kind, nearest, obstacles = _kind(ckpt, model)
        tokenizer = export_tokenizer(model.tokenizer, num_positions=model.num_positions)
        image_id: Any = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        options: dict[str, Any] = {
            "num_samples": num_samples,
            "max_new_tokens": max_new_tokens,
            "image_id": image_id,
            "with_image": kind.NEEDS_IMAGE,
        }
        expected = check.references(model, data, **options)
        if merged:
            model.llm.merge_lora()
        if dtype == "bfloat16":
            if merged:
                _check_merged(expected, check.references(model, data, **options))
            _round(model)
            expected = check.references(model, data, **options)
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as work:
            folder = Path(work) / "done"
            stop_ids = data.text.stop_ids
            unused = kind.save(
                model, settings, folder, image_id=image_id, stop_ids=stop_ids, dtype=getattr(torch, dtype)
            )
            _write_processor(model, data, folder, kind=kind, tokenizer=tokenizer, unused_ids=unused)
            kept = adapter.write(model.llm, manifest["lora"], folder, kind.language_name) if lora == "keep" else None
            checked: dict[str, Any] = {"std": model.encoder.transform.std, "max_new_tokens": max_new_tokens}
            model.to("meta")  # frees the memory for the fresh process
            agreement = check.check(folder, expected, adapter=kept, trust_remote_code=kind.RUNS_CODE, **checked)
            facts = {
                "run": str(ckpt),
                "chat_template": model.chat_template,
                "lora": kept or ("merged" if merged else "in the model" if manifest["lora"] else None),
                "dtype": dtype,
                "check": asdict(agreement),
                "code": run.provenance(),
            }
            artifact.write_json(folder / "vlm_export.json", facts)
            _share(folder)
            with contextlib.suppress(FileNotFoundError):
                out.rmdir()
            folder.rename(out)
    return Exported(kind.NAME, kind.RUNS_CODE, nearest.NAME, obstacles, agreement)


def _kind(ckpt: Path, model: Composed) -> tuple[Any, Any, list[str]]:
    """The kind that holds the model, Transformers' nearest, and what keeps it from being that."""
    nearest: Any = llava
    if isinstance(model.connector, QFormer):
        nearest = blip2 if model.connector.instructions is None else instructblip
    obstacles = list(nearest.obstacles(model))
    if (tokens := model.llm.adapted.tokens) != "all":
        obstacles.append(f"stage.lora.tokens={tokens} must be all")
    if not obstacles:
        return nearest, nearest, []
    if without := list(own.obstacles(model)):
        reasons = without if nearest is llava else obstacles
        raise ValueError(f"ckpt={ckpt} cannot be exported: {'; '.join(reasons)}; train with other options")
    return own, nearest, obstacles


@contextlib.contextmanager
def _opened(ckpt: Path, given: Mapping[str, Any]) -> Iterator[tuple[Composed, VLMDataModule, dict[str, Any]]]:
    """The model of a run in float32 on the CPU, its validation data, and its settings."""
    with contextlib.chdir("."):  # returns to this folder at the end
        settings, _ = config.read_config(ckpt, given=given, with_data=True)
        config.enter_folder_of(ckpt)
        config.check_model(settings)
        data = build.build_data(settings, None, splits=("val",))
        settings["trainer"] = {**settings["trainer"], "accelerator": "cpu", "precision": "32-true"}
        model, manifest = build.build_model(settings)
        if not isinstance(model, Composed):
            raise ValueError(f"ckpt={ckpt} is a {type(model).__name__}, and vlm-export takes model=composed only")
        artifact.load(ckpt, model=model, manifest=manifest, run_id=config.run_id(ckpt))
        build.connect_data(data, settings, model)
        yield model.eval().requires_grad_(False), data, settings


def _check_merged(before: list[check.Reference], after: list[check.Reference]) -> None:
    for one, other in zip(before, after, strict=True):
        difference, largest = float((other.logits - one.logits).abs().max()), float(one.logits.abs().max())
        if not difference <= MERGED_TOLERANCE * largest:
            raise check.Drift(
                f"merged, the LLM's logits differ by up to {difference:.3g} where the largest is {largest:.3g}; an "
                "adapter that changes tied matrices cannot be merged: set lora=keep"
            )


def _round(model: nn.Module) -> None:
    """Round all that is saved to bfloat16; it stays in float32."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.bfloat16())


def _write_processor(
    model: Composed, data: VLMDataModule, folder: Path, *, kind: Any, tokenizer: Any, unused_ids: list[int]
) -> None:
    template = export_template(data.text, own=model.chat_template is None)
    kind.processor(model, tokenizer=tokenizer, template=template).save_pretrained(folder)
    stop_ids, pad_id = data.text.stop_ids, tokenizer.pad_token_id
    export_generation(model.llm, stop_ids=stop_ids, pad_id=pad_id, unused_ids=unused_ids).save_pretrained(folder)


def _share(folder: Path) -> None:
    """Give all files the mode of a new file: safetensors writes files that only their owner can read."""
    for file in folder.rglob("*"):
        if file.is_file():
            shutil.copymode(folder / "vlm_export.json", file)
