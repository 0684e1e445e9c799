"""Train one stage: python train.py [encoder=… connector=… llm=… data=… stage=…] [key=value …].

`python train.py resume=<run dir>` resumes a run that ended too soon; `python train.py experiment=…` may run
several stages one after the other. `python train.py --help` lists the groups.
"""

from __future__ import annotations

from typing import Any

from vlm.launch import interrupt
from vlm.launch.dispatch import single_run


@single_run(script=__file__)
def train(run: Any) -> None:
    """Build the parts of a `TrainingRun`, fit, evaluate, save."""
    from vlm import build

    run.start()
    data = build.build_data(run.settings, run.run_dir)
    model, manifest = build.build_model(run.settings)
    objective = build.build_objective(run.settings)
    run.load(model, manifest, objective)
    module = build.build_module(run.settings, model, objective)
    build.connect_data(data, run.settings, model)
    run.report(module, data)
    of_the_run = {"manifest": run.manifest, "inherited": run.inherited}
    trainer = build.build_trainer(run.settings, run.run_dir, max_steps=run.num_steps(data), **of_the_run)
    result = run.fit(trainer, module, data)
    run.finish(trainer, module, data, result)


if __name__ == "__main__":
    interrupt.end_at_once()
    from vlm.launch.entry import start

    start(train, config_name="train")
