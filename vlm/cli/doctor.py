"""Report the defects of a dataset before training on it: vlm-doctor data=… [data.…] [llm=… connector=…]."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from vlm.launch.entry import start
from vlm.ranges import Name, Range


@dataclass(frozen=True)
class Options:
    """The section `doctor` of conf/doctor.yaml, which explains each option."""

    out: Name
    against: Name | None
    languages: bool
    score: bool
    similarity: Annotated[float, Range(0, 1)]
    num_low_scores: Annotated[int, Range(0, 10**6)]
    filter_kinds: list[str]


def doctor(cfg: Any) -> None:
    """Read both splits, print the findings, and write the files."""
    from functools import partial

    from rich.text import Text
    from torch.utils.data import DataLoader, Dataset

    from vlm import build
    from vlm.cli import doctor_report
    from vlm.cli.doctor_score import scores
    from vlm.data.checkup import Checkup, EntryDataset, Folder
    from vlm.data.findings import find, lowest_scores
    from vlm.data.reading import applied
    from vlm.schema import BAD_KINDS
    from vlm.text.language import identifier
    from vlm.training import artifact, run

    settings, options, parts = _settings(cfg)
    language = identifier() if options.languages else None
    benchmark = Folder(options.against) if options.against else None
    data = build.build_data(settings, None)
    model = _model(settings, weights=options.score)
    build.connect_data(data, settings, model)
    bar = _bar()

    def read(dataset: Dataset[Any], what: str) -> Any:
        """The items of the dataset in order, read by the workers of a loader."""
        workers = data.num_workers
        context = "fork" if workers else None
        loader = DataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=context)
        return bar.track(loader, total=len(loader), description=what)

    with bar, applied(data.reading):
        entries = {
            split: EntryDataset(source=source, reader=data.reader, language=language)
            for split, source in data.splits.items()
        }
        checkups = {split: Checkup(read(dataset, f"reading {split}")) for split, dataset in entries.items()}
        if benchmark is not None:
            benchmark.keep(read(benchmark, "reading the benchmark"))
        findings = find(checkups, data.splits, benchmark, similarity=options.similarity)
        report = doctor_report.summary(parts, model.num_visual_tokens, checkups, data.splits, benchmark)
        if options.score:
            for split, checkup in checkups.items():
                indices = sorted({*checkup.hash_owners})
                task = bar.add_task(f"scoring {split}", total=len(indices))
                found = scores(settings, model, data, split, indices, partial(bar.advance, task))
                report["splits"][split]["score"] = doctor_report.statistics(found)
                findings += lowest_scores(split, checkup, found, options.num_low_scores)

    out, kinds = Path(options.out), {*BAD_KINDS, *options.filter_kinds}
    doctor_report.print_tables(report, findings, kinds)
    with applied(data.reading):
        doctor_report.write(out, report, findings, data.splits)
    if settings["data"].get("filter") is None:
        chosen = doctor_report.filter_of(checkups, findings, kinds)
        artifact.write_json(out / "filter.json", chosen)
        lines = doctor_report.left_out(chosen, findings, kinds)
        if lines and all(len(part["indices"]) < part["num_samples"] for part in chosen.values()):
            lines.append(f"Leave these samples out: data.filter={out / 'filter.json'}")
    else:
        lines = ["No filter.json was written, because data.filter is set; run vlm-doctor without it for a new one"]
    run.CONSOLE.print(Text("\n".join([*lines, f"Report: {out / 'report.html'}"])), soft_wrap=True)


def _settings(cfg: Any) -> tuple[dict[str, Any], Options, dict[str, str]]:
    """The config without its section `doctor`, that section, and the name of each part's option.

    Raises ValueError for options that cannot be used, before any work.
    """
    from hydra.core.hydra_config import HydraConfig

    from vlm import config
    from vlm.data.findings import KINDS
    from vlm.options import bind_class, unknown_key

    settings = config.plain(cfg)
    options: Options = bind_class("doctor", Options, settings.pop("doctor"))()
    for kind in options.filter_kinds:
        if kind not in KINDS:
            raise ValueError(unknown_key(f"doctor.filter_kinds={kind}", KINDS, asked=kind))
    if options.score and not settings["ckpt"]:
        raise ValueError("doctor.score=true needs a trained model; set ckpt=<run dir>")
    if Path(options.out).exists():
        raise ValueError(f"doctor.out={options.out} exists already; choose another folder")
    choices = dict(HydraConfig.get().runtime.choices)
    if settings["ckpt"]:
        theirs, choices = _parts_of(settings["ckpt"], settings)
        settings |= theirs
    config.check(settings)
    settings["data"]["text_replay"] = 0.0  # the report and filter.json are about the dataset alone
    parts = config.model_class(settings).groups(settings)
    return settings, options, {part: choices.get(part) or _class_name(settings[part]) for part in parts}


def _class_name(options: dict[str, Any]) -> str:
    return str(options["_target_"]).rpartition(".")[2]


def _bar() -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from vlm.training.run import CONSOLE

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=CONSOLE, disable=not CONSOLE.is_terminal)


def _parts_of(run_dir: str, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config sections of a run's model, and the options that the run chose.

    A run from elsewhere may not set paths, such as the folder of weights; the command line may.
    """
    from hydra.core.hydra_config import HydraConfig

    from vlm import config
    from vlm.launch.command_line import SAID_AGAIN
    from vlm.training import artifact, trust

    artifact.read_manifest(run_dir)
    said = [word.lstrip("+").partition("=")[0] for word in HydraConfig.get().overrides.task if SAID_AGAIN.match(word)]
    given = {key: value for key, value in trust.leaves(settings) if key in said}
    theirs, choices = config.read_config(Path(run_dir), given=given)
    return {section: theirs[section] for section in trust.model_sections(theirs)}, choices


def _model(settings: dict[str, Any], *, weights: bool) -> Any:
    """The trained model; without `weights`, a model on the meta device with the LLM's own tokenizer."""
    import torch

    from vlm import build
    from vlm.launch.probe import without_weights
    from vlm.training import artifact

    if weights:
        model, manifest = build.build_model(settings)
        artifact.load(settings["ckpt"], model=model, manifest=manifest)
        return model
    shapes: Any
    with torch.device("meta"):
        shapes, _ = build.build_model(without_weights(settings))
    shapes.load_tokenizer(settings)
    return shapes


def main() -> None:
    start(doctor, config_name="doctor")


if __name__ == "__main__":
    main()
