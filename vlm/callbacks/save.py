"""Saves artifacts, and checkpoints for resuming."""

from __future__ import annotations

import os
import random
import time
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from vlm import files
from vlm.callbacks.stop import between_steps
from vlm.module import TrainingStopped
from vlm.ranges import Number, Range, Steps
from vlm.training import artifact
from vlm.training.run import CONSOLE
from vlm.training.sharding import FullyShard, gather

LAST = "last.ckpt"
SIGN = {"val/loss": -1.0, "val/visual_gain": 1.0}  # sign * metric: larger is better


class DirectCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint directly to its path; Lightning's writes it to memory and to $TMPDIR first."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with files.create(Path(path), "wb") as file:
            torch.save(checkpoint, file)


class Save(pl.Callback):
    """Writes `artifact/` and `checkpoints/last.ckpt` during a run, at its end and on a failure.

    The weights in memory are always finite: a step with a loss or gradient that is not finite stops before its update.
    A validation at the same step runs before saving.

    Args:
        every_n_steps, every_n_minutes: how often to save; None for the minutes uses the steps only.
        keep_last: number of checkpoints to keep: `last.ckpt`, then `last-1.ckpt`, ….
        best: metric; the artifact of its best validation is kept in `best/`, for `ckpt=`.
    """

    order: ClassVar[int] = 2  # after callbacks that change the weights or decide to stop

    def __init__(
        self,
        *,
        run_dir: Path,
        manifest: Mapping[str, Any],
        inherited: list[str],
        every_n_steps: Steps = 100,
        every_n_minutes: Annotated[Number, Range(above=0, most=10**6)] | None = None,
        keep_last: Annotated[int, Range(1, 1_000)] = 2,
        best: Literal["val/loss", "val/visual_gain"] | None = None,
    ) -> None:
        if every_n_steps < 1 or keep_last < 1:
            raise ValueError(
                f"callbacks.save.every_n_steps={every_n_steps} and callbacks.save.keep_last={keep_last}; "
                "set both to at least 1"
            )
        if every_n_minutes is not None and every_n_minutes <= 0:
            raise ValueError(
                f"callbacks.save.every_n_minutes={every_n_minutes}; set it above 0, or null for steps alone"
            )
        self.run_dir, self.manifest, self.inherited = run_dir, manifest, inherited
        self.every_n_steps, self.every_n_minutes, self.keep_last = every_n_steps, every_n_minutes, keep_last
        self.best, self._best_value = best, float("-inf")
        self._saved, self._time = 0, time.monotonic()
        self._rng: list[dict[str, Any]] = []  # of each rank, to be restored
        self._rng_of_ranks: list[dict[str, Any]] = []  # of each rank, to be saved

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if self._rng:  # restored here because the setup of a fit also draws random numbers
            if trainer.global_rank < len(self._rng):  # the run may have more ranks than before
                set_rng_state(self._rng[trainer.global_rank])
            self._rng = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not between_steps(trainer):
            return
        every = trainer.val_check_batch if trainer.enable_validation else None
        validates = every is not None and (trainer.fit_loop.total_batch_idx + 1) % every == 0
        if self._due(trainer) and (trainer.should_stop or not validates):
            self._save(trainer, module)

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        if self.best is not None and (value := self._best_metric(trainer)) > self._best_value:
            self._best_value = value  # before the checkpoint, which stores it
            best = self.run_dir / "best"
            if trainer.is_global_zero:
                best.mkdir(exist_ok=True)
                config = best / "config.yaml"  # first, because an artifact is not loaded without it
                artifact.write(
                    artifact.temporary_path(config), (self.run_dir / config.name).read_text(encoding="utf-8")
                )
                artifact.commit(config)
            self._save_artifact(trainer, module, best)
        if trainer.state.fn != "fit":  # a validation after the fit saves nothing
            return
        if trainer.global_step > self._saved and between_steps(trainer) and self._due(trainer):
            self._save(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.global_step > self._saved:
            self._save(trainer, module)

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        if trainer.global_step == self._saved or isinstance(exception, artifact.SaveError):
            return
        on_all_ranks = isinstance(
            exception, TrainingStopped
        )  # raised on all ranks, which save a sharded model together
        if not on_all_ranks and isinstance(trainer.strategy, FullyShard):
            return
        # A run cannot resume within a step, but after its last one, to repeat the validation that has failed.
        in_last_validation = trainer.validating and trainer.global_step == trainer.max_steps
        save_checkpoint = in_last_validation and trainer.world_size == 1  # other ranks may not be here
        try:
            if save_checkpoint:
                self._save(trainer, module)
            else:
                self._save_artifact(trainer, module, self.run_dir)
        except artifact.SaveError as error:
            print(error)  # the first error is raised
        else:
            if trainer.is_global_zero:
                resume = "; resume= repeats the last validation" if save_checkpoint else ""
                print(f"The weights of step {trainer.global_step} are saved in {self.run_dir / 'artifact'}{resume}")
        if on_all_ranks:
            trainer.strategy.barrier()  # the first rank to exit would kill the others

    def state_dict(self) -> dict[str, Any]:
        identity = {key: self.manifest.get(key) for key in ("run", "data")}
        return {"rng": self._rng_of_ranks, "best": (self.best, self._best_value), **identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rng, (name, value) = state_dict["rng"], state_dict["best"]
        if name == self.best:  # another metric cannot be compared
            self._best_value = value

    def _best_metric(self, trainer: pl.Trainer) -> float:
        """The metric `best`, larger is better; a validation without it is never the best."""
        assert self.best is not None
        return SIGN[self.best] * float(trainer.callback_metrics.get(self.best, -SIGN[self.best] * float("inf")))

    def _due(self, trainer: pl.Trainer) -> bool:
        step = trainer.global_step
        if trainer.should_stop or step == trainer.max_steps or step % self.every_n_steps == 0:
            return True
        if self.every_n_minutes is None:
            return False
        late = time.monotonic() - self._time >= 60 * self.every_n_minutes
        return trainer.strategy.broadcast(late)  # clocks differ between ranks

    def _save(self, trainer: pl.Trainer, module: Any) -> None:
        self._saved = trainer.global_step
        self._save_artifact(trainer, module, self.run_dir)
        self._rng_of_ranks = [{}] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(self._rng_of_ranks, rng_state())
        else:
            self._rng_of_ranks = [rng_state()]
        file = self.run_dir / "checkpoints" / LAST
        file.parent.mkdir(exist_ok=True)
        trainer.strategy.checkpoint_io = DirectCheckpointIO()
        try:
            trainer.save_checkpoint(artifact.temporary_path(file))
            if trainer.is_global_zero:
                artifact.flush(artifact.temporary_path(file))  # before an older one is deleted
                for number in range(self.keep_last - 1, 0, -1):
                    if (newer := _numbered(file, number - 1)).exists():
                        os.replace(newer, _numbered(file, number))
                os.replace(artifact.temporary_path(file), file)
        except (OSError, RuntimeError) as error:
            artifact.temporary_path(file).unlink(missing_ok=True)
            raise artifact.SaveError(
                f"could not write {file} at step {trainer.global_step}: {_root_cause(error)}; the artifact is saved"
            ) from error
        self._time = time.monotonic()

    def _save_artifact(self, trainer: pl.Trainer, module: Any, folder: Path) -> None:
        names = artifact.trained_names(module.model, self.inherited)
        with module.weights_to_save():
            tensors = gather(module.model, names)  # with all ranks
            own = [name for name, _ in module.objective.named_parameters()]
            tensors |= {artifact.OBJECTIVE + name: each for name, each in gather(module.objective, own).items()}
        if trainer.is_global_zero:
            artifact.save(folder / "artifact", tensors=tensors, manifest=self.manifest, step=trainer.global_step)


def _root_cause(error: BaseException) -> BaseException:
    """The OSError behind an error of PyTorch's writer, if any."""
    context = error.__context__
    return error if isinstance(error, OSError) or context is None else _root_cause(context)


def rng_state() -> dict[str, Any]:
    """State of the random number generators of this process."""
    name, keys, *rest = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore the random number generators from `rng_state`."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def newest_checkpoint(run_dir: Path, run: Mapping[str, Any] | None = None) -> tuple[Path, int] | None:
    """The newest readable checkpoint and its step; None if the run has no checkpoint.

    Damaged newer checkpoints are renamed; otherwise the next save would delete the readable one. Raises ValueError if
    all checkpoints are damaged, or if one belongs to another run than `run`.
    """
    file = run_dir / "checkpoints" / LAST
    found = sorted(file.parent.glob("last*.ckpt"), key=lambda path: (len(path.name), path.name))
    damaged = []
    for path in found:
        try:
            if not path.is_file():
                raise OSError("it is not a regular file")
            if part := zipfile.ZipFile(path).testzip():  # verifies the checksums, which torch.load does not
                raise OSError(f"wrong checksum of {part}")
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            step, saved_run = content["global_step"], _saved(content).get("run")
            for name, tensor in content["state_dict"].items():
                if num := artifact.num_not_finite(tensor):
                    raise OSError(f"{num:,} of the {tensor.numel():,} values of {name} are NaN or infinite")
        except Exception as error:  # a truncated file can raise any error
            damaged.append((path, " ".join(str(error).split())[:80]))
            continue
        if run and saved_run and run["id"] != saved_run["id"]:
            _refuse(path, saved_run, run)
        for broken, reason in damaged:
            renamed = broken.with_name(f"damaged-{broken.name}")
            CONSOLE.print(
                f"{broken} cannot be read ({reason}); it is renamed to {renamed.name}, and "
                f"the run resumes from step {step}",
                soft_wrap=True,
                markup=False,
            )
            with suppress(FileNotFoundError):  # another rank was faster
                os.replace(broken, renamed)
        return path, step
    if found:
        first, reason = damaged[0]
        raise ValueError(
            f"no checkpoint in {file.parent} can be read ({first.name}: {reason}); start a new run with ckpt={run_dir}"
        )
    return None


def data_of(checkpoint: Path) -> dict[str, str]:
    """The fingerprints of the data of a checkpoint's run; empty for earlier versions."""
    return _saved(torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)).get("data") or {}


def _saved(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The state of this callback in a checkpoint."""
    return checkpoint["callbacks"].get(Save.__name__, {})


def _refuse(path: Path, saved_run: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Raise ValueError with the differences between the run of a checkpoint and `run`."""
    differences = [
        f"its {key} is {saved_run.get(key)}, here it is {run[key]}" for key in run if saved_run.get(key) != run[key]
    ]
    raise ValueError(
        f"{path} is of another run: {', '.join(map(artifact.files.escape_controls, differences))}; put the run's own "
        f"checkpoint there, or start a new run with ckpt={path.parents[1]}"
    )


def _numbered(file: Path, number: int) -> Path:
    return file.with_name(f"last-{number}.ckpt") if number else file
