"""What is wrong with a dataset, before anything is trained on it: vlm-doctor data=… [data.…] [llm=… connector=…]."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm.cli.entry import start


@dataclass(frozen=True)
class Options:
    """The section `doctor` of conf/doctor.yaml, where each is explained."""

    out: str
    against: str | None = None
    languages: bool = True
    score: bool = False
    num_low_scores: int = 20
    filter_kinds: list[str] = field(default_factory=list)


def doctor(cfg: Any) -> None:
    """Read both splits, report what was found, and write the files."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from torch.utils.data import DataLoader, Dataset

    from vlm import artifact, build, run
    from vlm.cli import doctor_report
    from vlm.cli.doctor_score import scores
    from vlm.data.checkup import BAD, Checkup, Folder, Reader
    from vlm.data.duplicates import Looks
    from vlm.data.findings import KINDS, find, lowest_scores
    from vlm.schema import Split
    from vlm.text.language import identifier

    settings = build.plain(cfg)
    options: Options = build.bind("doctor", {"_target_": f"{__package__}.doctor.Options", **settings.pop("doctor")})()
    for kind in options.filter_kinds:
        if kind not in KINDS:
            raise ValueError(build.unknown_key(f"doctor.filter_kinds={kind}", KINDS, asked=kind))
    if options.score and not settings["ckpt"]:
        raise ValueError("doctor.score=true asks a trained model; set ckpt=<run dir>")
    if settings["ckpt"]:
        settings |= _parts_of(settings["ckpt"])
    build.check(settings)
    out = Path(options.out)
    if out.exists():
        raise ValueError(f"doctor.out={out} exists already; choose another folder")
    language = identifier() if options.languages else None
    benchmark = Folder(options.against) if options.against else None
    model = _model(settings, weights=options.score)
    data = build.build_data({**settings, "data": {**settings["data"], "packing": False}}, model, None)

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=run.CONSOLE,
        disable=not run.CONSOLE.is_terminal,
    )

    def read(dataset: Dataset[Any], what: str) -> Any:
        """The dataset's items in order, read by the loader's workers."""
        workers = data.num_workers
        context = "fork" if workers else None
        loader = DataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=context)
        return bar.track(loader, total=len(dataset), description=what)  # type: ignore[arg-type]

    checkups: dict[Split, Checkup] = {}
    against: tuple[Looks, list[str]] | None = None
    with bar:
        for split, source in data.splits.items():
            checkups[split] = Checkup()
            for entry in read(Reader(source=source, text=data.text, language=language), f"reading {split}"):
                checkups[split].add(entry)
        if benchmark is not None:
            against = (Looks(), [])
            for name, look in zip(benchmark.names, read(benchmark, "reading the benchmark"), strict=True):
                if look is not None:
                    against[0].append(look)
                    against[1].append(name)
        findings = find(checkups, data.splits, against)
        report = doctor_report.summary(settings, model.connector.num_tokens, checkups, data.splits)
        if options.score:
            for split, checkup in checkups.items():
                indices = sorted({*checkup.owners})
                task = bar.add_task(f"scoring {split}", total=len(indices))
                found = scores(settings, model, data, split, indices, lambda n, task=task: bar.advance(task, n))
                report["splits"][split]["score"] = doctor_report.spread(found)
                findings += lowest_scores(split, checkup, found, options.num_low_scores)
    if benchmark is not None and against is not None:
        num, unreadable = len(benchmark), len(benchmark) - len(against[1])
        report["against"] = {"folder": options.against, "images": num, "unreadable": unreadable}

    kinds = {*BAD, *options.filter_kinds}
    doctor_report.print_tables(report, findings, kinds)
    doctor_report.write(out, report, findings, data.splits)
    if settings["data"]["filter"] is None:
        artifact.write_json(out / "filter.json", doctor_report.filter_of(checkups, findings, kinds))
        run.CONSOLE.print(f"Leave these samples out: data.filter={out / 'filter.json'}", soft_wrap=True, markup=False)
    else:
        run.CONSOLE.print("No filter.json: the samples came through data.filter; run without it for a new one")
    run.CONSOLE.print(f"Report: {out / 'report.html'}", soft_wrap=True, markup=False)


def _parts_of(run_dir: str) -> dict[str, Any]:
    """The parts that a run has trained; its data, trainer and seed stay what the command line says."""
    from omegaconf import OmegaConf

    from vlm import artifact, build

    artifact.read_manifest(run_dir)
    theirs = build.plain(OmegaConf.load(Path(run_dir) / "config.yaml"))  # type: ignore[arg-type]
    return {part: theirs[part] for part in ("encoder", "connector", "llm", "model", "stage")}


def _model(settings: dict[str, Any], *, weights: bool) -> Any:
    """The trained model; or, without `weights`, its shapes on the meta device with the LLM's own tokenizer."""
    import torch

    from vlm import artifact, build
    from vlm.llms.loading import load_tokenizer

    if weights:
        model, manifest = build.build_model(settings)
        artifact.load(settings["ckpt"], model=model, manifest=manifest)
        return model
    llm = settings["llm"]
    meta = {part: {**settings[part], "weights": "meta"} for part in ("encoder", "llm")}
    shapes: Any
    with torch.device("meta"):
        shapes, _ = build.build_model({**settings, **meta})
    if llm["weights"] == "pretrained":
        shapes.llm.tokenizer = load_tokenizer(llm["pretrained"], package=llm["package"], trust=llm["trust_remote_code"])
    return shapes


def main() -> None:
    start(doctor, config_name="doctor")


if __name__ == "__main__":
    main()
