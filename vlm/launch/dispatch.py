"""What a composed config asks of train.py: a recipe, a plan, a process of its own, or one run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from vlm.launch import interrupt


def single_run(*, script: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Make a job for Hydra of a function that takes a `TrainingRun`; it is called where the config asks for one run.

    `script` is the program whose command line starts further processes.
    """

    def decorate(train: Callable[[Any], None]) -> Callable[[Any], None]:
        return partial(_dispatch, train, script)

    return decorate


def _dispatch(train: Callable[[Any], None], script: str, cfg: Any) -> None:
    # Imported here: a misspelled option should be reported before a second's worth of libraries.
    from hydra.core.hydra_config import HydraConfig

    from vlm.launch import plan, processes, recipe
    from vlm.launch.training import TrainingRun

    interrupt.raise_again()
    if cfg.recipe is not None and cfg.resume.run is None:
        recipe.run_stages(cfg)
        return
    cfg.run_dir = HydraConfig.get().runtime.output_dir  # a sweep has its own, and the loggers' folders follow
    if plan.wanted(cfg):
        if cfg.resume.run is not None:
            raise ValueError("plan=true shows what a new run would cost; leave out resume=")
        plan.plan(cfg)
        return
    run = TrainingRun(cfg)
    if not processes.run_apart(run.trainer, script):
        train(run)
