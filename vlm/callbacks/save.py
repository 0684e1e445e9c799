"""Saves what a run leaves behind: the artifact, and checkpoints that hold all that resuming needs."""

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
BETTER = {"val/loss": -1.0, "val/visual_gain": 1.0}  # the sign that makes more of it better


class StraightToDisk(TorchCheckpointIO):
    """Writes a checkpoint to its path; Lightning's own makes it in memory, and then once more in $TMPDIR."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with files.create(Path(path), "wb") as file:
            torch.save(checkpoint, file)


class Save(pl.Callback):
    """Writes `artifact/` and `checkpoints/last.ckpt` as a run goes on, at its end and on a failure.

    The weights in memory are always those of a good step: a step that is not finite stops before its update. Where a
    validation is due after a step, it comes first.

    Args:
        every_n_steps, every_n_minutes: when to save; None for the minutes looks at the steps alone.
        keep_last: how many checkpoints to keep: `last.ckpt`, and before it `last-1.ckpt`, ….
        best: keep the artifact of the validation with the best figure of that name under `best/`, which `ckpt=` takes.
    """

    order: ClassVar[int] = 2  # after all that has a part in the weights and in the decision to stop

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
                "set both to 1 or more"
            )
        if every_n_minutes is not None and every_n_minutes <= 0:
            raise ValueError(
                f"callbacks.save.every_n_minutes={every_n_minutes}; set it above 0, or null for steps alone"
            )
        self.run_dir, self.manifest, self.inherited = run_dir, manifest, inherited
        self.every_n_steps, self.every_n_minutes, self.keep_last = every_n_steps, every_n_minutes, keep_last
        self.best, self._best_value = best, float("-inf")
        self._saved, self._time = 0, time.monotonic()
        self._rng: list[dict[str, Any]] = []  # of each rank, to take up again
        self._rng_of_ranks: list[dict[str, Any]] = []  # at the save in progress

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if self._rng:  # setting up a fit draws numbers too, so this is the first moment that is not too early
            if trainer.global_rank < len(self._rng):  # there may be more ranks than before
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
        if self.best is not None and (value := self._figure(trainer)) > self._best_value:
            self._best_value = value  # before the checkpoint, which remembers it
            best = self.run_dir / "best"
            if trainer.is_global_zero:
                best.mkdir(exist_ok=True)
                config = best / "config.yaml"  # first, for an artifact is not taken without it
                artifact.write(artifact.aside(config), (self.run_dir / config.name).read_text(encoding="utf-8"))
                artifact.put(config)
            self._save_artifact(trainer, module, best)
        if trainer.state.fn != "fit":  # the last validation of a run follows it
            return
        if trainer.global_step > self._saved and between_steps(trainer) and self._due(trainer):
            self._save(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.global_step > self._saved:
            self._save(trainer, module)

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        if trainer.global_step == self._saved or isinstance(exception, artifact.SaveError):
            return
        together = isinstance(exception, TrainingStopped)  # all ranks raise it, and save a sliced model together
        if not together and isinstance(trainer.strategy, FullyShard):
            return
        try:
            self._save_artifact(trainer, module, self.run_dir)  # in the middle of a step nothing can be resumed
        except artifact.SaveError as error:
            print(error)  # what went wrong first is raised
        else:
            if trainer.is_global_zero:
                print(f"The weights of step {trainer.global_step} are saved in {self.run_dir / 'artifact'}")
        if together:
            trainer.strategy.barrier()  # the first rank to end would take the others with it

    def state_dict(self) -> dict[str, Any]:
        identity = {key: self.manifest.get(key) for key in ("run", "data")}
        return {"rng": self._rng_of_ranks, "best": (self.best, self._best_value), **identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rng, (name, value) = state_dict["rng"], state_dict["best"]
        if name == self.best:  # a figure of another name is no measure
            self._best_value = value

    def _figure(self, trainer: pl.Trainer) -> float:
        """The larger the better; a validation without the figure is never the best."""
        assert self.best is not None
        return BETTER[self.best] * float(trainer.callback_metrics.get(self.best, -BETTER[self.best] * float("inf")))

    def _due(self, trainer: pl.Trainer) -> bool:
        step = trainer.global_step
        if trainer.should_stop or step == trainer.max_steps or step % self.every_n_steps == 0:
            return True
        if self.every_n_minutes is None:
            return False
        late = time.monotonic() - self._time >= 60 * self.every_n_minutes
        return trainer.strategy.broadcast(late)  # clocks differ, and all ranks save or none

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
        trainer.strategy.checkpoint_io = StraightToDisk()
        try:
            trainer.save_checkpoint(artifact.aside(file))
            if trainer.is_global_zero:
                artifact.flush(artifact.aside(file))  # before an older one is given up for it
                for number in range(self.keep_last - 1, 0, -1):
                    if (newer := _numbered(file, number - 1)).exists():
                        os.replace(newer, _numbered(file, number))
                os.replace(artifact.aside(file), file)
        except (OSError, RuntimeError) as error:
            artifact.aside(file).unlink(missing_ok=True)
            raise artifact.SaveError(
                f"could not write {file} at step {trainer.global_step}: {_of_disk(error)}; the artifact is saved"
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


def _of_disk(error: BaseException) -> BaseException:
    """What the disk said; PyTorch's writer trips over it and says where it stood itself."""
    said = error.__context__
    return error if isinstance(error, OSError) or said is None else _of_disk(said)


