"""Train one stage: python train.py [encoder=… connector=… llm=… data=… stage=…] [key=value …].

`python train.py resume=<run dir>` resumes a run that ended too soon; `python train.py experiment=…` may run
several stages one after the other.
"""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import Any

from vlm.cli import interrupt


def train(cfg: Any) -> None:
    """One run, from the config to the figures in its run directory."""
    # Imported here: a misspelt option should be told before a second's worth of libraries.
    import lightning.pytorch as pl
    from hydra.core.hydra_config import HydraConfig

    from vlm import artifact, build, run
    from vlm.callbacks.rates import ConfiguredRates
    from vlm.callbacks.save import Save, data_of, newest_checkpoint
    from vlm.callbacks.stop import StopOnSignal
    from vlm.callbacks.throughput import Throughput
    from vlm.cli import launch, plan, recipe, resume
    from vlm.cli.overrides import chosen
    from vlm.data.preflight import render
    from vlm.evaluation.looking import check_comparison
    from vlm.evaluation.runner import answer, score, write_samples
    from vlm.module import Ended

    interrupt.raise_again()
    hydra = HydraConfig.get()
    if cfg.recipe is not None and cfg.resume.run is None:
        recipe.run_stages(cfg)
        return
    cfg.run_dir = hydra.runtime.output_dir  # a sweep has its own, and the loggers' folders follow
    if plan.wanted(cfg):
        if cfg.resume.run is not None:
            raise ValueError("plan=true shows what a new run would cost; leave out resume=")
        plan.plan(cfg)
        return
    run_dir = Path(hydra.runtime.output_dir)
    resumed = cfg.resume.run is not None
    settings, choices = resume.settings(cfg, run_dir) if resumed else (build.plain(cfg), chosen(hydra))
    build.check(settings)
    launch.check_ranks(hydra)
    if settings["ckpt"] and not resumed:
        artifact.read_manifest(settings["ckpt"])
    trainer = launch.check_machine(settings, run_dir)
    if launch.in_its_own_process(hydra, trainer, __file__):
        return
    first = run.first_rank()
    run.CONSOLE.quiet = not first
    _lock = run.claim(run_dir, resumed=resumed)  # until this function ends
    run_id = (build.run_id(run_dir) if resumed else None) or secrets.token_hex(8)
    identity = run.identity(run_id, settings, choices)
    checkpoint = newest_checkpoint(run_dir, identity) if resumed else None
    run.name_loggers(settings["logger"], step=checkpoint[1] if checkpoint else 0)
    pl.seed_everything(settings["seed"], verbose=False)

    model, manifest = build.build_model(settings)
    lineage, inherited = [], []
    whole = bool(checkpoint)
    if ckpt := run_dir if whole else settings["ckpt"]:  # a run that goes on has all of earlier stages itself
        try:
            earlier = artifact.load(ckpt, model=model, manifest=manifest, run_id=run_id if whole else None)
        except artifact.Damaged as error:
            if not whole:
                raise
            run.CONSOLE.print(f"{error}; the run goes on from its checkpoint", soft_wrap=True)
            whole, ckpt = False, settings["ckpt"]
            earlier = artifact.load(ckpt, model=model, manifest=manifest) if ckpt else None
    if ckpt:
        lineage, inherited = earlier["stages"][: -1 if whole else None], earlier["tensors"]
        manifest["lora"] = earlier["lora"]
        if settings["stage"]["llm"] == "lora" and earlier["lora"] not in (None, settings["stage"]["lora"]):
            raise ValueError(
                f"ckpt={ckpt} has an adapter with {earlier['lora']}, stage.lora is "
                f"{settings['stage']['lora']}; use the same, one adapter is trained on"
            )
    module = build.build_module(settings, model)
    stage = settings["stage"]
    manifest |= {
        "run": identity,
        "lora": stage["lora"] if stage["llm"] == "lora" else manifest.get("lora"),
        "stages": [*lineage, {"name": stage["name"], "run": str(run_dir), "options": choices}],
        "code": run.provenance(),
    }
    data = build.build_data(settings, model, run_dir)
    manifest["data"] = data.fingerprints()
    if checkpoint and not resume.allows_other_data(cfg):
        build.check_rows(data_of(checkpoint[0]), manifest["data"], f"'resume.allow=[data]' or a new run with {ckpt=!s}")
    run.print_parts(run.count_parameters(model), choices, stage)
    checks = settings["preflight"]
    run.CONSOLE.print(render(data.preflight(num_samples=checks["samples"], show=checks["show"])))
    if first and (remark := data.check_shared()):
        run.CONSOLE.print(remark, soft_wrap=True)
    save = Save(run_dir=run_dir, manifest=manifest, inherited=inherited, **settings["checkpoint"])
    watchers = [*build.build_ema(stage), save, *([ConfiguredRates()] if checkpoint else [])]
    trainer = build.build_trainer(settings, run_dir, watchers)
    num_ranks = trainer.num_nodes * trainer.num_devices
    if remark := check_comparison(data, num_ranks=num_ranks, best=settings["checkpoint"].get("best")):
        run.CONSOLE.print(remark, soft_wrap=True)
    if first:
        build.write_config(run_dir, settings, choices, run_id)  # from here on the directory is taken
        run.forget_after(run_dir, step=checkpoint[1] if checkpoint else 0)
    run.log_options(trainer, settings)
    failure: Exception | None = None  # what fails after the last step takes no figures with it
    try:
        with run.disk_of_loggers(trainer):
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint and checkpoint[0], weights_only=True)
    except Ended:
        if trainer.is_global_zero:  # rank 0 reports for all
            raise
        return
    except Exception as error:
        if trainer.global_step < trainer.max_steps or isinstance(error, artifact.SaveError):
            raise
        failure = error  # of the validation after the last step
    by_type = {type(callback): callback for callback in trainer.callbacks}
    received = by_type[StopOnSignal].agree(trainer) if StopOnSignal in by_type and failure is None else None
    metrics = {name: float(v) for name, v in module.figures.items() if name == "train/loss"}
    records: list[dict[str, Any]] = []
    if received is None and failure is None:
        try:
            if module.validated_step != trainer.global_step:
                trainer.validate(module, datamodule=data, verbose=False)
            kinds = ("val/", "text/")
            metrics |= {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith(kinds)}
            with trainer.precision_plugin.forward_context():
                answers = dict(settings["answers"])
                indices = data.val_indices(answers.pop("num_samples"))
                model.to(device := trainer.strategy.root_device)  # Lightning has taken it away
                records = answer(model.eval(), data, indices, device=device, **answers)  # all ranks the same
            metrics |= {f"val/{name}": value for name, value in score(records).items()}
        except Exception as error:
            failure = error
    if failure is None or trainer.world_size == 1:  # other ranks may not have come so far
        metrics |= data.counts()
    if trainer.is_global_zero:
        if Throughput in by_type:
            metrics |= by_type[Throughput].totals
        counts = run.count_parameters(model).values()
        metrics |= {f"params/{kind}": sum(part[kind] for part in counts) for kind in ("trainable", "total")}
        write_samples(run_dir / "samples.jsonl", records)
        run.finish(run_dir, metrics, records)
        for logger in trainer.loggers:
            with run.disk_of_loggers(trainer):
                logger.log_metrics(metrics, step=trainer.global_step)
                logger.finalize("success" if failure is None else "failed")
            if finish := getattr(logger.experiment, "finish", None):  # W&B's: or a sweep's next job would log into it
                finish()
    if failure is not None:
        raise failure
    if received is not None and trainer.is_global_zero:
        sys.exit(128 + received)


if __name__ == "__main__":
    interrupt.end_at_once()
    from vlm.cli.entry import start

    start(train, config_name="train")
