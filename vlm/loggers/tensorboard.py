"""TensorBoard: curves, and answers with their images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from vlm.training.dashboards import AnsweredSample, measured


class TensorBoard(TensorBoardLogger):
    """Lightning's logger, with the answers of every validation as a text, and their images once."""

    _has_images = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(measured(metrics), step)

    @rank_zero_only
    def log_samples(self, samples: Sequence[AnsweredSample], step: int) -> None:
        """Log a table under Text; its numbers are those of the images `samples/<number>` under Images."""
        rows = ["| | prompt | prediction | reference | score |", "|---|---|---|---|---|"]
        for number, sample in enumerate(samples, start=1):
            cells = (sample.prompt, sample.prediction, sample.reference, f"{sample.score:.2f}")
            rows.append(f"| {number} | {' | '.join(map(_cell, cells))} |")
        self.experiment.add_text("samples", "\n".join(rows), step)
        if not self._has_images:  # they stay the same
            for number, sample in enumerate(samples, start=1):
                for image in sample.images:
                    self.experiment.add_image(f"samples/{number}", np.asarray(image), step, dataformats="HWC")
        self._has_images = True


def _cell(text: str) -> str:
    r"""A text as a cell of a Markdown table, in which a line break and \| would end it."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
