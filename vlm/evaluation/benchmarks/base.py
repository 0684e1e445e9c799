"""Base class of the benchmarks: questions with references, the prompt that asks them, and metrics of the answers."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypedDict

import numpy as np
from PIL import Image

from vlm.evaluation.scorers.base import Scorer
from vlm.ranges import Number
from vlm.schema import Content, Message, Sample

NUM_CONSTANTS = 20  # answers that are tried as the best constant one


@dataclass(frozen=True)
class Question:
    """One question, as published.

    Attributes:
        id: unique in the benchmark.
        text: without the words that the prompt adds.
        references: correct answers; none if they are not published.
        images: names of its images, which `Benchmark.image` opens.
        group: questions of one group are not independent, such as those about one image. Intervals take whole groups.
        type: for metrics by type.
        choices: answers to choose from.
        unit: questions of one unit are asked together or not at all, such as one question with its options in several
            orders. `num_samples` counts units; by default each question is one.
        meta: other facts that the metrics need.
    """

    id: str
    text: str
    references: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    group: str = ""
    type: str | None = None
    choices: tuple[str, ...] = ()
    unit: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cluster(self) -> str:
        """The group, by default that of the first image."""
        return self.group or (self.images[0] if self.images else self.id)


class Record(TypedDict, total=False):
    """One question with its answer, a line of samples.jsonl.

    `log_likelihoods` has (nats, tokens) of each choice where the choices were ranked; `facts` is what
    `Benchmark.complete` adds; `error` says why there is no answer, and the record then takes no part in the metrics.
    """

    id: str
    group: str
    type: str | None
    prompt: str
    references: list[str]
    prediction: str
    score: float
    correct: bool
    log_likelihoods: list[tuple[float, int]]
    facts: dict[str, float]
    usage: dict[str, Number]
    error: str


Sums = Mapping[str, Any]  # named sums, each a number or an array [R] of one number per bootstrap resample


class Benchmark(ABC):
    """Questions with references, the prompt that asks them, and metrics of the answers.

    A benchmark of your own sets `questions` in its constructor and says how `image` opens one of their images. The
    default metrics are the mean score of its scorer, over all questions and per type.

    Attributes:
        version: raise it when the same answers would get other metrics.
        method: `generate` an answer, or `rank` the choices of a question by their likelihood as its answer.
        headline: the metric to compare models by; by default the scorer's name.
        no_scores: metrics that are not better when they are higher, so that they have no best constant answer.
        source: where to get the published files, for errors.
        max_new_tokens: the longest answer.
        num_left_out: how many items of the files are not asked, for example because they are about a video.
    """

    version: ClassVar[int] = 1
    no_scores: ClassVar[tuple[str, ...]] = ()
    source: ClassVar[str] = ""
    method: Literal["generate", "rank"] = "generate"
    max_new_tokens: int = 16
    num_left_out: int = 0
    scorer: Scorer
    prompt: str = "<image>\n{question}"

    questions: Sequence[Question]

    @abstractmethod
    def image(self, name: str) -> Image.Image:
        """The RGB image of this name. Raises BadSample if it cannot be read."""

    @property
    def headline(self) -> str:
        return self.scorer.name

    def ask(self, question: Question) -> str:
        """The prompt: the option `prompt` with the question for {question}; images stand where `<image>` does."""
        return self.prompt.replace("{question}", question.text)

    def answer(self, question: Question) -> str:
        """The answer that a demonstration shows."""
        return question.references[0]

    def messages(self, question: Question) -> list[Message]:
        """The user message that asks a question."""
        return [Message(role="user", content=with_images(self.ask(question), len(question.images)))]

    def choose(self, question: Question, log_likelihoods: Sequence[tuple[float, int]]) -> str:
        """The choice with the highest mean log-likelihood per token."""
        means = [nats / max(1, tokens) for nats, tokens in log_likelihoods]
        return question.choices[means.index(max(means))]

    def score(self, prediction: str, question: Question) -> float:
        """The score of one answer."""
        return self.scorer(prediction, as_sample(question))

    def complete(self, records: Sequence[Record]) -> None:  # noqa: B027, most benchmarks have none
        """Add `facts` that need several records, such as the rank of an image among others, to all scored records."""

    def sums(self, records: Sequence[Record]) -> dict[str, float]:
        """Named sums over the answered questions of one group; those of all groups are added up."""
        found: dict[str, float] = defaultdict(float)
        for record in records:
            for kind in kinds(record):
                found[f"n{kind}"] += 1
                found[f"score{kind}"] += record["score"]
        return found

    def metrics(self, sums: Sums) -> dict[str, Any]:
        """The metrics from the sums over all groups, or over each bootstrap resample of the groups."""
        result = {self.scorer.name: ratio(sums["score"], sums["n"])}
        for kind in types(sums):
            result[f"{self.scorer.name_by_type}{kind}"] = ratio(sums[f"score{kind}"], sums[f"n{kind}"])
        return result

    def num_questions(self, metric: str, sums: Sums) -> int | None:
        """How many questions a metric is about, by the type in its name; None if that cannot be told."""
        kind = metric.partition("/")[2]
        found = sums.get(f"n/{kind}" if kind else "n")
        return None if found is None else int(found)

    def constants(self) -> list[str]:
        """Answers to try as the best constant one: the most frequent references."""
        counts = Counter(reference for question in self.questions for reference in dict.fromkeys(question.references))
        return [answer for answer, _ in counts.most_common(NUM_CONSTANTS)]


def kinds(record: Record) -> tuple[str, ...]:
    """What follows the names of the sums that a record adds to: nothing, and `/<type>` if it has a type."""
    return ("", f"/{record['type']}") if record.get("type") else ("",)


def types(sums: Sums) -> list[str]:
    """`/<type>` of each type that the sums `n/<type>` count; none where all questions have the same type."""
    found = sorted(name.removeprefix("n") for name in sums if name.startswith("n/"))
    return found if len(found) > 1 else []


def with_images(text: str, num_images: int) -> list[Content]:
    """The pieces of a text in which `<image>` stands for all images; without it, the images come first."""
    before, found, after = text.partition("<image>")
    before, after = (before, after) if found else ("", text)
    if not num_images:
        before, after = before, after.removeprefix("\n") if not before else after
    images: list[Content] = [{"type": "image"} for _ in range(num_images)]
    pieces: list[Content] = [{"type": "text", "text": before}, *images, {"type": "text", "text": after}]
    return [piece for piece in pieces if piece["type"] == "image" or piece["text"]]


def as_sample(question: Question) -> Sample:
    """The question as scorers take it: its references are in `meta`."""
    meta = {"references": json.dumps(question.references), **{key: str(value) for key, value in question.meta.items()}}
    if question.type:
        meta["type"] = question.type
    return Sample(id=question.id, images=[], messages=[], meta=meta)


def ratio(numerator: Any, denominator: Any) -> Any:
    """The quotient, NaN where the denominator is 0; numbers or arrays."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(numerator, denominator, dtype=float)
