"""A report in W&B about the runs of a sweep: python -m vlm.cli.wandb_report DIR (extra `wandb-report`)."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.launch.entry import fail, quiet

STEP = "trainer/global_step"
CURVES = ("val/loss", "val/visual_gain", "train/loss", "train/grad_norm")
COSTS = ("params/trainable", "perf/step_seconds", "perf/peak_memory_gb")
NOT_COMPARED = ("logger", "callbacks", "debug")  # groups that change no result, beside those of Hydra


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vlm.cli.wandb_report", description=__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of a sweep whose jobs had logger=wandb")
    parser.add_argument("--entity", help="user or team of the runs in W&B (default: that of the key)")
    asked = parser.parse_args(arguments)
    quiet()
    try:
        print(report(asked.folder, entity=asked.entity))
    except (ValueError, OSError) as error:
        fail(str(error))


def report(folder: Path, *, entity: str | None = None) -> str:
    """Save the report of a sweep in W&B and return its address. Raises ValueError where it cannot be made."""
    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError as error:
        raise ValueError(
            "the package wandb-workspaces is not installed; pip install 'vlm-template[wandb-report]'"
        ) from error
    import wandb

    jobs = _jobs(folder)
    loggers = [logger for logger, _ in jobs]
    project, group = (_same(key, loggers, folder) for key in ("project", "group"))
    compared = _differing([choices for _, choices in jobs])
    if not wandb.login(prompt=False, verify=False):
        raise ValueError("W&B has no key, and a report is made on its server; run wandb login first")
    entity = entity or str(wandb.Api().default_entity)
    keys = [f"config.choices.{name}" for name in compared]
    runs = wr.Runset(entity=entity, project=project, name=group, filters=f"Group = '{group}'", groupby=keys)
    curves = [wr.LinePlot(title=name, x=STEP, y=[name]) for name in CURVES]
    of_choice = keys[0] if keys else None
    bars = [
        wr.BarPlot(title=f"{name}, mean", metrics=[name], groupby=of_choice, groupby_aggfunc="mean")
        for name in CURVES[:2]
    ]
    loss = wr.SummaryMetric("val/loss")
    costs = [wr.ScatterPlot(title=f"val/loss by {name}", x=wr.SummaryMetric(name), y=loss) for name in COSTS]
    axes = [wr.Config(f"choices.{name}") for name in compared] + [loss]
    coordinates = wr.ParallelCoordinatesPlot(columns=[wr.ParallelCoordinatesPlotColumn(metric=axis) for axis in axes])
    blocks: list[Any] = []
    sections: dict[str, list[Any]] = {
        "Results": [*bars, coordinates],
        "Curves": [*curves],
        "Costs": [*costs],
        "Answers at the last validation": [wr.WeavePanelSummaryTable(table_name="val/samples")],
        "Options": [wr.RunComparer(diff_only="split")],
    }
    for title, panels in sections.items():
        blocks += [wr.H2(title), wr.PanelGrid(runsets=[runs], panels=panels)]
    title = f"{group}: {' × '.join(compared)}" if compared else group
    made = wr.Report(entity=entity, project=project, title=title[:128], blocks=blocks, width="fluid")
    return str(made.save().url)


def _jobs(folder: Path) -> list[tuple[dict[str, Any], dict[str, str | None]]]:
    """The options of W&B's logger and the choices of each run below a folder that has such a logger."""
    from vlm import config

    found = []
    for file in sorted(folder.rglob("config.yaml")):
        settings, choices, _ = config.stored_config(file.parent)
        found += [
            (options, choices)
            for options in settings["logger"].values()
            if options and options["_target_"] == "vlm.loggers.wandb.Wandb"
        ]
    if not found:
        raise ValueError(f"no run in {folder} has been logged to W&B; start the sweep with logger=wandb")
    return found


def _same(key: str, loggers: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """The value that all loggers have. Raises ValueError where they have several, or none."""
    values = sorted({str(logger[key]) for logger in loggers if logger.get(key)})
    if len(values) != 1:
        raise ValueError(
            f"the runs in {folder} have {len(values)} values of logger.wandb.{key} ({', '.join(values)}) where the "
            "report needs 1; name the folder of one sweep"
        )
    return values[0]


def _differing(choices: Sequence[Mapping[str, str | None]]) -> list[str]:
    """The groups of which the jobs have different options."""
    groups = [name for name in choices[0] if "/" not in name and name not in NOT_COMPARED]
    return [name for name in groups if len({each.get(name) for each in choices}) > 1]


if __name__ == "__main__":
    main()
