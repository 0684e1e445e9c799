"""One run of train.py: where it starts from, what it reports before training, and what it writes at the end."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from torch import nn

from vlm import config
from vlm.build import check_rows, num_steps
from vlm.callbacks.save import data_of, newest_checkpoint
from vlm.data.datamodule import VLMDataModule
from vlm.data.preflight import render
from vlm.evaluation.answers import write_samples
from vlm.evaluation.loop import Result, evaluate
from vlm.launch import against, processes, resume, sweep
from vlm.launch.overrides import chosen
from vlm.models.base import Model
from vlm.module import TrainingStopped, VLMModule
from vlm.training import artifact, dashboards, results, run

EARLIER_LORA = {"tokens": "all"}  # options that adapters of earlier versions do not name


class TrainingRun:
    """A run that is new, or resumes from its checkpoint.

    Its directory is locked for as long as this object is there.

    Attributes:
        settings: the checked config.
        manifest: the manifest of the run's artifact; `load` fills it.
        inherited: names of tensors that earlier stages have trained.
        plan: the content of `plan.against`, or None.
        trainer: one without callbacks and loggers, which knows how many processes there will be.
        checkpoint: the file to resume from and its step, or None.
        given: keys of the command line.
        resumes: whether the directory holds this run already, by `resume=` or from an earlier command of a sweep.
        is_finished: whether it is a job of a sweep that an earlier command has finished.
    """

    def __init__(self, cfg: Any) -> None:
        """Raises ValueError for a config that cannot be run, or a directory that another run uses."""
        hydra = HydraConfig.get()
        self.run_dir = Path(hydra.runtime.output_dir)
        is_named = cfg.resume.run is not None
        found = resume.settings(cfg, self.run_dir) if is_named else (config.plain(cfg), chosen(hydra))
        self.settings, self.choices = found
        config.check(self.settings)
        self.resumes = is_named or sweep.continues(self.settings, self.run_dir)
        self.is_finished = self.resumes and not is_named and run.status(self.run_dir) == "finished"
        processes.check_ranks(hydra)
        if self.settings["ckpt"] and not self.resumes:
            artifact.read_manifest(self.settings["ckpt"])
        file = self.settings["plan"].get("against")
        self.plan = against.read_prediction(file) if file else None
        self.trainer = processes.check_machine(self.settings, self.run_dir)
        self.other_data_allowed = is_named and resume.allows_other_data(cfg)
        self.given = [each.key_or_group for each in OverridesParser.create().parse_overrides(hydra.overrides.task)]
        self._is_own = False  # the artifact that was loaded

    def start(self) -> None:
        """Lock the directory, find the checkpoint to resume from, and seed the random numbers."""
        run.CONSOLE.quiet = not run.is_rank_zero()
        self._lock = run.lock(self.run_dir, resumed=self.resumes)
        self.run_id = (config.run_id(self.run_dir) if self.resumes else None) or secrets.token_hex(8)
        parts = [*config.model_class(self.settings).parts]
        self.identity = run.identity(self.run_id, self.settings, self.choices, parts)
        self.checkpoint = newest_checkpoint(self.run_dir, self.identity) if self.resumes else None
        names = dashboards.names(self.choices, parts, **sweep.place_in_sweep(HydraConfig.get()))
        run.name_loggers(self.settings["logger"], step=self._step, names=names)
        pl.seed_everything(self.settings["seed"], verbose=False)

    def load(self, model: Model, manifest: dict[str, Any], objective: nn.Module) -> None:
        """Load what earlier stages trained, or this run before it stopped; complete the manifest."""
        stage, part = self.settings["stage"], model.lora_part()
        earlier = self._load(model, manifest, objective)
        lineage, self.inherited, lora = [], [], None
        changes: dict[str, list[Any]] = {}
        if earlier:
            lineage, self.inherited, lora = earlier["stages"], earlier["tensors"], earlier["lora"]
            if self._is_own:
                lineage, changes = lineage[:-1], lineage[-1].get("changes", {})
            else:
                changes = artifact.changes(earlier, manifest, model)
        trains_adapter = part is not None and stage[part] == "lora"
        if trains_adapter and lora and EARLIER_LORA | lora != EARLIER_LORA | stage["lora"]:
            raise ValueError(
                f"ckpt={self.settings['ckpt'] or self.run_dir} has an adapter with {lora}, stage.lora is "
                f"{stage['lora']}; use the same options, because that adapter is trained further"
            )
        for option, (before, now) in changes.items():
            run.CONSOLE.print(f"This stage changes {option} from {before} to {now}", soft_wrap=True)
        this = {"name": stage["name"], "run": str(self.run_dir), "options": self.choices, "changes": changes}
        self.manifest = manifest | {
            "run": self.identity,
            "lora": stage["lora"] if trains_adapter else lora,
            "objective": artifact.class_path(objective),
            "stages": [*lineage, this],
            "code": run.provenance(),
        }

    def _load(self, model: Model, manifest: dict[str, Any], objective: nn.Module) -> dict[str, Any] | None:
        """The manifest of the artifact that the run starts from, if it starts from one."""
        known: dict[str, Any] = {"model": model, "manifest": manifest, "objective": objective}
        if self.checkpoint:  # the run's own artifact includes that of earlier stages
            try:
                own = artifact.load(self.run_dir, **known, run_id=self.run_id)
                self._is_own = True
                return own
            except artifact.Damaged as error:
                run.CONSOLE.print(f"{error}; the run resumes from its checkpoint", soft_wrap=True)
        ckpt = self.settings["ckpt"]
        # A run that resumes has made its changes already.
        given = model.changeable.values() if self.resumes else self.given
        return artifact.load(ckpt, **known, given=given) if ckpt else None

    def report(self, module: VLMModule, data: VLMDataModule) -> None:
        """Print what is trained, on what data, and which figures cannot be measured.

        Raises ValueError where there is nothing to learn, or a resumed run has other rows than before.
        """
        self.manifest["data"] = data.fingerprints()
        if self.checkpoint and not self.other_data_allowed:
            remedy = f"'resume.allow=[data]' or a new run with ckpt={self.checkpoint[0]}"
            check_rows(data_of(self.checkpoint[0]), self.manifest["data"], remedy)
        model, preflight = module.model, self.settings["preflight"]
        counts = run.count_parameters(model, module.objective)
        run.print_parts(counts, self.choices, self.settings["stage"], decayed=model.layer_decay_part)
        run.CONSOLE.print(extent(data), soft_wrap=True)
        run.CONSOLE.print(render(data.preflight(num_samples=preflight["samples"], show=preflight["show"])))
        if run.is_rank_zero() and (remark := data.check_shared()):
            run.CONSOLE.print(remark, soft_wrap=True)
        if self.plan and (others := against.other_options(self.plan, self.settings)):
            run.CONSOLE.print(f"The plan was made with other options: {'; '.join(others)}", soft_wrap=True)
        best = (self.settings["callbacks"].get("save") or {}).get("best")
        for evaluator in module.evaluators.values():
            for figure, why in evaluator.missing(data, num_ranks=self.trainer.world_size).items():
                if figure == best:
                    raise ValueError(
                        f"callbacks.save.best={best} needs a visual gain, but {why}; set callbacks.save.best=val/loss"
                    )
                run.CONSOLE.print(f"There will be no {figure}: {why}.", soft_wrap=True)

    def num_steps(self, data: VLMDataModule) -> int:
        """The optimizer steps of the run."""
        return num_steps(self.settings, data, num_ranks=self.trainer.world_size)

    def fit(self, trainer: Any, module: VLMModule, data: VLMDataModule) -> Result:
        """Train, then evaluate. A failure after the last step is returned in the result, with the figures before it."""
        if run.is_rank_zero():
            # From here on the directory belongs to this run.
            config.write_config(self.run_dir, self.settings, self.choices, self.run_id)
            run.truncate_metrics(self.run_dir, step=self._step)
        counts = run.count_parameters(module.model, module.objective)
        run.log_config(trainer, self.settings, choices=self.choices, parameters=counts)
        checkpoint = self.checkpoint and self.checkpoint[0]
        try:
            with run.naming_log_folder(trainer):
                trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        except TrainingStopped:
            if trainer.is_global_zero:  # rank 0 reports for all
                raise
            sys.exit(0)
        except Exception as error:
            if trainer.global_step < trainer.max_steps or isinstance(error, artifact.SaveError):
                raise
            return Result(failure=error)  # of the validation after the last step
        if module.stopped_by is not None:
            return Result()
        left = ["validation"] if module.validated_step != trainer.global_step else []
        left += [name for name, evaluator in module.evaluators.items() if evaluator.at == "end"]
        evaluating = f"; evaluating: {', '.join(left)}" if left else ""
        run.CONSOLE.print(f"Training ended after step {trainer.global_step}{evaluating}", soft_wrap=True)
        return evaluate(trainer, module, data)

    def finish(self, trainer: Any, module: VLMModule, data: VLMDataModule, result: Result) -> None:
        """Write and print the figures; exit with 128 + the signal where one has stopped the run."""
        metrics = {name: float(v) for name, v in module.figures.items() if name == "train/loss"} | result.metrics
        if result.failure is None or trainer.world_size == 1:  # other ranks may not reach this call
            metrics |= data.counts()
        if trainer.is_global_zero:
            counts = run.count_parameters(module.model, module.objective).values()
            metrics |= module.totals
            metrics |= {f"params/{kind}": sum(part[kind] for part in counts) for kind in ("trainable", "total")}
            if self.plan:
                metrics |= {f"plan/{key}": self.plan[key] for key in against.PREDICTED}
            write_samples(self.run_dir / "samples.jsonl", result.samples)
            results.finish(self.run_dir, metrics, result.samples, self._status(trainer, module, result))
            if self.plan:
                run.CONSOLE.print(against.beside(self.plan, metrics))
            of_run: dict[str, Any] = {"run_dir": self.run_dir, "identity": self.identity}
            run.close_loggers(trainer, metrics, **of_run, failed=result.failure is not None)
        if result.failure is not None:
            raise result.failure
        if module.stopped_by is not None and trainer.is_global_zero:
            sys.exit(128 + module.stopped_by)

    @property
    def _step(self) -> int:
        return self.checkpoint[1] if self.checkpoint else 0

    @staticmethod
    def _status(trainer: Any, module: VLMModule, result: Result) -> run.Status:
        if module.stopped_by is not None:
            return "stopped"
        if result.failure is not None:
            return "failed"
        is_finished = trainer.global_step >= trainer.max_steps or module.budget_is_spent
        return "finished" if is_finished else "time_up"


def extent(data: VLMDataModule) -> str:
    """The samples of each split."""
    num_train, num_val = len(data.splits["train"]), len(data.splits["val"])
    validated = len(data.val_indices(data.num_val_samples))
    read = f", of which a validation reads {validated:,}" if validated < num_val else ""
    return f"Data: {num_train:,} training samples, {num_val:,} validation samples{read}"
