"""Saves what a run leaves behind: the artefact, and a checkpoint that holds what resuming will need."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from vlm import artifact


class Save(pl.Callback):
    """Writes `artifact/` and `checkpoints/last.ckpt` every `every_n_steps` steps, at the end and on a failure.

    The weights in memory are always those of a good step: a step that is not finite stops before its update.
    """

    def __init__(self, *, run_dir: Path, manifest: Mapping[str, Any], inherited: list[str], every_n_steps: int) -> None:
        self.run_dir, self.manifest, self.inherited = run_dir, manifest, inherited
        self.every_n_steps, self._saved = every_n_steps, 0

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > self._saved and trainer.global_step % self.every_n_steps == 0:
            self._save(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.global_step > self._saved:
            self._save(trainer, module)

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        if trainer.global_step > self._saved and not isinstance(exception, artifact.SaveError):
            self._save(trainer, module)

    def _save(self, trainer: pl.Trainer, module: Any) -> None:
        step = self._saved = trainer.global_step
        names = artifact.trained_names(module.model, self.inherited)
        if trainer.is_global_zero:
            artifact.save(self.run_dir / "artifact", model=module.model, manifest=self.manifest, names=names, step=step)
        file = self.run_dir / "checkpoints" / "last.ckpt"
        file.parent.mkdir(exist_ok=True)
        try:
            trainer.save_checkpoint(file.with_suffix(".tmp"))
            if trainer.is_global_zero:
                os.replace(file.with_suffix(".tmp"), file)
        except (OSError, RuntimeError) as error:
            file.with_suffix(".tmp").unlink(missing_ok=True)
            raise artifact.SaveError(
                f"could not write {file} at step {step}: {error}; the artefact is saved"
            ) from error
