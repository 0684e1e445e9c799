"""metrics.jsonl: one JSON object per logged step; `step` counts optimizer steps from 1."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from vlm import files
from vlm.training.dashboards import measured


class MetricsFile(Logger):
    """Appends the metrics of every logged step and every validation of a fit.

    Metrics after the fit are in metrics.json.

    Args:
        run_dir: the folder of the file.
    """

    def __init__(self, *, run_dir: Path) -> None:
        super().__init__()
        self.file = run_dir / "metrics.jsonl"
        self._fit_is_over = False

    @property
    def name(self) -> str:
        return "metrics_file"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.file.parent)

    @property
    @rank_zero_experiment
    def experiment(self) -> None:
        """None; Lightning requires the property."""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Does nothing; config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self._fit_is_over:
            return
        with files.append(self.file) as file:
            file.write(json.dumps({"step": int(step or 0), **measured(metrics)}) + "\n")

    def finalize(self, status: str) -> None:
        """Called by Lightning at the end of a fit."""
        self._fit_is_over = True
