"""One run of eval.py: which run it evaluates, on which data or benchmarks, and where the results are written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from vlm import config, files
from vlm.build import build_reader, build_trainer, check_rows
from vlm.data.datamodule import VLMDataModule
from vlm.evaluation.answers import write_samples
from vlm.evaluation.benchmarks.questions import num_unanswered
from vlm.evaluation.local import Local
from vlm.evaluation.loop import Result
from vlm.launch import benchmarks, interrupt, processes
from vlm.launch.overrides import absolute_paths
from vlm.models.base import Generates, Model, PredictsTokens
from vlm.module import VLMModule
from vlm.options import check_keys
from vlm.text.turns import count
from vlm.training import artifact, results, run, trust


class EvaluationRun:
    """A trained run, and the options of eval.py for it.

    Attributes:
        run_dir: of the training.
        settings: its checked config, with the trainer and the changes of the command line.
        benchmarks: what is asked; if empty, the run's validation split is evaluated. A file of questions without
            answers in its place is asked as a benchmark.
    """

    def __init__(self, cfg: Any) -> None:
        """Raises ValueError for options that cannot be used, or where results of other options would be overwritten."""
        config.check_evaluation(cfg)
        self._cfg, self.run_dir = cfg, Path(cfg.ckpt).absolute()
        self._manifest = artifact.read_manifest(self.run_dir)
        self.run_id = config.run_id(self.run_dir)
        parts = trust.model_sections(config.stored_config(self.run_dir)[0])
        check_keys("", cfg, {*config.EVALUATION, "trainer", "evaluators", "benchmark", "rival", *parts})
        asked = config.given(cfg, [key for key in ("data", "evaluators", *parts) if key in cfg])
        self._asked = absolute_paths(asked, "")  # from the user's folder, not the run's
        self.benchmarks = benchmarks.read(cfg)
        settings, _ = config.read_config(
            self.run_dir, given={**self._sizes(), **self._asked}, with_data=not self.benchmarks
        )
        self._options = [option.lstrip("+") for option in HydraConfig.get().overrides.task]
        self.out = Path(cfg.out or self.run_dir / "eval").absolute()
        self._against = None if cfg.against is None else Path(cfg.against).absolute()
        config.enter_folder_of(self.run_dir)
        self.benchmarks = self.benchmarks or self._questions(settings["data"].get("images"))
        settings["stage"] = {**settings["stage"], "ema_decay": None}  # of training alone
        settings |= {"trainer": OmegaConf.to_container(cfg.trainer, resolve=True), "logger": {}}
        settings["callbacks"] = {"progress": {"_target_": "vlm.callbacks.progress.Progress"}}
        if self.benchmarks:
            settings |= {"evaluators": {}, "callbacks": {}}
        config.check(settings)
        self._trainer = processes.check_machine(settings, self.run_dir)
        check_out(self.out)
        self.settings = settings
        if cfg.out is None:
            files.refuse_links(self.out, within=self.run_dir)
        if self.benchmarks:
            benchmarks.check(self.benchmarks, self._who(), self.out, replace=cfg.out is not None)
        elif cfg.out is None:
            keep_other_results(self.out, self._options)
        interrupt.raise_again()

    def _questions(self, images: str | None) -> dict[str, benchmarks.Asked]:
        """The validation file of the command line as a benchmark, if it has questions without an answer."""
        file = self._asked.get("data.val_annotations")
        if file is None or not (num := num_unanswered(Path(file))):
            return {}
        run.CONSOLE.quiet = not run.is_rank_zero()
        run.CONSOLE.print(
            f"{count(num, 'question')} of {file} {'has' if num == 1 else 'have'} no answer, so that there is no loss; "
            "all are asked, as with benchmark=questions.",
            soft_wrap=True,
        )
        return benchmarks.questions(self._cfg, file, images)

    def _who(self) -> benchmarks.Who:
        """The model, for benchmarks."""
        model = config.model_class(self.settings)
        methods = {"generate": Generates, "rank": PredictsTokens}
        parts = {part: self.settings[part] for part in model.groups(self.settings)}
        return benchmarks.Who(
            name=f"ckpt={self.run_dir}",
            identity={
                "manifest": self._manifest,
                "parts": parts,
                "data": {key: config.loader_option(self.settings, key) for key in ("max_length", "system_prompt")},
                "precision": config.precision(self.settings),
            },
            methods=tuple(name for name, protocol in methods.items() if protocol in model.__mro__),  # type: ignore[misc]
        )

    def run_benchmarks(self, model: Model) -> None:
        """Ask each benchmark, and write and print its results."""
        local = Local(
            trainer=build_trainer(self.settings, self.run_dir),
            model=model,
            reader=build_reader(self.settings, model),
            batch_size=self._cfg.batch_size,
            num_workers=self._cfg.num_workers,
        )
        about = {"options_given": self._options, "stages": self._manifest["stages"], "code": run.provenance()}
        for asked in self.benchmarks.values():
            benchmarks.ask(asked, self._who(), local, self.out, against=self._against, about=about)

    def _sizes(self) -> dict[str, Any]:
        """What eval.py's own options are in the run's config."""
        cfg = self._cfg
        sizes = {"data.batch_size": cfg.batch_size, "data.num_val_samples": cfg.num_samples}
        evaluators = config.stored_config(self.run_dir)[0]["evaluators"]
        if "answers" in evaluators:
            sizes |= {f"evaluators.answers.{key}": cfg[key] for key in ("num_samples", "batch_size")}
            if cfg.max_new_tokens is not None:
                sizes["evaluators.answers.max_new_tokens"] = cfg.max_new_tokens
        return sizes

    def report(self, module: VLMModule, data: VLMDataModule) -> None:
        """Print what is evaluated and which figures cannot be. Raises ValueError for other rows than in training."""
        run.CONSOLE.quiet = not run.is_rank_zero()
        if not config.selects_rows(self._asked):
            rows = {"val": data.fingerprints()["val"]}
            check_rows(
                self._manifest.get("data") or {}, rows, "name the data again, for example with data.annotations="
            )
        for evaluator in module.evaluators.values():
            for figure, why in evaluator.missing(data, num_ranks=self._trainer.world_size).items():
                run.CONSOLE.print(f"There will be no {figure}: {why}.", soft_wrap=True)
        num = len(data.val_indices(data.num_val_samples))
        what = ", ".join(["validation", *(name for name, each in module.evaluators.items() if each.at == "end")])
        run.CONSOLE.print(f"Evaluating {self.run_dir}: {what} ({num:,} validation samples)", soft_wrap=True)

    def finish(self, trainer: Any, result: Result) -> None:
        """Write and print the figures."""
        if not trainer.is_global_zero:
            return
        if result.failure is not None and not result.metrics:
            raise result.failure
        content = {
            "metrics": result.metrics,
            "num_samples": len(result.samples),
            "options": self._options,
            "stages": self._manifest["stages"],
            "code": run.provenance(),
        }
        artifact.write_json(self.out / "results.json", content)
        write_samples(self.out / "samples.jsonl", result.samples)
        results.print_metrics(result.metrics)
        results.print_samples(result.samples)
        run.CONSOLE.print(f"Results: {self.out / 'results.json'}", soft_wrap=True)
        if result.failure is not None:
            raise result.failure


def check_out(out: Path) -> None:
    """Raise ValueError where the folder cannot be made or written to, before anything loads."""
    there = next(folder for folder in (out, *out.parents) if os.path.lexists(folder))
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "may not be written to" if there.is_dir() else "is not a folder"
        raise ValueError(f"out={out} cannot be made because {there} {why}; give out=<folder>")


def keep_other_results(out: Path, options: list[str]) -> None:
    """Raise ValueError where a folder holds results of other options, which would be overwritten."""
    file = out / "results.json"
    if not file.is_file():
        return
    before = json.loads(file.read_text(encoding="utf-8")).get("options", [])
    differ = sorted({*before} ^ {*options})
    if differ := [option for option in differ if not option.startswith("ckpt=")]:
        raise ValueError(
            f"{file} holds results that differ in {', '.join(differ)}; give out=<folder> for these, or out={out} to "
            "replace them"
        )
