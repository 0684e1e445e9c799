"""Vision-language models of encoder, connector and LLM. `vlm.load` opens a trained run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from vlm.inference import TrainedModel


def load(
    run_dir: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    overrides: Mapping[str, Any] | None = None,
) -> TrainedModel:
    """The model of a run directory, ready to answer questions; `vlm.inference.load` explains the arguments."""
    from vlm.inference import load  # imported here, because it takes seconds

    return load(run_dir, device=device, dtype=dtype, overrides=overrides)
