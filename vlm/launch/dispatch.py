"""What a composed config asks of train.py: a recipe, a plan, a process of its own, or one run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from vlm.imports import without_collection
from vlm.launch import interrupt


def single_run(*, script: str) -> Callable[[Callable[[Any], None]], Callable[[Any], float | None]]:
    """Make a job for Hydra of a function that takes a `TrainingRun`; it is called where the config asks for one run.

    In a sweep, the job returns its `sweep.metric`. `script` is the program whose command line starts further processes.
    """

    def decorate(train: Callable[[Any], None]) -> Callable[[Any], float | None]:
        return partial(_dispatch, train, script)

    return decorate


def _dispatch(train: Callable[[Any], None], script: str, cfg: Any) -> float | None:
    # Imported here: a misspelled option should be reported before a second's worth of libraries.
    with without_collection():
        from hydra.core.hydra_config import HydraConfig

        from vlm.launch import plan, processes, recipe, sweep
        from vlm.launch.training import TrainingRun
        from vlm.training.run import CONSOLE

    interrupt.raise_again()
    if cfg.recipe is not None and cfg.resume.run is None:
        last = recipe.run_stages(cfg)
        return None if last is None else sweep.figure(cfg, last)
    cfg.run_dir = HydraConfig.get().runtime.output_dir  # a sweep has its own, and the loggers' folders follow
    if plan.wanted(cfg):
        if cfg.resume.run is not None:
            raise ValueError("plan=true shows what a new run would cost; leave out resume=")
        plan.plan(cfg)
        return None
    run = TrainingRun(cfg)
    if run.is_finished:
        CONSOLE.print(f"This job is finished: {run.run_dir}", soft_wrap=True)
    elif not processes.run_apart(run.trainer, script, resumes=run.resumes):
        train(run)
    return sweep.figure(run.settings, run.run_dir)
