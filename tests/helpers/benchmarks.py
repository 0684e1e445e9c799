"""A benchmark of four questions about three colored squares, a respondent that answers from a table, and figures."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from vlm.evaluation import harness
from vlm.evaluation.benchmarks.base import Benchmark, Question
from vlm.evaluation.prompts import Prompts
from vlm.evaluation.respondent import Answer, Respondent, Write
from vlm.evaluation.scorers.exact_match import ExactMatch
from vlm.schema import BadSample

COLORS = {"a.png": (255, 0, 0), "b.png": (0, 255, 0), "c.png": (0, 0, 255)}


class Squares(Benchmark):
    """Which color, of each square, and whether the first is red."""

    def __init__(self, *, method: Literal["generate", "rank"] = "generate", missing: bool = False) -> None:
        self.scorer, self.method = ExactMatch(), method
        names = dict(zip(COLORS, ("red", "green", "blue"), strict=True))
        self.questions = [
            Question(
                id=f"color-{name}",
                text="Which color?",
                references=(color,),
                images=(name,),
                type="color",
                choices=("red", "green", "blue"),
            )
            for name, color in names.items()
        ]
        self.questions.append(
            Question(
                id="yes", text="Is it red?", references=("yes",), images=("a.png",), type="yes", choices=("yes", "no")
            )
        )
        self._missing = missing

    def image(self, name: str) -> Image.Image:
        if self._missing and name == "b.png":
            raise BadSample("image 'b.png' is missing; restore it")
        return Image.new("RGB", (32, 32), COLORS[name])


class Table(Respondent):
    """Answers the questions in their order from a table, and raises after `stop_after` of them."""

    def __init__(self, answers: Sequence[str], *, stop_after: int | None = None) -> None:
        self.answers, self.stop_after = answers, stop_after
        self.asked: list[int] = []

    def respond(self, prompts: Prompts, indices: Sequence[int], answered: Container[int], write: Write) -> None:
        for index in indices:
            if index not in answered:
                if len(self.asked) == self.stop_after:
                    raise KeyboardInterrupt
                self.asked.append(index)
                write(Answer(index, prediction=self.answers[index]))

    def embed(self, benchmark: Benchmark) -> torch.Tensor:
        return torch.tensor([COLORS[question.images[0]] for question in benchmark.questions]).float()


def asked(**options: Any) -> Any:
    """The squares as eval.py binds them, with shared options."""
    from vlm.launch.benchmarks import bind_benchmarks

    target = {"_target_": "tests.helpers.benchmarks.Squares"}
    return bind_benchmarks({"squares": {**target, **options}}, defaults={})["squares"]


def write_images(folder: Path, *names: str) -> None:
    """Small images, each with its own shade of red."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (10 * number, 0, 0)).save(folder / name)


def figures(benchmark: Benchmark, predictions: Mapping[str, str]) -> dict[str, Any]:
    """What results.json says of these answers; the questions without one were not asked."""
    indices = {question.id: index for index, question in enumerate(benchmark.questions)}
    answers = {indices[name]: Answer(indices[name], prediction=text) for name, text in predictions.items()}
    return harness.figures(benchmark, harness.records(benchmark, answers))


def values(benchmark: Benchmark, predictions: Mapping[str, str]) -> dict[str, float | None]:
    """The metrics of these answers."""
    return {name: metric["value"] for name, metric in figures(benchmark, predictions)["metrics"].items()}
