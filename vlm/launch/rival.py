"""One run of eval.py with model=openai: a service answers the benchmarks, for a comparison with a trained model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from vlm import config
from vlm.launch import benchmarks, interrupt
from vlm.launch.evaluation import check_out
from vlm.options import bind, check_keys
from vlm.training import run

OF_A_RUN = ("ckpt", "trainer", "data", "batch_size", "num_workers")  # options of eval.py that a service has no use for


def evaluate_rival(cfg: Any) -> None:
    """Ask each benchmark, then write and print its results. Raises ValueError for options that cannot be used."""
    options: Any = OmegaConf.to_container(cfg.rival, resolve=True, throw_on_missing=True)
    given = list(HydraConfig.get().overrides.task)
    _check(cfg, given)
    asked = benchmarks.read(cfg)
    if not asked:
        raise ValueError("a service answers benchmarks, and none is chosen; add benchmark=<name>")
    name = str(options["model_name"])
    folder = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"
    out = Path(cfg.out or f"runs/eval/{folder}").absolute()
    check_out(out)
    if options["cache"] is None:
        options["cache"] = str(out / "requests.jsonl")
    else:
        config.check_parent("cache", options["cache"])
    rival = bind("rival", options)()
    who = benchmarks.Who(name=f"model_name={name}", identity={"rival": rival.identity}, methods=("generate",))
    benchmarks.check(asked, who, out, replace=cfg.out is not None)
    interrupt.raise_again()
    if not run.is_rank_zero():
        return
    key = "with the key of the environment" if rival.has_key else "without a key"
    asking = f"Asking {name} at {rival.base_url} {key}; answers are kept in {options['cache']}"
    run.CONSOLE.print(asking, soft_wrap=True)
    about = {"options_given": [option.lstrip("+") for option in given], **who.identity, "code": run.provenance()}
    against = None if cfg.against is None else Path(cfg.against).absolute()
    for each in asked.values():
        benchmarks.ask(each, who, rival, out, against=against, about=about)


def _check(cfg: Any, given: list[str]) -> None:
    for option in given:
        if option.lstrip("+~").partition("=")[0].partition(".")[0] in OF_A_RUN:
            raise ValueError(f"{option.lstrip('+')} is for a run of train.py, and model=openai is none; leave it out")
    own = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "ckpt"])
    config.check_evaluation(own)
    check_keys("", own, {*config.EVALUATION, "trainer", "benchmark", "rival"})
