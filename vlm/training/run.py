"""The run directory: lock, status, metrics, loggers, the printed table of parts, versions of the code."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping
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
from vlm.training.artifact import commit, temporary_path, write
from vlm.training.dashboards import TakesTrained


class PlainConsole(Console):
    """Prints texts from data unchanged: no markup, no emoji codes, no terminal control characters.

    Styled output is passed as a `Text`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(files.escape_controls(text), **options)


CONSOLE = PlainConsole(width=None if Console().is_terminal else 120, soft_wrap=False)
MAX_METRICS = 2**30  # bytes
# All steps and metrics are done; a signal stopped the run; trainer.max_time stopped it; the final metrics failed.
Status = Literal["finished", "stopped", "time_up", "failed"]


def lock(run_dir: Path, *, resumed: bool) -> IO[str] | None:
    """Lock a directory for this run while the returned file is open; only rank 0 locks.

    The lock is POSIX `lockf`: it ends with its process, data workers do not inherit it, and it works over NFS.

    Raises ValueError if another process runs there, or if the directory holds a run and `resumed` is off.
    """
    if not is_rank_zero():
        return None
    run_dir.mkdir(parents=True, exist_ok=True)
    files.refuse_links(run_dir)
    held = files.lock_file(run_dir / ".lock")  # closing the file releases the lock
    try:
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ValueError(
                f"run_dir={run_dir} is in use by {held.read(200) or 'another process'}; wait for its end or choose "
                "another directory"
            ) from error
        print(f"{run_dir} is on a file system without locks ({error.strerror}); do not start a second run in it")
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
    """The identity of a run in its artifact and checkpoints: a unique id, the seed, and the chosen options."""
    groups = ("stage", *parts, "data")
    return {"id": run_id, "seed": settings["seed"], **{group: choices.get(group) for group in groups}}


def status(run_dir: Path) -> Status | None:
    """How a run ended, from metrics.json; None if it is running or was killed."""
    file = run_dir / "metrics.json"
    if not file.is_file():
        return None
    try:
        content = json.loads(files.read(file, max_bytes=MAX_METRICS))
        # Earlier versions wrote no status; only a finished run had the metrics of generated answers.
        return content.get("status") or ("finished" if "val/exact_match" in content else "stopped")
    except (ValueError, AttributeError) as error:  # runs write it atomically
        raise ValueError(f"{file} cannot be read ({error}); remove it; resume= then computes it again") from error


def read_metrics(run_dir: Path) -> dict[str, float]:
    """The final metrics of a run."""
    content = json.loads(files.read(run_dir / "metrics.json", max_bytes=MAX_METRICS))
    return {name: value for name, value in content.items() if name != "status"}


def is_rank_zero() -> bool:
    """Whether this process is rank 0, by the environment variables of the launchers."""
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(os.environ.get(rank, "0") == "0" for rank in ranks)


def name_loggers(loggers: Mapping[str, dict[str, Any]], *, step: int, names: Mapping[str, Any]) -> None:
    """Choose the id of the run at logging services, and its `names` that are not set; config.yaml stores them.

    An agent of a W&B sweep has chosen the id. A CSVLogger that resumes from `step` gets a new folder, because
    Lightning's would overwrite the previous table.
    """
    for options in loggers.values():
        if "id" in options and options["id"] is None:  # else the run resumes, or the user has chosen the id
            of_agent = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
            options["id"] = of_agent or secrets.token_hex(4)
            options |= {key: value for key, value in names.items() if key in options and options[key] is None}
        if step and str(options.get("_target_")).endswith(".CSVLogger"):
            options["version"] = f"from_step_{step}"


def truncate_metrics(run_dir: Path, *, step: int) -> None:
    """Drop the metrics of steps that will be repeated."""
    file = run_dir / "metrics.jsonl"
    if file.exists():
        lines = files.read(file, max_bytes=MAX_METRICS).decode(errors="replace").split("\n")
        kept = [f"{line}\n" for number, line in enumerate(lines, start=1) if line and _step(file, number, line) <= step]
        write(temporary_path(file), "".join(kept))
        commit(file)


