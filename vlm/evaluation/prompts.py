"""The questions of a benchmark as conversations, with demonstrations before them if wanted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vlm.data.reading import Reading, applied
from vlm.evaluation.benchmarks.base import Benchmark, Question
from vlm.schema import BadSample, Message, Sample

# Which demonstrations stand before a question: the same for all, drawn for each, or those with the nearest images.
Shots = Literal["fixed", "random", "nearest"]


class Prompts:
    """`prompts.samples([i])` is question i of a benchmark as a conversation that ends with the question.

    `shots[i]` names the demonstrations before question i, indices into the questions of `demonstrations`. With
    `shuffled_answers` their answers are permuted at random, a control; with `without_images` their images are left out,
    as OpenFlamingo (arXiv 2308.01390) asks with "zero" shots.
    """

    def __init__(
        self,
        *,
        benchmark: Benchmark,
        demonstrations: Benchmark | None = None,
        shots: Sequence[Sequence[int]] = (),
        shuffled_answers: bool = False,
        without_images: bool = False,
        reading: Reading | None = None,
    ) -> None:
        self.benchmark, self.demonstrations, self.shots = benchmark, demonstrations, shots
        self._shuffled_answers, self._without_images = shuffled_answers, without_images
        self._reading = reading or Reading()

    def outline(self, index: int) -> Sample:
        """A question without its images."""
        question = self.benchmark.questions[index]
        messages: list[Message] = []
        demonstrations: Any = self.demonstrations
        shown = [demonstrations.questions[number] for number in self._shots_of(index)]
        answers = [demonstrations.answer(each) for each in shown]
        if self._shuffled_answers:
            random.Random(question.id).shuffle(answers)
        for each, answer in zip(shown, answers, strict=True):
            messages += [*map(self._shown, demonstrations.messages(each))]
            messages.append(Message(role="assistant", content=[{"type": "text", "text": answer}]))
        return Sample(id=question.id, images=[], messages=[*messages, *self.benchmark.messages(question)])

    def samples(self, indices: Sequence[int]) -> list[Sample | BadSample]:
        """Questions with their images; an image that several of them have is opened once, as one object."""
        opened: dict[tuple[int, str], Image.Image] = {}

        def images(benchmark: Benchmark, question: Question) -> list[Image.Image]:
            for name in question.images:
                if (id(benchmark), name) not in opened:
                    opened[id(benchmark), name] = benchmark.image(name)
            return [opened[id(benchmark), name] for name in question.images]

        found: list[Sample | BadSample] = []
        with applied(self._reading):
            for index in indices:
                try:
                    shown = [
                        image
                        for number in (() if self._without_images else self._shots_of(index))
                        for image in images(self.demonstrations, self._demonstration(number))  # type: ignore[arg-type]
                    ]
                    asked = images(self.benchmark, self.benchmark.questions[index])
                    found.append(replace(self.outline(index), images=[*shown, *asked]))
                except BadSample as error:
                    found.append(error)
        return found

    def _shown(self, message: Message) -> Message:
        """A message of a demonstration."""
        if not self._without_images:
            return message
        return {**message, "content": [piece for piece in message["content"] if piece["type"] != "image"]}

    def _shots_of(self, index: int) -> Sequence[int]:
        return self.shots[index] if self.shots else ()

    def _demonstration(self, number: int) -> Question:
        assert self.demonstrations is not None
        return self.demonstrations.questions[number]


def choose_shots(
    benchmark: Benchmark, demonstrations: Benchmark, *, num_shots: int, shots: Literal["fixed", "random"], seed: int
) -> list[list[int]]:
    """The demonstrations of each question: of its task, drawn without replacement, never about an image of it.

    Raises ValueError if there are too few demonstrations with answers.
    """
    usable = [number for number, shown in enumerate(demonstrations.questions) if shown.references]
    rng = random.Random(seed)
    same = rng.sample(usable, len(usable))
    chosen = []
    for question in benchmark.questions:
        order = same if shots == "fixed" else rng.sample(usable, len(usable))
        chosen.append(first_other(order, question, demonstrations, num_shots))
    return chosen


def nearest_shots(
    benchmark: Benchmark,
    demonstrations: Benchmark,
    *,
    num_shots: int,
    questions: Float[Tensor, "q d"],
    shown: Float[Tensor, "s d"],
) -> list[list[int]]:
    """The demonstrations with the images most similar to each question's, by cosine; the most similar comes last.

    As RICES in Flamingo (Alayrac et al., arXiv 2204.14198, appendix A.2).
    """
    similarity = torch.nn.functional.normalize(questions, dim=1) @ torch.nn.functional.normalize(shown, dim=1).T
    orders = similarity.argsort(dim=1, descending=True, stable=True).tolist()
    return [
        first_other(order, question, demonstrations, num_shots)[::-1]
        for order, question in zip(orders, benchmark.questions, strict=True)
    ]


def first_other(order: Sequence[int], question: Question, demonstrations: Benchmark, num: int) -> list[int]:
    """The first `num` demonstrations of an order that have an answer, the question's task, and none of its images.

    A benchmark of several tasks, such as `names`, has the task of a question in its `meta`.
    """
    found = []
    for number in order:
        shown = demonstrations.questions[number]
        same_task = shown.meta.get("task") == question.meta.get("task")
        if shown.references and same_task and not {*shown.images} & {*question.images}:
            found.append(number)
            if len(found) == num:
                return found
    raise ValueError(
        f"num_shots={num} needs as many demonstrations about other images than that of question '{question.id}', and "
        f"there are {len(found)}; set benchmark.num_shots={len(found)}, or give more demonstrations"
    )
