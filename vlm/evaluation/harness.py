"""Asks the questions of a benchmark, continues after a kill, and computes metrics with intervals."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from vlm import files
from vlm.evaluation.benchmarks.base import Benchmark, Record
from vlm.evaluation.intervals import LEVEL, NUM_RESAMPLES, differences, intervals, total
from vlm.evaluation.respondent import Answer
from vlm.evaluation.without_image import Asked, given_question

VERSION = 1  # raise it when the same answers would get other figures
MAX_BYTES = 2**32


@contextmanager
def answer_file(folder: Path, *, key: str, rank: int) -> Iterator[Callable[[Answer], None]]:
    """A function that appends an answer to the folder's file of this rank. A killed evaluation continues from it.

    `key` identifies what is asked of whom; answers under another key are discarded.
    """
    file = folder / f"answers-{rank}.jsonl"
    head = json.dumps({"key": key}) + "\n"
    if not file.exists() or not _text(file).startswith(head):
        with files.create(file) as opened:
            opened.write(head)
    cut = not _text(file).endswith("\n")  # the last line, by a kill
    with files.append(file) as opened:
        opened.write("\n" * cut)

        def write(answer: Answer) -> None:
            opened.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")
            opened.flush()

        yield write


def answers(folder: Path, *, key: str) -> dict[int, Answer]:
    """The answers of all ranks to what `key` identifies, by the number of the question."""
    return {answer.index: answer for file in sorted(folder.glob("answers-*.jsonl")) for answer in _answers(file, key)}


def _answers(file: Path, key: str) -> Iterator[Answer]:
    with_key, *rest = _text(file).split("\n")
    if with_key != json.dumps({"key": key}):
        return
    names = {each.name for each in fields(Answer)}
    for line in rest:
        try:
            found = json.loads(line)
        except json.JSONDecodeError:  # a line that a kill has cut
            continue
        if isinstance(found, dict) and found.keys() == names:
            yield Answer(**{**found, "log_likelihoods": [tuple(each) for each in found["log_likelihoods"]]})


def _text(file: Path) -> str:
    return files.read(file, max_bytes=MAX_BYTES).decode(errors="replace")


def records(benchmark: Benchmark, found: Mapping[int, Answer]) -> list[Record]:
    """The questions with their answers and scores, in the order of the benchmark."""
    result = [record_of(benchmark, answer) for _, answer in sorted(found.items())]
    benchmark.complete(scored(result))
    return result


def scored_anew(benchmark: Benchmark, found: Sequence[Record]) -> list[Record]:
    """The answers of stored records with the references, types and scorer of today."""
    indices = {question.id: index for index, question in enumerate(benchmark.questions)}
    answers = [
        Answer(
            indices[record["id"]],
            prediction=record["prediction"],
            log_likelihoods=[(nats, tokens) for nats, tokens in record.get("log_likelihoods", [])],
            error=record.get("error", ""),
            usage=record.get("usage", {}),
        )
        for record in found
        if record["id"] in indices
    ]
    return records(benchmark, {answer.index: answer for answer in answers})


def record_of(benchmark: Benchmark, answer: Answer) -> Record:
    """One question with its answer, scored unless it has no reference or the model gave no answer."""
    question = benchmark.questions[answer.index]
    record = Record(
        id=question.id,
        group=question.cluster,
        type=question.type,
        prompt=benchmark.ask(question),
        references=list(question.references),
        prediction=answer.prediction,
    )
    if answer.log_likelihoods:
        record["log_likelihoods"] = answer.log_likelihoods
    if answer.usage:
        record["usage"] = answer.usage
    if answer.error:
        record["error"] = answer.error
    elif question.references:
        record["score"] = benchmark.score(answer.prediction, question)
        record["correct"] = record["score"] == 1
    return record


def scored(found: Sequence[Record]) -> list[Record]:
    """The records that take part in the metrics."""
    return [record for record in found if "score" in record]


def grouped_sums(benchmark: Benchmark, found: Sequence[Record]) -> dict[str, Mapping[str, float]]:
    """The sums of each group of scored records."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in scored(found):
        groups[record["group"]].append(record)
    return {name: benchmark.sums(group) for name, group in sorted(groups.items())}


