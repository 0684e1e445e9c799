"""`data.feature_cache`: whether a run keeps the features of a frozen part of its model on disk, and why."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from vlm.llms.gguf import cache_folder
from vlm.ranges import Number
from vlm.schema import hashed
from vlm.training.artifact import class_path
from vlm.training.feature_store import Costs, FeatureStore
from vlm.training.run import CONSOLE
from vlm.training.sharding import FullyShard

MAX_RATIO = 0.2  # of the free disk that `auto` fills
MIN_SECONDS = 60  # that `auto` saves


@dataclass(frozen=True)
class Estimate:
    """What caching costs and saves in a run.

    Args:
        epochs: how often the run reads each training image.
        num_images: training images; a tile counts as an image.
        held: ratio of them whose features are stored already.
        image_bytes: bytes of the features of an image.
        costs: seconds per image; None if they were not measured.
        free: free bytes on the disk.
        num_ranks: processes that share the work.
    """

    epochs: Number
    num_images: Number
    held: Number
    image_bytes: int
    costs: Costs | None = None
    free: Number = float("inf")
    num_ranks: int = 1

    @property
    def num_new(self) -> float:
        """Images to encode."""
        return min(1.0, self.epochs) * self.num_images * (1 - self.held)

    @property
    def pays_after(self) -> float | None:
        """Epochs after which caching has taken as much time as it has saved; None if it never does."""
        if self.costs is None:
            return None
        gain = self.costs.encode - self.costs.load
        return (1 - self.held) * (gain + self.costs.store) / gain if gain > 0 else None

    @property
    def seconds_saved(self) -> float:
        if self.costs is None:
            return 0.0
        encode, store, load = self.costs
        reads = self.epochs * self.num_images
        cached = self.num_new * (encode + store) + (reads - self.num_new) * load
        return (reads * encode - cached) / self.num_ranks

    def objection(self) -> str | None:
        """Why `auto` does not cache, or None."""
        if self.num_new * self.image_bytes > MAX_RATIO * self.free:
            return (
                f"the features need {self.num_new * self.image_bytes / 1e9:,.2f} GB, more than {MAX_RATIO:.0%} of the "
                f"free {self.free / 1e9:,.0f} GB"
            )
        if self.seconds_saved < MIN_SECONDS:
            return f"it would save {self.seconds_saved:,.0f} s, less than {MIN_SECONDS} s"
        return None

    def __str__(self) -> str:
        megabytes = min(1.0, self.epochs) * self.num_images * self.image_bytes / 1e6
        size = f"{megabytes / 1000:,.2f} GB" if megabytes >= 1000 else f"{megabytes:,.1f} MB"
        pays = "it never pays, because reading takes as long as encoding"
        if self.held == 1:
            pays = "it pays from the start"
        elif self.pays_after is not None:
            pays = f"it pays after {self.pays_after:.1f} epochs"
        return f"{size} of features, {self.held:.0%} of them stored; {self.epochs:.2g} epochs, {pays}"


class FeatureCache(pl.Callback):
    """Sets `model.feature_cache` where `data.feature_cache` says so and the features of `model.feature_part` allow it.

    Rank 0 decides for all. A resumed run keeps the decision of its checkpoint, because cached features are rounded.
    """

    def __init__(self, *, manifest: Mapping[str, Any]) -> None:
        self.manifest = manifest
        self._is_on: bool | None = None
        self._store: FeatureStore | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"is_on": self._is_on}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._is_on = state_dict["is_on"]

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        data, model = trainer.datamodule, module.model
        if getattr(data, "feature_cache", "off") == "off":
            return
        decision = self._decide(trainer, model) if trainer.is_global_zero else None
        self._is_on, why = trainer.strategy.broadcast(decision)
        CONSOLE.print(f"perf: cache={'on' if self._is_on else 'off'}: {why}", soft_wrap=True)
        if not self._is_on:
            self._store = None
            return
        model.feature_cache = self._store = self._store or self._open(trainer, model)
        data.with_keys = True

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        self._flush()

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        self._flush()

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        if self._store is not None:
            self._store.max_unflushed = 0  # no hook follows the evaluation after the fit
        self._flush()

    def _flush(self) -> None:
        if self._store is not None:
            self._store.flush()

    def _decide(self, trainer: Any, model: Any) -> tuple[bool, str]:
        """Whether the run caches features, and why."""
        data = trainer.datamodule
        if (reason := _bypass(trainer, model)) is not None:
            return False, reason
        if self._is_on is not None:
            return self._is_on, "as before this run was resumed"
        is_auto = data.feature_cache == "auto"
        epochs = data.epochs_of(trainer.max_steps * trainer.accumulate_grad_batches * trainer.world_size)
        self._store = self._open(trainer, model)
        if is_auto and epochs <= 1 and not len(self._store):
            return False, "the run reads at most one epoch, so no image twice, and no features are stored"
        samples = data.some_image_keys()
        keys = [key for of_sample in samples for key in of_sample]
        if not keys:
            return False, f"none of {len(samples)} samples has an image"
        estimate = Estimate(
            epochs=epochs,
            num_images=len(data.splits["train"]) * len(keys) / len(samples),
            held=sum(key in self._store for key in keys) / len(keys),
            image_bytes=self._store.image_bytes,
            num_ranks=trainer.world_size,
        )
        if is_auto or estimate.held < 1:
            try:
                with trainer.precision_plugin.forward_context():
                    costs = self._store.measure(trainer.strategy.root_device)
                estimate = replace(estimate, costs=costs, free=shutil.disk_usage(self._store.folder).free)
            except OSError as error:
                return False, f"{self._store.folder} cannot be written ({error.strerror})"
        objection = estimate.objection() if is_auto else None
        return objection is None, f"{objection or self._store.folder} ({estimate})"

    def _open(self, trainer: Any, model: Any) -> FeatureStore:
        folder = store_folder(model, self.manifest, precision=trainer.precision)
        return FeatureStore(folder=folder, encoder=getattr(model, model.feature_part))


def store_folder(model: Any, manifest: Mapping[str, Any], *, precision: str) -> Path:
    """The folder for the features of a model's `feature_part` with its weights and options, at a precision."""
    name = model.feature_part
    part = getattr(model, name)
    identity = {
        "weights": weights_hash(part),
        "class": class_path(part),
        "options": manifest["parts"].get(name),
        "config": manifest["bases"].get(name, {}).get("config"),
        "precision": precision,
        "libraries": {library: version(library) for library in ("timm", "transformers")},  # they hold the forward pass
    }
    number = hashed(json.dumps(identity, sort_keys=True, default=str))
    return cache_folder() / "features" / f"{type(part).__name__}-{number}"


def _bypass(trainer: Any, model: Any) -> str | None:
    """Why the features of a model cannot be cached, or None."""
    if (part := model.feature_part) is None:
        return f"{type(model).__name__} has no part whose features can be cached"
    if any(parameter.requires_grad for parameter in getattr(model, part).parameters()):
        return f"the {part} is trained (stage.{part})"
    if trainer.datamodule.augment is not None:
        return "data.augment changes an image each time it is read"
    if isinstance(trainer.strategy, FullyShard):
        return "trainer.strategy shards the model, so all ranks must run it equally often"
    return None


def weights_hash(module: nn.Module) -> str:
    """A hash of all parameters and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
