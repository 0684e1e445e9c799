"""Evaluate a run on its validation split: python eval.py ckpt=<run dir> [num_samples=… batch_size=… data.<key>=…]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm.cli.entry import start


def evaluate(cfg: Any) -> None:
    """Loss, visual gain and answers of a run's artefact on its bases, into <run dir>/eval/."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from vlm import artifact, build, run
    from vlm.artifact import write_json
    from vlm.evaluation.runner import answer, score, write_samples

    run_dir = Path(cfg.ckpt).absolute()
    manifest = artifact.read_manifest(run_dir)
    settings, _ = build.read_config(run_dir)
    build.enter_folder_of(run_dir)
    settings["stage"] = {**settings["stage"], "ema_decay": None}  # of training alone
    settings |= {"trainer": OmegaConf.to_container(cfg.trainer, resolve=True), "logger": {}, "callbacks": {}}
    if cfg.num_samples is not None and cfg.num_samples < 2:
        raise ValueError(f"num_samples={cfg.num_samples} is too few to compare images; set it to 2 or more")
    loader = {"batch_size": cfg.batch_size, "num_val_samples": cfg.num_samples}
    settings["data"] = OmegaConf.to_container(OmegaConf.merge(settings["data"], loader, cfg.data), resolve=True)
    build.check(settings)

    model, ours = build.build_model(settings)
    artifact.load(run_dir, model=model, manifest=ours)
    module = build.build_module(settings, model)
    data = build.build_data(settings, model, None)
    trainer = build.build_trainer(settings, run_dir, [])
    trainer.validate(module, datamodule=data, verbose=False)
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
    if not trainer.is_global_zero:
        return
    figures = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
    figures |= {f"val/{name}": value for name, value in score(records).items()}
    results = {
        "metrics": figures,
        "num_samples": len(records),
        "options": [option.lstrip("+") for option in HydraConfig.get().overrides.task],
        "stages": manifest["stages"],
        "code": run.provenance(),
    }
    write_json(run_dir / "eval" / "results.json", results)
    write_samples(run_dir / "eval" / "samples.jsonl", records)
    run.print_figures(figures)
    run.print_samples(records)
    run.CONSOLE.print(f"Results: {run_dir / 'eval' / 'results.json'}", soft_wrap=True)


if __name__ == "__main__":
    start(evaluate, config_name="eval")
