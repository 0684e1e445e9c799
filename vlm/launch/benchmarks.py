"""Benchmarks of eval.py: which are asked, what identifies their results, and where these are written."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from rich.progress import Progress

from vlm import files
from vlm.evaluation import harness
from vlm.evaluation.answers import MaxNewTokens, write_samples
from vlm.evaluation.benchmarks.base import Benchmark, Record
from vlm.evaluation.benchmarks.questions import Questions
from vlm.evaluation.prompts import Prompts, Shots, choose_shots, nearest_shots
from vlm.evaluation.respondent import Answer, Respondent
from vlm.launch.overrides import absolute_paths
from vlm.options import bind, check_keys, check_mapping, check_values, find_class, parameters
from vlm.ranges import Number, Range, Samples, Seed
from vlm.schema import hashed
from vlm.text.turns import count
from vlm.training import artifact, run
from vlm.training.results import print_samples, print_table

SHARED: dict[str, Any] = {  # options of every benchmark, given for one or, as benchmark.<key>=, for all
    "num_samples": Samples | None,
    "num_shots": Annotated[int, Range(0, 256)],
    "shots": Shots,
    "shuffled_answers": bool,
    "shots_without_images": bool,
    "seed": Seed,
    "prompt": str,
    "max_new_tokens": MaxNewTokens,
    "demonstrations": dict[str, Any],
}


@dataclass(frozen=True)
class Who:
    """Whom the questions go to.

    Attributes:
        name: for errors.
        identity: all that the answers depend on beside the benchmark, as JSON values.
        methods: the ways of asking that it can do.
    """

    name: str
    identity: Mapping[str, Any]
    methods: tuple[Literal["generate", "rank"], ...]


@dataclass(frozen=True)
class Asked:
    """A benchmark with the options it was given."""

    name: str
    benchmark: Benchmark
    options: Mapping[str, Any]
    demonstrations: Benchmark | None
    num_samples: int | None = None
    num_shots: int = 0
    shots: Literal["fixed", "random", "nearest"] = "fixed"
    shuffled_answers: bool = False
    shots_without_images: bool = False
    seed: int = 0

    @property
    def indices(self) -> list[int]:
        """The questions that are asked, spread evenly over the benchmark."""
        units: dict[str, list[int]] = {}
        for index, question in enumerate(self.benchmark.questions):
            units.setdefault(question.unit or question.id, []).append(index)
        together, num = list(units.values()), len(units)
        wanted = num if self.num_samples is None else min(self.num_samples, num)
        return sorted(index for number in range(wanted) for index in together[number * num // wanted])

    def prompts(self, respondent: Respondent) -> Prompts:
        """The questions as conversations, with their demonstrations."""
        shots: list[list[int]] = []
        if self.num_shots:
            assert self.demonstrations is not None
            if self.shots == "nearest":
                questions, shown = respondent.embed(self.benchmark), respondent.embed(self.demonstrations)
                shots = nearest_shots(
                    self.benchmark, self.demonstrations, num_shots=self.num_shots, questions=questions, shown=shown
                )
            else:
                shots = choose_shots(
                    self.benchmark, self.demonstrations, num_shots=self.num_shots, shots=self.shots, seed=self.seed
                )
        return Prompts(
            benchmark=self.benchmark,
            demonstrations=self.demonstrations,
            shots=shots,
            shuffled_answers=self.shuffled_answers,
            without_images=self.shots_without_images,
            reading=respondent.reading,
        )

    def key(self, who: Who) -> str:
        """A hash of what the answers depend on."""
        benchmark = self.benchmark
        texts = [(question.id, benchmark.ask(question), question.choices) for question in benchmark.questions]
        parts = [harness.VERSION, type(benchmark).__qualname__, benchmark.version, benchmark.method]
        asked = [self.indices, self.num_shots, self.shots, self.seed, benchmark.max_new_tokens]
        asked += [name for name in ("shuffled_answers", "shots_without_images") if getattr(self, name)]
        identity = json.dumps(who.identity, sort_keys=True, default=str)
        return hashed(*parts, *asked, self.options.get("demonstrations"), identity, texts)


def read(cfg: Any) -> dict[str, Asked]:
    """The benchmarks of eval.py's config, with its own options as defaults of theirs; paths are from this folder on."""
    options: Any = OmegaConf.to_container(cfg.benchmark, resolve=True, throw_on_missing=True)
    return bind_benchmarks(absolute_paths(options, "benchmark"), defaults=_defaults(cfg))


