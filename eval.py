"""Evaluate a run on its validation split: python eval.py ckpt=<run dir> [num_samples=… data.<key>=… out=<folder>]."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vlm.cli import interrupt


def evaluate(cfg: Any) -> None:
    """Loss, visual gain and answers of a run's artifact on its bases, into <run dir>/eval/ or `out`."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from vlm import artifact, build, files, run
    from vlm.artifact import write_json
    from vlm.cli import launch
    from vlm.cli.overrides import absolute_paths
    from vlm.evaluation.looking import check_comparison
    from vlm.evaluation.runner import answer, score, write_samples

    build.check_evaluation(cfg)
    run_dir = Path(cfg.ckpt).absolute()
    manifest = artifact.read_manifest(run_dir)
    loader = {"data.batch_size": cfg.batch_size, "data.num_val_samples": cfg.num_samples}
    asked = build.given(cfg, ("data", "encoder", "connector", "llm"))
    asked = absolute_paths(asked, "")  # from the user's folder, not the run's
    settings, _ = build.read_config(run_dir, given={**loader, **asked})
    options = [option.lstrip("+") for option in HydraConfig.get().overrides.task]
    out = Path(cfg.out or run_dir / "eval").absolute()
    build.enter_folder_of(run_dir)
    settings["stage"] = {**settings["stage"], "ema_decay": None}  # of training alone
    settings |= {"trainer": OmegaConf.to_container(cfg.trainer, resolve=True), "logger": {}, "callbacks": {}}
    build.check(settings)
    launch.check_machine(settings, run_dir)
    _check_out(out)
    if cfg.out is None:
        files.refuse_links(out, within=run_dir)
        _keep_other_results(out, options)

    interrupt.raise_again()
    model, ours = build.build_model(settings)
    artifact.load(run_dir, model=model, manifest=ours, run_id=build.run_id(run_dir))
    module = build.build_module(settings, model)
    data = build.build_data(settings, model, None)
    if not build.names_rows(asked):
        rows = {"val": data.fingerprints()["val"]}
        build.check_rows(manifest.get("data") or {}, rows, "name them again with data.annotations= or its like")
    trainer = build.build_trainer(settings, run_dir, [])
    if remark := check_comparison(data, num_ranks=trainer.num_nodes * trainer.num_devices):
        run.CONSOLE.print(remark, markup=False, soft_wrap=True)
    trainer.validate(module, datamodule=data, verbose=False)
    records, failure = [], None
    try:
        with trainer.precision_plugin.forward_context():
            model.to(device := trainer.strategy.root_device)  # Lightning has taken it away
            records = answer(
                model.eval(),
                data,
                data.val_indices(cfg.num_samples),
                batch_size=cfg.batch_size,
                device=device,
                max_new_tokens=cfg.max_new_tokens,
            )
    except Exception as error:
        failure = error  # which takes no figures with it
    if not trainer.is_global_zero:
        return
    figures = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
    figures |= {f"val/{name}": value for name, value in score(records).items()}
    results = {
        "metrics": figures,
        "num_samples": len(records),
        "options": options,
        "stages": manifest["stages"],
        "code": run.provenance(),
    }
    write_json(out / "results.json", results)
    write_samples(out / "samples.jsonl", records)
    run.print_figures(figures)
    run.print_samples(records)
    run.CONSOLE.print(f"Results: {out / 'results.json'}", soft_wrap=True)
    if failure is not None:
        raise failure


def _check_out(out: Path) -> None:
    """Raise ValueError where a folder cannot be made or written to, before anything loads."""
    there = next(folder for folder in (out, *out.parents) if os.path.lexists(folder))
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "may not be written to" if there.is_dir() else "is not a folder"
        raise ValueError(f"out={out} cannot be made because {there} {why}; give out=<folder>")


def _keep_other_results(out: Path, options: list[str]) -> None:
    """Raise ValueError where a folder holds the results of other options, which would be lost."""
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


if __name__ == "__main__":
    interrupt.end_at_once()
    from vlm.cli.entry import start

    start(evaluate, config_name="eval")
