"""Language without images: the likelihood of answers in conversations, and multiple choice by likelihood."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from vlm.data.annotations import Record as DataRecord
from vlm.data.annotations import existing_file, read_jsonl
from vlm.data.sources.instruct import Instruct
from vlm.evaluation.benchmarks.base import Benchmark, Question, Record, Sums, kinds, ratio, types
from vlm.evaluation.benchmarks.choice_files import items_of
from vlm.evaluation.benchmarks.dataset_table import table_at
from vlm.evaluation.scorers.exact_match import ExactMatch
from vlm.ranges import Name
from vlm.schema import Message

REPLAY = Path(__file__).parents[2] / "data" / "replay.jsonl"  # short general conversations, written for this project


class Text(Benchmark):
    """The answers of conversations, or questions with choices (see `items_of`); the file tells which.

    A dataset of the hub has questions with choices, such as ARC, HellaSwag and MMLU.

    Of conversations, the metrics are `nats_per_token`, the mean negative log-likelihood of the tokens of all answers,
    each after the turns before it, with the token that ends the turn; and `perplexity`, its exponential. The figures
    of models with different tokenizers cannot be compared. Of choices, `accuracy` is that of the choice with the
    highest mean log-likelihood per token, and `chance` what guessing reaches.

    Raises ValueError for a conversation with images.
    """

    method: Literal["generate", "rank"] = "rank"

    def __init__(self, *, annotations: Name | None = None, split: Name | None = None) -> None:
        self.scorer, self.prompt = ExactMatch(), "{question}"
        self._turns: dict[str, list[Message]] = {}
        path = str(REPLAY) if annotations is None else annotations
        if table := table_at(path, split=split):
            self.has_choices = True
            self.questions = list(_choices(table.records(), path))
        else:
            file = existing_file(path, option="annotations")
            self.has_choices = file.suffix in (".jsonl", ".ndjson") and _has_choices(file)
            self.questions = list(_choices(read_jsonl(file), path) if self.has_choices else self._answers(file))
        self._num_choices = {question.id: len(question.choices) for question in self.questions}

    def _answers(self, file: Path) -> Iterator[Question]:
        """Each supervised answer of the conversations."""
        source = Instruct(split="train", annotations=file, images=None, val_fraction=0.0)
        for index in range(len(source)):
            sample = source.outline(index)
            if sample.num_images:
                raise ValueError(f"sample '{sample.id}' in '{file}' has images; give a file of texts alone")
            for number, message in enumerate(sample.messages):
                if message["role"] != "assistant" or not message.get("supervised", True):
                    continue
                name, answer = f"{sample.id}#{number}", _text(message)
                self._turns[name] = sample.messages[:number]
                yield Question(
                    id=name,
                    text=_text(sample.messages[number - 1]),
                    references=(answer,),
                    group=sample.id,
                    choices=(answer,),
                )

    def image(self, name: str) -> Image.Image:
        raise AssertionError(f"there are no images, and '{name}' was asked for")

    def messages(self, question: Question) -> list[Message]:
        """The turns before the answer; a `prompt` of one's own replaces the last."""
        asked = self._turns.get(question.id, [])
        return asked if asked and self.prompt == "{question}" else [*asked[:-1], *super().messages(question)]

    @property
    def headline(self) -> str:
        return "accuracy" if self.has_choices else "nats_per_token"

    def sums(self, records: Sequence[Record]) -> dict[str, float]:
        found: dict[str, float] = defaultdict(float)
        for record in records:
            if self.has_choices:
                found["chance"] += 1 / self._num_choices[record["id"]]
            else:
                ((nats, tokens),) = record["log_likelihoods"]
                found["nats"] -= nats
                found["tokens"] += tokens
            for kind in kinds(record):
                found[f"n{kind}"] += 1
                found[f"score{kind}"] += record["score"]
        return found

    def metrics(self, sums: Sums) -> dict[str, Any]:
        if not self.has_choices:
            nats = ratio(sums["nats"], sums["tokens"])
            return {"nats_per_token": nats, "perplexity": np.exp(nats)}
        result = {"accuracy": ratio(sums["score"], sums["n"]), "chance": ratio(sums["chance"], sums["n"])}
        return result | {f"accuracy{kind}": ratio(sums[f"score{kind}"], sums[f"n{kind}"]) for kind in types(sums)}

    def constants(self) -> list[str]:
        return []


def _has_choices(file: Path) -> bool:
    first = next(read_jsonl(file), None)
    return first is not None and bool({"choices", "endings"} & first.fields.keys())


def _choices(records: Iterable[DataRecord], path: str) -> Iterator[Question]:
    for item in items_of(records):
        if item.images:
            raise ValueError(f"question '{item.id}' in '{path}' has images; ask it by benchmark=multiple_choice")
        yield Question(
            id=item.id,
            text=item.question,
            references=() if item.answer is None else (item.choices[item.answer],),
            type=item.type,
            choices=item.choices,
        )


def _text(message: Message) -> str:
    return "".join(piece.get("text", "") for piece in message["content"])