def questions(cfg: Any, annotations: str, images: str | None) -> dict[str, Asked]:
    """The questions of a file, as with benchmark=questions."""
    target = f"{Questions.__module__}.{Questions.__name__}"
    options = {"questions": {"_target_": target, "annotations": annotations, "images": images}}
    return bind_benchmarks(options, defaults=_defaults(cfg))


def _defaults(cfg: Any) -> dict[str, Any]:
    return {key: cfg[key] for key in ("num_samples", "max_new_tokens")}


def bind_benchmarks(cfg: Mapping[str, Any], *, defaults: Mapping[str, Any]) -> dict[str, Asked]:
    """The benchmarks of a config. Raises ValueError for options that do not fit, and for files that are missing.

    `defaults` are values of the shared options that count where a benchmark has none.
    """
    check_mapping("benchmark", cfg)
    everywhere = {key: value for key, value in cfg.items() if not isinstance(value, Mapping) or key in SHARED}
    check_keys("benchmark", everywhere, SHARED)
    given = {key: value for key, value in defaults.items() if value is not None} | everywhere
    found = {}
    for name, options in cfg.items():
        if name not in everywhere:
            found[name] = _bind(name, {**given, **options})
    if not found and everywhere:
        raise ValueError(f"benchmark.{next(iter(everywhere))} belongs to no benchmark; choose one by benchmark=<name>")
    return found


def _bind(name: str, options: Mapping[str, Any]) -> Asked:
    shared = {key: value for key, value in options.items() if key in SHARED}
    full = f"benchmark.{name}"
    accepted = parameters(find_class(full, options.get("_target_")))  # such as the seed of its scenes
    own = {key: value for key, value in options.items() if key not in SHARED or key in accepted}
    check_values(full, shared, SHARED)
    benchmark = _benchmark(full, own, shared)
    demonstrations = None
    if shared.get("num_shots"):
        other = {**getattr(benchmark, "demonstrations", {}), **shared.get("demonstrations", {})}
        if not other:
            raise ValueError(
                f"{full}.num_shots={shared['num_shots']} needs questions with answers to show; set "
                f"{full}.demonstrations.<key>= to the options that read them, such as those of the training split"
            )
        demonstrations = _benchmark(f"{full}.demonstrations", {**own, **other}, shared)
    asked = ("num_samples", "num_shots", "shots", "shuffled_answers", "shots_without_images", "seed")
    fixed = {key: value for key, value in shared.items() if key in asked}
    return Asked(name=name, benchmark=benchmark, options=dict(options), demonstrations=demonstrations, **fixed)


def _benchmark(name: str, own: Mapping[str, Any], shared: Mapping[str, Any]) -> Benchmark:
    scorer = {}
    if isinstance(own.get("scorer"), Mapping):
        scorer = {"scorer": bind(f"{name}.scorer", own["scorer"])()}
    options = {key: value for key, value in own.items() if key not in scorer}
    try:
        benchmark: Benchmark = bind(name, options, scorer)()
    except ValueError as error:
        message = re.sub(r"\bdata\.(?=\w+=)", f"{name}.", str(error))  # options that sources read too
        raise ValueError(message) from error
    for key in ("prompt", "max_new_tokens"):
        if key in shared:
            setattr(benchmark, key, shared[key])
    if "{question}" not in benchmark.prompt and any(question.text for question in benchmark.questions):
        raise ValueError(f"{name}.prompt={benchmark.prompt!r} has no {{question}}; put it where the question goes")
    if not benchmark.questions:
        raise ValueError(f"{name} has no questions; check its files{f' ({benchmark.source})' * bool(benchmark.source)}")
    most, count = Counter(question.id for question in benchmark.questions).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{name} has {count} questions of id '{most}'; give each question its own id")
    return benchmark


