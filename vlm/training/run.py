"""The run directory: what is written where, and where the code came from."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from vlm import files
from vlm.models.base import Model
from vlm.schema import is_loss
from vlm.training.artifact import aside, put, write, write_json


class PlainConsole(Console):
    """Shows every text as it is, also what somebody's data says: no markup, no emoji codes, no commands to a terminal.

    What should have a style is a `Text`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(files.escape_controls(text), **options)


CONSOLE = PlainConsole(width=None if Console().is_terminal else 120, soft_wrap=False)
MAX_METRICS = 2**30  # bytes
# Of a run: all steps done and all figures there; a signal or trainer.max_time came first; figures failed at the end.
Status = Literal["finished", "stopped", "time_up", "failed"]


def lock(run_dir: Path, *, resumed: bool) -> IO[str] | None:
    """Take a directory for this run, for as long as the returned file stays open.

    The lock is one of POSIX (`lockf`): it ends with its process, however that ends, and data workers do not inherit it;
    over NFS it holds between machines. Other ranks of a run, which share its directory, take none.

    Raises ValueError where another run is at work, or has left something and is not `resumed`.
    """
    if not first_rank():
        return None
    run_dir.mkdir(parents=True, exist_ok=True)
    files.refuse_links(run_dir)
    held = files.lock_file(run_dir / ".lock")  # closing it would release it
    try:
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ValueError(
                f"run_dir={run_dir} is in use by {held.read(200) or 'another process'}; wait for its end, or choose "
                "another directory"
            ) from error
        print(f"{run_dir} is on a file system without locks ({error.strerror}): start no second run in it")
    if not resumed and (run_dir / "config.yaml").exists():
        raise ValueError(f"run_dir={run_dir} already holds a run; choose another directory or remove this one")
    with files.named(run_dir / ".lock"):
        held.truncate(0)
        held.write(f"process {os.getpid()} on {socket.gethostname()}")
        held.flush()
    return held


def identity(
    run_id: str, settings: Mapping[str, Any], choices: Mapping[str, str | None], parts: Iterable[str]
) -> dict[str, Any]:
    """What artifact and checkpoints carry to tell their run: an id that no other has, and what it is by name."""
    groups = ("stage", *parts, "data")
    return {"id": run_id, "seed": settings["seed"], **{group: choices.get(group) for group in groups}}


def status(run_dir: Path) -> Status | None:
    """How a run ended, as metrics.json says; None where it has not ended yet, or was killed."""
    file = run_dir / "metrics.json"
    if not file.is_file():
        return None
    try:
        content = json.loads(files.read(file, max_bytes=MAX_METRICS))
        # A run of an earlier version did not say so, but only one that went to its end had figures of the answers.
        return content.get("status") or ("finished" if "val/exact_match" in content else "stopped")
    except (ValueError, AttributeError) as error:  # written by renaming, so no run has left it so
        raise ValueError(f"{file} cannot be read ({error}); remove it, and the run ends anew with resume=") from error


def read_metrics(run_dir: Path) -> dict[str, float]:
    """The final figures of a run."""
    content = json.loads(files.read(run_dir / "metrics.json", max_bytes=MAX_METRICS))
    return {name: value for name, value in content.items() if name != "status"}


def first_rank() -> bool:
    """Whether no launcher has told this process that it is another than the first of its run."""
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(os.environ.get(rank, "0") == "0" for rank in ranks)


def name_loggers(loggers: Mapping[str, dict[str, Any]], *, step: int) -> None:
    """Choose the id under which a service knows the run; config.yaml keeps it, for a run that resumes from `step`.

    A table begins anew there, in a folder of its own: Lightning's would take the place of the one before.
    """
    for options in loggers.values():
        if "id" in options and options["id"] is None:
            options["id"] = secrets.token_hex(4)
        if step and str(options.get("_target_")).endswith(".CSVLogger"):
            options["version"] = f"from_step_{step}"


def truncate_metrics(run_dir: Path, *, step: int) -> None:
    """Drop the metrics of steps that will be repeated."""
    file = run_dir / "metrics.jsonl"
    if file.exists():
        lines = files.read(file, max_bytes=MAX_METRICS).decode(errors="replace").split("\n")
        kept = [f"{line}\n" for number, line in enumerate(lines, start=1) if line and _step(file, number, line) <= step]
        write(aside(file), "".join(kept))
        put(file)


def _step(file: Path, number: int, line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, RecursionError):  # a line that was being written when the run was killed
        return float("inf")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} line {number} names no step; remove that line") from error


def provenance() -> dict[str, Any]:
    """Versions of the code that made a run."""
    root = Path(__file__).parents[2]
    git = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True)
    packages = ("torch", "lightning", "transformers", "peft", "timm", "hydra-core")
    return {"git": git.stdout.strip() or None, "packages": {name: version(name) for name in packages}}


