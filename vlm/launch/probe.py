"""The first steps of a run in a process of their own: seconds of a step, and the memory of its activations.

A small model runs as a whole, with its weights where they are on this machine. Of a large one the probe runs two copies
with random weights that differ in the number of blocks only. What a step takes grows by the same amount with every
block, so both sizes and times follow a line:

    f(depth) = f(d₁) + (depth - d₁) · (f(d₂) - f(d₁)) / (d₂ - d₁)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlm import build, config
from vlm.callbacks.stop import between_steps
from vlm.callbacks.throughput import peak_memory_gb
from vlm.ranges import Number
from vlm.training import artifact

GB = 10**9
ADAMW_STATES = 2  # running means of the gradient and of its square, each of the parameter's type
COUNTED_STEPS, TIMED_STEPS = 2, 8  # the optimizer creates its states in the first step
TIMED_SECONDS = 6.0  # after which no further step is timed, if there are MIN_STEPS
MIN_STEPS = 2
MAX_OF_FREE = 0.5  # of the free memory that a copy may hold before activations
MAX_WHOLE_GB = 2  # weights, gradients and optimizer states of a model that runs as a whole
# Depths of the two copies; even where memory allows, because a connector may attach to every second layer.
DEPTHS = ((2, 4), (1, 2))
# Floating-point operations of a step of the probe: a processor without matrix units takes 10 s for them.
MAX_OPERATIONS = 1e12


@dataclass(frozen=True)
class Measured:
    """One probe.

    Attributes:
        rows: rows per batch that it ran, as a fraction of those of the run.
        batch_seconds: of a batch, forward and backward, with the wait for it.
        optimizer_seconds: of an optimizer step, with the norm of the gradient.
        steps: how many steps were timed.
        held_gb: weights, gradients and optimizer states.
        positions: tokens of a counted batch, with its padding.
        forward_gb: the most that was allocated beside these in the forward pass, where there are no gradients; this may
            be negative.
        backward_gb: the same from there on. With depth, this peak and the one before grow by different amounts.
        update_gb: the same in the optimizer's update.
        peak_gb: peak memory of the GPU, or of the process without a GPU.
        weights: `own` or `random`.
        depth: number of blocks; None is all.
    """

    rows: float
    batch_seconds: float
    optimizer_seconds: float
    steps: int
    held_gb: float
    positions: int
    forward_gb: float
    backward_gb: float
    update_gb: float
    peak_gb: float
    weights: str = "random"
    depth: int | None = None


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are created in this context and alive, and the most there were at once.

    They are the same on every device and in every process; a kernel's own workspace is not among them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and _storage(tensor) not in given:
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages or storage.device.type == "meta":
            return

        def free(_: Any) -> None:
            self.now -= size
            self._storages.pop(key, None)

        self._storages[key] = weakref.ref(storage, free)
        self.now += size
        self.peak = max(self.peak, self.now)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class Recorder(pl.Callback):
    """Counts the memory of the first steps and times the next ones.

    Attributes:
        forward_bytes: what was allocated at most beside the weights, before the backward pass of the last counted step.
        backward_bytes, update_bytes: the same from there on, and in the optimizer's update.
        batches: seconds of each batch, without the update.
        updates: seconds of each update.
    """

    def __init__(self, *, num_timed: int) -> None:
        self.live = LiveBytes()
        self.num_timed, self.steps = num_timed, 0
        self.batches: list[float] = []
        self.updates: list[float] = []
        self._is_counting, self._step = False, 0
        self.forward_bytes = self.backward_bytes = self.update_bytes = self._batch_bytes = self.positions = 0
        self._last = self._update_start = 0.0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step < COUNTED_STEPS:
            tensors = (value for value in vars(batch).values() if isinstance(value, Tensor))
            self._batch_bytes = max(self._batch_bytes, sum(tensor.nbytes for tensor in tensors))
            if trainer.global_step != self._step:
                freed = sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)  # before the forward pass
                self._step, self.live.peak, self.positions = trainer.global_step, self.live.now - freed, 0
            self.positions = max(self.positions, batch.attention_mask.numel())
            self.live.__enter__()
            self._is_counting = True

    def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if self._is_counting:
            self.forward_bytes, self.live.peak = self.live.peak + self._batch_bytes, self.live.now

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self._update_start = time.perf_counter()
        if self._is_counting:
            self.backward_bytes, self.live.peak = self.live.peak + self._batch_bytes, self.live.now

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        if self._is_counting:
            self.live.__exit__(None, None, None)
            self._is_counting = False
            self.update_bytes = self.live.peak + self._batch_bytes
        else:
            update = now - self._update_start if between_steps(trainer) else 0.0
            self.batches.append(now - self._last - update)
            if between_steps(trainer):
                self.updates.append(update)
                self.steps += 1
        self._last = now
        spent = sum(self.batches) + sum(self.updates)
        if trainer.global_step >= COUNTED_STEPS and (
            self.steps >= self.num_timed or (self.steps >= MIN_STEPS and spent > TIMED_SECONDS)
        ):
            trainer.should_stop = True


def measure(
    settings: Mapping[str, Any], *, depth: int | None = None, rows: float = 1.0, num_timed: int = TIMED_STEPS
) -> Measured:
    """Run some steps of a run with `rows` of its rows per batch and, if `depth` is given, with so many blocks."""
    settings = of_probe(settings, depth=depth, rows=rows, num_timed=num_timed)
    pl.seed_everything(settings["seed"], verbose=False)
    built = None if depth is not None else _own(settings)
    model, objective = built or random_parts(settings)
    module = build.build_module(settings, model, objective)
    data = build.connect_data(build.build_data(settings, None, splits=("train",)), settings, model)
    weights = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    recorder = Recorder(num_timed=num_timed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build.build_trainer(settings, Path(folder))
        trainer.callbacks.append(recorder)
        trainer.fit(module, train_dataloaders=data.train_dataloader())
    trained = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
    states = ADAMW_STATES * trained
    average = trained if settings["callbacks"] else 0  # made before the first step, so not counted in it
    return Measured(
        rows=rows,
        batch_seconds=_mean(recorder.batches),
        optimizer_seconds=_mean(recorder.updates),
        steps=recorder.steps,
        held_gb=(weights + trained + states + average) / GB,
        positions=recorder.positions,
        forward_gb=(recorder.forward_bytes - states - trained) / GB,
        backward_gb=(recorder.backward_bytes - states - trained) / GB,
        update_gb=(recorder.update_bytes - states - trained) / GB,
        peak_gb=peak_memory_gb(),
        weights="own" if built else "random",
        depth=depth,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def of_probe(settings: Mapping[str, Any], *, depth: int | None, rows: float, num_timed: int) -> dict[str, Any]:
    """The settings of the probe: one device, a few steps, no evaluation, nothing written."""
    if depth is not None:
        settings = config.model_class(settings).with_depth(settings, depth)
    size = size_of_batch(settings)
    data = settings["data"]
    trainer: dict[str, Any] = {
        **settings["trainer"],
        **{"devices": 1, "num_nodes": 1, "strategy": "auto", "max_time": None, "limit_val_batches": 0},
        "max_steps": COUNTED_STEPS + num_timed,
        "accumulate_grad_batches": min(2, settings["trainer"]["accumulate_grad_batches"]),
    }
    if trainer["accelerator"] not in ("auto", "cpu") and not torch.accelerator.is_available():
        trainer["accelerator"] = "cpu"
    keeps_average = settings["stage"].get("ema_decay") is not None
    return {
        **settings,
        "data": {**data, size: max(1, round(data[size] * rows)), "feature_cache": "off"},
        "trainer": {**trainer, "precision": config.precision(settings)},
        "callbacks": {"ema": settings["callbacks"]["ema"]} if keeps_average else {},
        "logger": {},
        "evaluators": {},
    }


def size_of_batch(settings: Mapping[str, Any]) -> str:
    """The option that bounds a batch."""
    return "batch_tokens" if settings["data"].get("batching") == "tokens" else "batch_size"


def without_weights(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the option that allocates no weights, for each part that comes with some."""
    parts = config.model_class(settings).pretrained
    return {**settings, **{part: {**settings[part], "weights": "meta"} for part in parts}}