def figures(benchmark: Benchmark, found: Sequence[Record]) -> dict[str, Any]:
    """Counts, and each metric with its interval and the best values of one constant answer and without image."""
    groups = grouped_sums(benchmark, found)
    result: dict[str, Any] = {
        "n": len(scored(found)),
        "num_groups": len(groups),
        "num_failed": sum("error" in record for record in found),
        "num_without_reference": sum(not record["references"] for record in found),
        "num_left_out": benchmark.num_left_out,
    }
    if not groups:
        note = "no answer is scored, because no question has a reference; samples.jsonl has the predictions"
        return {**result, "note": note, "metrics": {}, "best_constant": {}, "best_without_image": {}}
    measured, sums = intervals(list(groups.values()), benchmark.metrics), total(list(groups.values()))
    result["metrics"] = {
        name: {
            **{key: _rounded(value) for key, value in interval._asdict().items()},
            "n": benchmark.num_questions(name, sums),
        }
        for name, interval in measured.items()
    }
    result["headline"] = benchmark.headline
    result["interval"] = f"{LEVEL:.0%} bootstrap over {len(groups)} groups, {NUM_RESAMPLES} resamples"
    result["best_constant"] = best_constants(benchmark, found)
    result["best_without_image"] = best_without_image(benchmark, found, result["best_constant"])
    return result


def best_constants(benchmark: Benchmark, found: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """For each metric, the highest value that one answer to all questions reaches, and that answer.

    Of the answers that `Benchmark.constants` names; a metric of one type of question has a constant of its own.
    """
    best: dict[str, dict[str, Any]] = {}
    for constant in benchmark.constants():
        for name, value in _scores(benchmark, found, [constant] * len(scored(found))).items():
            if name not in best or value > best[name]["value"]:
                best[name] = {"value": value, "answer": constant}
    return {name: {**each, "value": _rounded(each["value"])} for name, each in best.items()}


def best_without_image(
    benchmark: Benchmark, found: Sequence[Record], constants: Mapping[str, Mapping[str, Any]]
) -> dict[str, float | None]:
    """For each metric that has a best constant answer, the highest value that answers without the image reach.

    These are the constant answers, the best one of each type of question, and what `without_image.given_question` says.
    """
    tried = benchmark.constants()
    if not tried:
        return {}
    questions = {question.id: question for question in benchmark.questions}
    asked = [questions[record["id"]] for record in scored(found)]
    sums: dict[tuple[str | None, str], float] = defaultdict(float)
    for question in asked:
        for answer in tried:
            sums[question.type, answer] += benchmark.score(answer, question)
    by_type = {type_: max(tried, key=lambda answer: sums[type_, answer]) for type_ in {q.type for q in asked}}
    guesses = given_question([Asked(q.id, q.text, q.type, q.references) for q in asked])
    best = {name: constant["value"] for name, constant in constants.items()}
    for answers in (guesses, [by_type[question.type] for question in asked]):
        for name, value in _scores(benchmark, found, answers).items():
            if name in best:
                best[name] = max(best[name], _rounded(value))
    return best


def _scores(benchmark: Benchmark, found: Sequence[Record], answers: Sequence[str]) -> dict[str, float]:
    """The defined metrics, of those that are scores, if these had been the answers to the scored records."""
    questions = {question.id: question for question in benchmark.questions}
    changed = []
    for record, answer in zip(scored(found), answers, strict=True):
        score = benchmark.score(answer, questions[record["id"]])
        changed.append(Record(**{**record, "prediction": answer, "score": score, "correct": score == 1}))
    return {
        name: value
        for name, value in _values(benchmark, changed).items()
        if name.partition("/")[0] not in benchmark.no_scores and not math.isnan(value)
    }


def _values(benchmark: Benchmark, found: Sequence[Record]) -> dict[str, float]:
    """The metrics without intervals."""
    sums = total(list(grouped_sums(benchmark, found).values()))
    return {name: float(value) for name, value in benchmark.metrics(sums).items()}


def compare(benchmark: Benchmark, mine: Sequence[Record], theirs: Sequence[Record]) -> dict[str, Any]:
    """Each metric minus that of other answers to the same questions, with interval and p of a paired bootstrap.

    Questions that only one of the two answered are left out. Raises ValueError if no question is in both.
    """
    answered = {record["id"] for record in scored(mine)} & {record["id"] for record in scored(theirs)}
    if not answered:
        raise ValueError("the two have no question in common; compare results of the same benchmark and samples")
    both = [[record for record in found if record["id"] in answered] for found in (mine, theirs)]
    first, second = (grouped_sums(benchmark, found) for found in both)
    names = sorted(first)
    measured = differences([first[name] for name in names], [second[name] for name in names], benchmark.metrics)
    return {
        "n": len(answered),
        "metrics": {
            name: {key: _rounded(value) for key, value in difference._asdict().items()}
            for name, difference in measured.items()
        },
    }


def _rounded(value: float) -> float | None:
    """Six decimals, None for a metric that is not defined: JSON has no NaN."""
    return None if math.isnan(value) else round(value, 6)
