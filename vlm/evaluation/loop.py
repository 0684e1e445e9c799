"""All metrics of a model, at the end of training and in eval.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm.data.datamodule import VLMDataModule

PREFIXES = ("val/", "text/")  # of the names of metrics


@dataclass
class Result:
    """Metrics by name, records for samples.jsonl, and the error that prevented further ones."""

    metrics: dict[str, float] = field(default_factory=dict)
    samples: Sequence[dict[str, Any]] = ()
    failure: Exception | None = None


def evaluate(trainer: Any, module: Any, data: VLMDataModule) -> Result:
    """Validate a `VLMModule`, unless it was validated after the last step, then run the evaluators with `at="end"`.

    Every rank must call this. An error is returned with the metrics computed before it.
    """
    result = Result()
    try:
        if module.validated_step != trainer.global_step:
            trainer.validate(module, datamodule=data, verbose=False)
        result.metrics |= {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(PREFIXES)}
        metrics, result.samples = module.evaluate_at_end()
        result.metrics |= metrics
    except Exception as error:
        result.failure = error
    return result