def parts_on_meta(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """Model and objective on the meta device, with the adapter of an earlier stage."""
    model: Any
    with torch.device("meta"):
        model, _ = build.build_model(without_weights(settings))
        objective = build.build_objective(settings)
        _add_lora_of_earlier_stage(settings, model)
    return model, objective


def _add_lora_of_earlier_stage(settings: Mapping[str, Any], model: Any) -> None:
    lora = artifact.read_manifest(settings["ckpt"])["lora"] if settings["ckpt"] else None
    if lora:
        getattr(model, model.lora_part()).add_lora(**lora)


def _own(settings: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """Model and objective as the run builds them, or None where weights are not on this machine."""
    if not config.model_class(settings).weights_are_here(settings):
        return None
    try:
        model, _ = build.build_model(settings)
    except (ValueError, OSError):
        return None
    _add_lora_of_earlier_stage(settings, model)
    return model, build.build_objective(settings)


def random_parts(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """Model and objective with random weights, which are allocated in their final types."""
    model, objective = parts_on_meta(settings)
    model.use_local_tokenizer(settings)
    fill(model)
    fill(objective)
    for part in model.parts:
        if (settings.get(part) or {}).get("attention") == "auto":
            getattr(model, part).auto_attention()  # on the meta device nothing can be tried
    return model, objective


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Allocate the tensors that are on the meta device; tied parameters stay tied.

    Matrices get small random values, vectors and buffers ones, integers zeros: all are valid indices and variances.
    """
    made: dict[int, nn.Parameter] = {}
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                values = torch.empty_like(parameter, device="cpu")
                # All rows are alike: billions of random numbers would take longer than the probe.
                values.copy_(0.02 * torch.randn(values.shape[1:]) if values.ndim > 1 else torch.tensor(1.0))
                made[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            each._parameters[name] = made[id(parameter)]
        for name, buffer in each._buffers.items():
            if buffer is not None and buffer.is_meta:
                values = torch.ones_like(buffer, device="cpu")
                each._buffers[name] = values if buffer.is_floating_point() else values.zero_()


def run_apart(requests: Sequence[Mapping[str, Any]], settings: Sequence[Mapping[str, Any]]) -> list[Measured]:
    """`measure` each request with its settings, in one new process.

    Raises RuntimeError with the last line of its error.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "probe.json"
        file.write_text(json.dumps([{"settings": s, **r} for s, r in zip(settings, requests, strict=True)]))
        paths = [path or os.getcwd() for path in sys.path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "vlm.launch.probe", str(file)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            killed = f"its process was killed by signal {-done.returncode}" if done.returncode < 0 else ""
            raise RuntimeError(killed or (lines[-1] if lines else f"exit code {done.returncode}"))
        return [Measured(**found) for found in json.loads(file.read_text())]


@dataclass(frozen=True)
class Prediction:
    """What a step of the run takes on one device of this machine.

    Attributes:
        batch_gb: the most that forward and backward allocate beside weights, gradients and optimizer states.
        update_gb: the same of the optimizer's update.
        peak_memory_gb: of the GPU; of the process with its libraries on a machine without a GPU.
        step_seconds: of an optimizer step with all its accumulated batches.
        probes: what was measured.
    """

    batch_gb: float
    update_gb: float
    peak_memory_gb: float
    step_seconds: float
    probes: tuple[Measured, ...]

    @property
    def activations_gb(self) -> float:
        return max(0.0, self.batch_gb, self.update_gb)


def predict(
    probes: Sequence[Measured], *, depth: int | None, held_gb: float, accumulate_grad_batches: int
) -> Prediction:
    """Extrapolate one probe of the whole model, or two of a different depth, to the run.

    `held_gb` are the weights, gradients and optimizer states of the run.
    """
    first, last = probes[0], probes[-1]
    steps = 0.0  # from the first probe to the run, in differences of the two
    if first.depth is not None and last.depth is not None and depth is not None:
        steps = (depth - first.depth) / (last.depth - first.depth)

    def line(name: str) -> float:
        start, end = float(getattr(first, name)), float(getattr(last, name))
        return start + steps * (end - start)

    batch, update = max(line("forward_gb"), line("backward_gb")) / last.rows, line("update_gb")
    measured = max(last.forward_gb, last.backward_gb, last.update_gb)
    growth = (held_gb - last.held_gb) + max(batch, update) - measured
    return Prediction(
        batch_gb=batch,
        update_gb=update,
        peak_memory_gb=last.peak_gb + growth,
        step_seconds=accumulate_grad_batches * line("batch_seconds") / last.rows + line("optimizer_seconds"),
        probes=tuple(probes),
    )


def probe(
    settings: Mapping[str, Any],
    *,
    held_gb: Callable[[int | None], float],
    num_parameters: int,
    tokens_per_batch: Number,
    depth: int | None,
    num_timed: int = TIMED_STEPS,
) -> Prediction:
    """Measure the run's first steps, or those of two shallow copies. Raises RuntimeError where they cannot run.

    `held_gb` gives the weights, gradients and optimizer states of a copy by its depth; those of the run for None.
    """
    held = held_gb(None)
    least, free = smallest_depth(settings), free_memory() / GB
    requests: list[dict[str, Any]] = [{}]
    loaded = float(num_parameters)
    if held > min(MAX_WHOLE_GB, MAX_OF_FREE * free):
        pairs = [[least + number for number in pair] for pair in DEPTHS if depth and depth > least + max(pair)]
        pair = next((pair for pair in pairs if held_gb(max(pair)) <= MAX_OF_FREE * free), None)
        if pair is not None and depth is not None:
            requests = [{"depth": number} for number in pair]
            loaded *= max(pair) / depth
        elif held > MAX_OF_FREE * free:
            least_gb = held_gb(max(pairs[-1])) if pairs else held
            raise RuntimeError(
                f"the smallest copy of the model needs {least_gb:,.1f} GB, and of memory {free:,.1f} GB are free"
            )
    operations = 6 * loaded * tokens_per_batch
    size = settings["data"][size_of_batch(settings)]
    rows = min(1.0, max(1, int(size * MAX_OPERATIONS / max(operations, 1))) / size)
    if torch.accelerator.is_available():
        rows = 1.0
    common = {"rows": rows, "num_timed": num_timed}
    found = [run_apart([{**common, **request}], [settings])[0] for request in requests]
    return predict(
        found,
        depth=depth,
        held_gb=held,
        accumulate_grad_batches=settings["trainer"]["accumulate_grad_batches"],
    )


def smallest_depth(settings: Mapping[str, Any]) -> int:
    """Blocks that a shallow copy needs before another one is like all further ones."""
    part = config.model_class(settings).lora_part()
    state = settings["stage"].get(part) if part else None
    return int(state.get("last_n", 0)) if isinstance(state, Mapping) else 0


def device() -> str:
    """The kind of device that a probe runs on."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def free_memory() -> float:
    """Bytes of memory that a new process can use."""
    file = Path("/proc/meminfo")
    if file.exists():
        lines = dict(line.split(":", 1) for line in file.read_text().splitlines())
        return 1024 * float(lines["MemAvailable"].split()[0])
    return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def main() -> None:
    """Measure the requests in a file and write the results over them."""
    file = Path(sys.argv[1])
    found = [asdict(measure(**request)) for request in json.loads(file.read_text())]
    file.write_text(json.dumps(found))


if __name__ == "__main__":
    from vlm.launch import training as _  # noqa: F401 - the libraries of a run, which its memory includes

    main()