def _step(file: Path, number: int, line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, RecursionError):  # an incomplete line of a killed run
        return float("inf")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} line {number} has no step; remove that line") from error


def provenance() -> dict[str, Any]:
    """Versions of this code and of the main packages."""
    root = Path(__file__).parents[2]
    git = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True)
    packages = ("torch", "lightning", "transformers", "peft", "timm", "hydra-core")
    return {"git": git.stdout.strip() or None, "packages": {name: version(name) for name in packages}}


def native_precision(accelerator: str) -> str:
    """`bf16-mixed` if the hardware supports bfloat16 natively; else `16-mixed` on a GPU and `32-true` on a CPU."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16-mixed" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "32-true"


def count_parameters(model: Model, objective: nn.Module | None = None) -> dict[str, dict[str, int]]:
    """Number of parameters per part and of the objective, total and trainable; tied ones count once."""
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
    """Print one line per part with `counts` from `count_parameters`.

    `decayed` is the part to which `stage.layer_decay` applies.
    """
    table = Table(title=f"Trainable parameters in stage {stage['name']}")
    for heading in ("part", "option", "state", "learning rate", "trainable", "total"):
        table.add_column(heading, justify="right" if heading in ("trainable", "total") else "left")
    for part, numbers in counts.items():
        state = stage.get(part, "full")
        if isinstance(state, dict):
            state = f"last {state['last_n']}" if "last_n" in state else f"only {', '.join(state['only'])}"
        lr: Any = stage["lr"].get(part) if numbers["trainable"] else "-"
        rate = ", ".join(f"{name} {value:g}" for name, value in lr.items()) if isinstance(lr, dict) else f"{lr}"
        if numbers["trainable"] and part == decayed and (factor := stage.get("layer_decay")) is not None:
            rate += f", × {factor:g} per block"
        table.add_row(part, options.get(part) or "", state, rate, f"{numbers['trainable']:,}", f"{numbers['total']:,}")
    CONSOLE.print(table)


def log_config(trainer: Any, cfg: Mapping[str, Any], **further: Any) -> None:
    """Log the config and `further` facts, which starts the loggers. Raises ValueError if one cannot start."""
    for (name, options), logger in zip(cfg["logger"].items(), trainer.loggers, strict=True):
        try:
            with naming_log_folder(trainer):
                logger.log_hyperparams({**cfg, **further})
        except Exception as error:  # services raise different errors
            cause = str(error).strip().partition("\n")[0]
            offline = f"logger.{name}.offline=true needs no account"
            hint = offline if "offline" in options else "choose another logger="
            raise ValueError(f"the logger {name} could not start: {cause}; {hint}") from error


@contextmanager
def naming_log_folder(trainer: Any) -> Iterator[None]:
    """Context that adds the loggers' folder to errors of a full disk, which name no file."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or error.filename is not None:
            raise
        folders = " or ".join(str(Path(logger.log_dir or logger.save_dir)) for logger in trainer.loggers)
        raise OSError(f"could not write the metrics in {folders}: {error.strerror}") from error


def close_loggers(
    trainer: Any, metrics: Mapping[str, float], *, run_dir: Path, identity: Mapping[str, Any], failed: bool
) -> None:
    """Log the final metrics and the artifact, and finish the loggers."""
    for logger in trainer.loggers:
        with naming_log_folder(trainer):
            logger.log_metrics(metrics, step=trainer.global_step)
            if isinstance(logger, TakesTrained) and (run_dir / "artifact").is_dir():
                logger.log_trained(run_dir / "artifact", identity)
            logger.finalize("failed" if failed else "success")
        if finish := getattr(
            logger.experiment, "finish", None
        ):  # otherwise the next job of a sweep would log to the same W&B run
            finish()
