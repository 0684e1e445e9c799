"""A run directory around weights that another program has trained: config, artifact and base models."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from vlm import build, config
from vlm.models.composed import Composed
from vlm.training import artifact, run

TOLERANCE = 1e-3  # of the largest logit


@dataclass(frozen=True)
class Imported:
    """What was read from elsewhere.

    Attributes:
        options: of train.py, for the same parts; base models lie in the folder of the run.
        tensors: the trained ones, by their names in the model.
        logits: a function of `(pixel_values [N,3,H,W], ids [T], image_mask [T], logits_mask [T])` that computes logits
            [M, V] at the positions of `logits_mask`, the last ones, as the program that trained them does; None where
            there is none to compare with.
        instruction: ids [1, L] that `logits` gives to the Q-Former.
        keeps_first: prefixes of tensors that are not in `tensors` and keep the values with which they are built.
    """

    options: dict[str, Any]
    tensors: dict[str, Tensor]
    logits: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = field(default=None)
    instruction: Tensor | None = None
    keeps_first: tuple[str, ...] = ()


def write_run(
    out: Path,
    read: Callable[[Path], Imported],
    compose: Callable[[Mapping[str, Any]], tuple[dict[str, Any], dict[str, str | None]]],
    *,
    source: str,
) -> float | None:
    """Write the run directory `out` of what `read` reads; it may write base models into the folder that it is given.

    `compose` gives the settings and choices of train.py with some options, and `source` says where weights are from.
    Returns the largest difference of the logits, as a fraction of the largest logit; None where they were not compared.

    Raises ValueError where tensors do not fit the parts, or the logits differ.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"out={out} exists and is not an empty folder; choose another one")
    disable_progress_bar()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        folder = Path(work) / "done"
        folder.mkdir()
        imported = read(folder)
        settings, choices = compose({**imported.options, "run_dir": str(out)})
        config.check_model(settings)
        model, manifest = build.build_model(settings)
        assert isinstance(model, Composed)
        tensors = _load(model, imported, source)
        difference = None if imported.logits is None else _compare(model.eval(), imported, source)
        stages = [{"name": "import", "run": str(out), "options": {"from": source}}]
        facts = {**_moved(manifest, folder, out), "lora": None, "stages": stages, "code": run.provenance()}
        artifact.save(folder / "artifact", tensors=tensors, manifest=facts, step=0)
        config.write_config(folder, _moved(settings, folder, out), choices)
        for file in folder.rglob("*.safetensors"):  # written for their owner alone
            shutil.copymode(folder / "config.yaml", file)
        with contextlib.suppress(FileNotFoundError):
            out.rmdir()
        folder.rename(out)
    return difference


def _load(model: Composed, imported: Imported, source: str) -> dict[str, Tensor]:
    """Copy all tensors of the connector, and of tokens that are added to the LLM, and return them.

    Raises ValueError where one is missing, superfluous or of another shape.
    """
    new = ("connector.", "llm.added_tokens.")
    expected = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(new)}
    first = {name: tensor for name, tensor in expected.items() if name.startswith(imported.keeps_first or ("\0",))}
    tensors = {**first, **imported.tensors}
    for name in sorted({*expected, *tensors}):
        ours, theirs = (tuple(found[name].shape) if name in found else None for found in (expected, tensors))
        if ours != theirs:
            raise ValueError(
                f"{source} does not fit these parts: {name} has shape {theirs or 'none'}, here {ours or 'none'}; "
                "choose the encoder, connector and LLM that it was trained with"
            )
    model.load_state_dict(tensors, strict=False)
    return tensors


@torch.no_grad()
def _compare(model: Composed, imported: Imported, source: str) -> float:
    """The largest difference of the logits of a random image and text, as a fraction of the largest logit."""
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(1, 3, *model.encoder.image_size, generator=generator)
    num = model.connector.num_tokens
    ids = torch.randint(3, len(model.tokenizer) - 1, (num + 12,), generator=generator)  # T
    image_mask = torch.zeros(num + 12, dtype=torch.bool)  # T
    image_mask[4 : 4 + num] = True
    asked = () if imported.instruction is None else (imported.instruction, imported.instruction >= 0)
    visual = model.connector(model.encoder(pixel_values), *asked)  # 1 K D
    embeds = model.llm.embed(ids)[None].masked_scatter(image_mask[None, :, None], visual)  # 1 T D
    positions = torch.arange(len(ids))[None]  # 1 T
    logits_mask = positions >= 4 + num  # 1 T
    ours = model.llm(embeds, positions >= 0, positions, logits_mask)  # M V
    assert imported.logits is not None
    theirs = imported.logits(pixel_values, ids, image_mask, logits_mask[0])  # M V
    difference, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
    if not difference <= TOLERANCE * largest:
        raise ValueError(
            f"imported, the logits of {source} differ by up to {difference:.3g} where the largest is {largest:.3g} "
            f"({TOLERANCE:.0e} of that is allowed); nothing is written"
        )
    return difference / largest


def _moved(value: Any, before: Path, after: Path) -> Any:
    """The value with each path in the folder `before` as it is in `after`."""
    if isinstance(value, Mapping):
        return {key: _moved(each, before, after) for key, each in value.items()}
    if isinstance(value, list):
        return [_moved(each, before, after) for each in value]
    return value.replace(str(before), str(after)) if isinstance(value, str) else value
