"""Evaluate a run on its validation split or on benchmarks: python eval.py ckpt=<run dir> [benchmark=shapes out=…]."""

from __future__ import annotations

from typing import Any

from vlm.imports import without_collection
from vlm.launch import interrupt


def evaluate(cfg: Any) -> None:
    """Loss, visual gain and answers of a run's artifact, or its benchmarks, into <run dir>/eval/ or `out`."""
    if cfg.rival:
        from vlm.launch.rival import evaluate_rival

        return evaluate_rival(cfg)
    with without_collection():
        from vlm import build
        from vlm.evaluation.loop import evaluate
        from vlm.launch.evaluation import EvaluationRun
        from vlm.training import artifact

    run = EvaluationRun(cfg)
    data = None if run.benchmarks else build.build_data(run.settings, None, splits=("val",))
    model, manifest = build.build_model(run.settings)
    objective = build.build_objective(run.settings)
    artifact.load(run.run_dir, model=model, manifest=manifest, objective=objective, run_id=run.run_id)
    if data is None:
        return run.run_benchmarks(model)
    module = build.build_module(run.settings, model, objective)
    build.connect_data(data, run.settings, model)
    run.report(module, data)
    trainer = build.build_trainer(run.settings, run.run_dir)
    run.finish(trainer, evaluate(trainer, module, data))


if __name__ == "__main__":
    interrupt.end_at_once()
    from vlm.launch.entry import start

    start(evaluate, config_name="eval")