def check(asked: Mapping[str, Asked], who: Who, out: Path, *, replace: bool) -> None:
    """Before anything loads: raise ValueError for a benchmark that cannot be asked or would replace other results."""
    for name, each in asked.items():
        if each.benchmark.method not in who.methods:
            raise ValueError(
                f"benchmark.{name} asks by the method {each.benchmark.method}, and {who.name} only by "
                f"{' or '.join(who.methods) or 'none'}; choose another benchmark or method"
            )
        file = out / name / "results.json"
        if file.is_file() and not replace and _key_of(file) != each.key(who):
            raise ValueError(
                f"{file} holds results of other options or another model; give out=<folder> for these, or out={out} "
                "to replace them"
            )


def ask(
    asked: Asked, who: Who, respondent: Respondent, out: Path, *, against: Path | None, about: Mapping[str, Any]
) -> None:
    """Ask the questions that no earlier call has asked, then write and print the results.

    With `against`, they also have the differences to the results in that file, or of this benchmark in that folder.
    """
    folder, key = out / asked.name, asked.key(who)
    records = _finished(asked, folder, key)
    if respondent.remembers and any("error" in record for record in records or ()):
        records = None  # what failed is asked again
    if records is None:
        folder.mkdir(parents=True, exist_ok=True)
        _answer(asked, respondent, folder, key)
        respondent.barrier()
    if respondent.rank:
        return
    if records is None:
        found = harness.answers(folder, key=key)
        records = harness.records(asked.benchmark, {index: found[index] for index in asked.indices})
        _refuse_failure(asked, records)
    else:
        run.CONSOLE.print(f"{asked.name}: all questions were answered before.", soft_wrap=True)
    results = {
        "benchmark": asked.name,
        **harness.figures(asked.benchmark, records),
        "prompt": asked.benchmark.prompt,
        "generation": {"method": asked.benchmark.method, "max_new_tokens": asked.benchmark.max_new_tokens},
        "num_shots": asked.num_shots,
        "shots": asked.shots if asked.num_shots else None,
        "shuffled_answers": asked.shuffled_answers,
        "shots_without_images": asked.shots_without_images,
        "options": asked.options,
        "harness": harness.VERSION,
        "version": asked.benchmark.version,
        "usage": _usage(records),
        "key": key,
        **about,
    }
    if against is not None:
        results["against"] = _against(asked, records, against)
    artifact.write_json(folder / "results.json", results)
    write_samples(folder / "samples.jsonl", [dict(record) for record in records])
    for file in folder.glob("answers-*.jsonl"):
        file.unlink()
    _print(asked, results)
    # The only choice of a question, whose likelihood is asked, is not shown as a correct answer.
    answered = [_shown(r) for r in records if "error" not in r and len(r.get("log_likelihoods", ())) != 1]
    print_samples(answered, of=f"questions of {asked.name}")
    run.CONSOLE.print(f"Results: {folder / 'results.json'}", soft_wrap=True)


def _answer(asked: Asked, respondent: Respondent, folder: Path, key: str) -> None:
    """Ask the questions that have no answer in the folder."""
    known = harness.answers(folder, key=key)
    if respondent.remembers:
        known = {index: answer for index, answer in known.items() if not answer.error}
    if known and respondent.rank == 0:
        run.CONSOLE.print(f"{asked.name}: {len(known)} questions were answered before.", soft_wrap=True)
    prompts = asked.prompts(respondent)
    progress = Progress(console=run.CONSOLE, disable=respondent.rank > 0 or not run.CONSOLE.is_terminal)
    with harness.answer_file(folder, key=key, rank=respondent.rank) as keep, progress:
        task = progress.add_task(asked.name, total=len(asked.indices), completed=len(known))

        def write(answer: Answer) -> None:
            keep(answer)
            progress.advance(task)

        respondent.respond(prompts, asked.indices, known, write)