def native_precision(accelerator: str) -> str:
    """`bf16-mixed` where the machine multiplies bfloat16 matrices natively, else `32-true`."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16-mixed" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "32-true"


def count_parameters(model: Model, objective: nn.Module | None = None) -> dict[str, dict[str, int]]:
    """Parameters per part, total and trainable, and of an objective that has some; a tied one counts once."""
    parts = {part: getattr(model, part) for part in model.parts}
    if objective is not None and any(True for _ in objective.parameters()):
        parts["objective"] = objective
    return {
        part: {
            "total": sum(p.numel() for p in module.parameters()),
            "trainable": sum(p.numel() for p in module.parameters() if p.requires_grad),
        }
        for part, module in parts.items()
    }


def print_parts(
    counts: Mapping[str, Mapping[str, int]],
    options: Mapping[str, str | None],
    stage: Mapping[str, Any],
    *,
    decayed: str | None = None,
) -> None:
    """One line a part, with its parameters as `count_parameters` has them.

    `decayed` is the part whose blocks learn at rates that `stage.layer_decay` makes smaller.
    """
    table = Table(title=f"Trainable parameters in stage {stage['name']}")
    for heading in ("part", "option", "state", "learning rate", "trainable", "total"):
        table.add_column(heading, justify="right" if heading in ("trainable", "total") else "left")
    for part, numbers in counts.items():
        state = stage.get(part, "full")
        state = state if isinstance(state, str) else f"last {state['last_n']}"
        lr: Any = stage["lr"].get(part) if numbers["trainable"] else "-"
        rate = ", ".join(f"{name} {value:g}" for name, value in lr.items()) if isinstance(lr, dict) else f"{lr}"
        if numbers["trainable"] and part == decayed and (factor := stage.get("layer_decay")) is not None:
            rate += f", × {factor:g} a block"
        table.add_row(part, options.get(part) or "", state, rate, f"{numbers['trainable']:,}", f"{numbers['total']:,}")
    CONSOLE.print(table)


def log_options(trainer: Any, cfg: Mapping[str, Any]) -> None:
    """Tell the loggers the config, which makes them start. Raises ValueError where one cannot."""
    for (name, options), logger in zip(cfg["logger"].items(), trainer.loggers, strict=True):
        try:
            with disk_of_loggers(trainer):
                logger.log_hyperparams(cfg)
        except Exception as error:  # each service raises its own kinds
            cause = str(error).strip().partition("\n")[0]
            offline = f"logger.{name}.offline=true needs no account"
            hint = offline if "offline" in options else "choose another logger="
            raise ValueError(f"the logger {name} could not start: {cause}; {hint}") from error


@contextmanager
def disk_of_loggers(trainer: Any) -> Iterator[None]:
    """Raise what a full disk says to a logger, which does not name its files, as an error that names its folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or error.filename is not None:
            raise
        folders = " or ".join(str(Path(logger.log_dir or logger.save_dir)) for logger in trainer.loggers)
        raise OSError(f"could not write the metrics in {folders}: {error.strerror}") from error


def close_loggers(trainer: Any, metrics: Mapping[str, float], *, failed: bool) -> None:
    """Give the loggers the final figures and let each end."""
    for logger in trainer.loggers:
        with disk_of_loggers(trainer):
            logger.log_metrics(metrics, step=trainer.global_step)
            logger.finalize("failed" if failed else "success")
        if finish := getattr(logger.experiment, "finish", None):  # W&B's: or a sweep's next job would log into it
            finish()


def finish(
    run_dir: Path, metrics: dict[str, float], samples: Sequence[dict[str, Any]], status: Status = "finished"
) -> None:
    """Write the final figures and how the run ended; print the figures with a few held-out pictures."""
    write_json(run_dir / "metrics.json", {"status": status, **metrics})
    print_figures(metrics)
    print_samples(samples)
    CONSOLE.print(f"Run directory: {run_dir}", soft_wrap=True)


def print_figures(metrics: dict[str, float]) -> None:
    """A figure a line; below, the losses of which `val/loss` and the visual gain are the sum."""
    losses = [name for name in metrics if name.startswith("val/") and is_loss(name.removeprefix("val/"))]
    table = Table(title="Result")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, figure(value))
    CONSOLE.print(table)
    if losses:
        CONSOLE.print(f"val/loss and val/visual_gain hold {' + '.join(losses)}", soft_wrap=True)


def figure(value: int | float) -> str:
    """A count in full, another number to three places; what rounds to zero has no sign."""
    return f"{value:,}" if isinstance(value, int) else f"{value:z,.3f}"


def print_samples(samples: Sequence[dict[str, Any]], num: int = 6) -> None:
    """A few held-out pictures with what the model said and what was right."""
    if not samples:
        return
    table = Table(title="Held-out pictures")
    for heading in ("picture", "prediction", "reference", ""):
        table.add_column(heading)
    for sample in samples[:num]:
        mark = Text("right", "green") if sample["correct"] else Text("wrong", "red")
        table.add_row(*(sample[key] for key in ("id", "prediction", "reference")), mark)
    CONSOLE.print(table)