def rng_state() -> dict[str, Any]:
    """Where this process's random numbers stand."""
    name, keys, *rest = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Go on drawing where `rng_state` stood."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def newest_checkpoint(run_dir: Path, run: Mapping[str, Any] | None = None) -> tuple[Path, int] | None:
    """The newest checkpoint that is whole, and its step; None where a run has saved none yet.

    Those that are not whole make way for it: they are renamed, or the next save would give it up for them. Raises
    ValueError where there are some and none is whole, or where one is not of the run with the identity `run`.
    """
    file = run_dir / "checkpoints" / LAST
    found = sorted(file.parent.glob("last*.ckpt"), key=lambda path: (len(path.name), path.name))
    damaged = []
    for path in found:
        try:
            if not path.is_file():
                raise OSError("it is not a regular file")
            if part := zipfile.ZipFile(path).testzip():  # reads all of it, which torch.load takes as it is
                raise OSError(f"wrong checksum of {part}")
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            step, theirs = content["global_step"], _saved(content).get("run")
            for name, tensor in content["state_dict"].items():
                if num := artifact.num_not_finite(tensor):
                    raise OSError(f"{num:,} of the {tensor.numel():,} values of {name} are NaN or infinite")
        except Exception as error:  # a file cut off anywhere makes the reader trip over anything
            damaged.append((path, " ".join(str(error).split())[:80]))
            continue
        if run and theirs and run["id"] != theirs["id"]:
            _refuse(path, theirs, run)
        for broken, reason in damaged:
            aside = broken.with_name(f"damaged-{broken.name}")
            CONSOLE.print(
                f"{broken} cannot be read ({reason}); it is {aside.name} now, and the run goes on from step {step}",
                soft_wrap=True,
                markup=False,
            )
            with suppress(FileNotFoundError):  # another rank was faster
                os.replace(broken, aside)
        return path, step
    if found:
        first, reason = damaged[0]
        raise ValueError(
            f"no checkpoint in {file.parent} can be read ({first.name}: {reason}); start a new run with ckpt={run_dir}"
        )
    return None


def data_of(checkpoint: Path) -> dict[str, str]:
    """The fingerprints of the data that a checkpoint's run read; none where it is of an earlier version."""
    return _saved(torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)).get("data") or {}


def _saved(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What this callback has put into a checkpoint."""
    return checkpoint["callbacks"].get(Save.__name__, {})


def _refuse(path: Path, theirs: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Raise ValueError, naming in what the run of a checkpoint is another."""
    odd = [f"its {key} is {theirs.get(key)}, here it is {run[key]}" for key in run if theirs.get(key) != run[key]]
    raise ValueError(
        f"{path} is of another run: {', '.join(map(artifact.files.escape_controls, odd))}; put the run's own "
        f"checkpoint there, or start a new run with ckpt={path.parents[1]}"
    )


def _numbered(file: Path, number: int) -> Path:
    return file.with_name(f"last-{number}.ckpt") if number else file