def _refuse_failure(asked: Asked, records: Sequence[Record]) -> None:
    """Raise ValueError if no question could be asked."""
    failed = [record for record in records if "error" in record]
    if records and len(failed) == len(records):
        raise ValueError(f"none of the {len(records)} questions of {asked.name} has an answer: {failed[0]['error']}")


def _usage(records: Sequence[Record]) -> dict[str, Number]:
    total: dict[str, Number] = {}
    for record in records:
        for name, value in record.get("usage", {}).items():
            total[name] = total.get(name, 0) + value
    return total


def _against(asked: Asked, records: Sequence[Record], other: Path) -> dict[str, Any]:
    file = other / asked.name / "results.json" if other.is_dir() else other
    if not file.is_file():
        raise ValueError(f"against={other} has no results of {asked.name} ({file}); run that benchmark there first")
    theirs = json.loads(files.read(file, max_bytes=harness.MAX_BYTES))
    if theirs.get("benchmark") != asked.name:
        raise ValueError(f"against={file} holds results of {theirs.get('benchmark')}, not of {asked.name}")
    compared = harness.compare(asked.benchmark, records, _records(asked, file.parent))
    return {"results": str(file), **compared}


def _finished(asked: Asked, folder: Path, key: str) -> list[Record] | None:
    """The records of an earlier call that asked the same, if it has finished."""
    return _records(asked, folder) if _key_of(folder / "results.json") == key else None


def _records(asked: Asked, folder: Path) -> list[Record]:
    lines = files.read(folder / "samples.jsonl", max_bytes=harness.MAX_BYTES).decode().splitlines()
    return harness.scored_anew(asked.benchmark, [json.loads(line) for line in lines])


def _key_of(file: Path) -> str | None:
    try:
        found = json.loads(files.read(file, max_bytes=harness.MAX_BYTES)) if file.is_file() else None
        return found.get("key") if isinstance(found, dict) else None
    except ValueError:
        return None


def _print(asked: Asked, results: Mapping[str, Any]) -> None:
    """The metrics as a table, with intervals, and beside them what answers without the image would reach."""
    title = f"{asked.name}: {results['n']:,} answers in {results['num_groups']:,} groups"
    rows = []
    compared = results.get("against", {}).get("metrics", {})
    for name, metric in results["metrics"].items():
        row = [name, str(metric["n"] or ""), *_interval(metric)]
        best = results["best_constant"].get(name)
        row.append(f"{_number(best['value'])} ({best['answer']})" if best else "")
        row.append(_number(results["best_without_image"][name]) if best else "")
        if name in compared:
            value, interval = _interval(compared[name])
            row.append(f"{value} ({interval}), p {compared[name]['p']:.3f}")
        rows.append(row)
    headings = ["metric", "n", "value", "95 % interval", "best constant answer", "best without image"]
    headings += ["difference"] if compared else []
    if rows:
        print_table(title, headings, rows)
    else:
        run.CONSOLE.print(f"{asked.name}: {results['note']}.", soft_wrap=True)
    if usage := results["usage"]:
        run.CONSOLE.print(f"Used: {', '.join(f'{value:,.6g} {name}' for name, value in usage.items())}", soft_wrap=True)
    for key, what in (("num_failed", "without an answer"), ("num_without_reference", "without a reference")):
        if num := results[key]:
            run.CONSOLE.print(f"{count(num, 'question')} {what}: samples.jsonl has the names.", soft_wrap=True)
    if results["num_left_out"]:
        run.CONSOLE.print(f"{results['num_left_out']:,} items of the files are not asked.", soft_wrap=True)


def _shown(record: Record) -> dict[str, Any]:
    return {**record, "reference": " | ".join(dict.fromkeys(record["references"]))}


def _interval(metric: Mapping[str, Any]) -> tuple[str, str]:
    return _number(metric["value"]), f"{_number(metric['low'])} to {_number(metric['high'])}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
