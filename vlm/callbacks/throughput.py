"""Speed and memory: tokens and samples per second, seconds per step, peak memory."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch

from vlm.callbacks.stop import between_steps
from vlm.schema import Batch


class Throughput(pl.Callback):
    """Logs `perf/*` at every logged step and for the whole fit, without validation time.

    Tokens are counted per process, with visual tokens and prompts, without padding.
    """

    def __init__(self) -> None:
        self._seconds = self._tokens = self._samples = self._steps = self._before = 0.0

    def state_dict(self) -> dict[str, float]:
        return {
            "seconds": self._seconds,
            "tokens": self._tokens,
            "samples": self._samples,
            "steps": self._steps,
            "before": self._before + time.perf_counter() - self._start,
        }

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        for name, value in state_dict.items():
            setattr(self, f"_{name}", value)

    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:
        self._start = time.perf_counter()
        self._last_time: float | None = None
        self._window = [0.0, 0.0, 0.0]  # seconds, tokens, samples

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Batch, batch_idx: int) -> None:
        if self._last_time is None:  # the wait for a batch counts, except for the first
            self._last_time = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        now = time.perf_counter()
        spent, self._last_time = now - (self._last_time or now), now
        tokens, samples = int(batch.attention_mask.sum()), len(batch.ids)
        self._window = [a + b for a, b in zip(self._window, (spent, tokens, samples), strict=True)]
        self._seconds, self._tokens, self._samples = (
            self._seconds + spent,
            self._tokens + tokens,
            self._samples + samples,
        )
        if between_steps(trainer):
            self._steps += 1
            if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
                seconds, num_tokens, num_samples = self._window
                module.log("perf/tokens_per_second", num_tokens / seconds)
                module.log("perf/samples_per_second", num_samples / seconds)
                module.log("perf/peak_memory_gb", peak_memory_gb())
                self._window = [0.0, 0.0, 0.0]

    def on_validation_start(self, trainer: pl.Trainer, module: Any) -> None:
        self._last_time = None

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        self._last_time = time.perf_counter()

    def on_fit_end(self, trainer: pl.Trainer, module: Any) -> None:
        seconds = max(self._seconds, 1e-9)
        module.totals |= {
            "perf/tokens_per_second": self._tokens / seconds,
            "perf/samples_per_second": self._samples / seconds,
            "perf/step_seconds": seconds / max(1.0, self._steps),
            "perf/peak_memory_gb": peak_memory_gb(),
            "time/fit_seconds": self._before + time.perf_counter() - self._start,
        }


def peak_memory_gb() -> float:
    """Peak memory of the GPU, or of the process without a GPU, in units of 10⁹ bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
