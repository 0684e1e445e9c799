"""All figures of a model, at the end of a training and in eval.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm.data.datamodule import VLMDataModule

KINDS = ("val/", "text/")  # what the names of an evaluator's figures begin with


@dataclass
class Result:
    """Figures by name, records for samples.jsonl, and what failed on the way to further ones."""

    metrics: dict[str, float] = field(default_factory=dict)
    samples: Sequence[dict[str, Any]] = ()
    failure: Exception | None = None


def evaluate(trainer: Any, module: Any, data: VLMDataModule) -> Result:
    """Validate a `VLMModule`, unless that was done after the last step, then ask the evaluators due at the end.

    Every rank must call this. What fails takes no other figures with it.
    """
    result = Result()
    try:
        if module.validated_step != trainer.global_step:
            trainer.validate(module, datamodule=data, verbose=False)
        result.metrics |= {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(KINDS)}
        figures, result.samples = module.evaluate_at_end()
        result.metrics |= figures
    except Exception as error:
        result.failure = error
    return result
