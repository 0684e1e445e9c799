"""Weights & Biases: curves, answers with their images, the config, and the artifact of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from vlm.ranges import Name
from vlm.training.dashboards import AnsweredSample, measured
from vlm.training.run import CONSOLE


class Wandb(WandbLogger):
    """A run of W&B. Without a key it is recorded offline, and a line names the command that uploads it.

    Args:
        save_dir: folder of W&B's local files.
        project, name, id, group, tags: of the run in W&B; `id` decides which run a resumed run continues.
        offline: whether to record without a network; None: only if there is no key. The environment variable
            WANDB_MODE takes precedence over None.
        upload_artifact: store the run's artifact in W&B at its end.
        options: further arguments of `wandb.init`.
    """

    def __init__(
        self,
        *,
        save_dir: Name,
        project: Name = "vlm",
        name: Name | None = None,
        id: Name | None = None,
        group: Name | None = None,
        tags: list[Name] | None = None,
        offline: bool | None = None,
        upload_artifact: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(save_dir=save_dir, project=project, name=name, id=id, group=group, tags=tags, **options)
        self._wandb_init.pop("anonymous", None)  # W&B warns about it
        if "WANDB_SWEEP_ID" in os.environ:  # W&B's agent has chosen both, and W&B warns about others
            self._wandb_init |= {"project": None, "id": None}
        self.offline, self.upload_artifact = offline, upload_artifact

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of W&B, which starts at the first use."""
        if self._experiment is not None:
            return self._experiment
        if wandb.run is not None:  # an earlier job of a sweep has failed; otherwise this run would be logged there
            wandb.run.finish(exit_code=1)
        has_key = self.offline is not None or "WANDB_MODE" in os.environ or wandb.login(prompt=False, verify=False)
        if self.offline or not has_key:
            self._wandb_init |= {"mode": "offline"}
            self._wandb_init.setdefault("settings", {"silent": True})
        run = super().experiment
        if not has_key:
            folder = Path(run.dir).parent
            line = f"W&B has no key, so the run is recorded offline; upload it with: wandb sync {folder}"
            CONSOLE.print(line, soft_wrap=True)
        return run

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(measured(metrics), step)

    @rank_zero_only
    def log_samples(self, samples: Sequence[AnsweredSample], step: int) -> None:
        """Log the answers as the table `val/samples`, with a column for each image."""
        num_images = max(len(sample.images) for sample in samples)
        columns = ["id", *(f"image {number}" for number in range(1, num_images + 1))]
        table = wandb.Table(columns=[*columns, "prompt", "prediction", "reference", "score"])
        for sample in samples:
            images = [wandb.Image(image) for image in sample.images]
            missing = [None] * (num_images - len(images))
            texts = (sample.prompt, sample.prediction, sample.reference)
            table.add_data(sample.id, *images, *missing, *texts, sample.score)
        self.experiment.log({"val/samples": table, "trainer/global_step": step})

    @rank_zero_only
    def log_trained(self, folder: Path, metadata: Mapping[str, Any]) -> None:
        """Store the folder as an artifact of type `model`, named after the run's id."""
        if self.upload_artifact:
            artifact = wandb.Artifact(f"run-{self.experiment.id}", type="model", metadata=dict(metadata))
            for file in sorted(folder.iterdir()):
                # Otherwise W&B would copy the weights into its own folders, also offline.
                artifact.add_file(str(file), policy="immutable", skip_cache=True)
            self.experiment.log_artifact(artifact)
