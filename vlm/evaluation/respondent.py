"""Base class of what answers the questions of a benchmark: a model of this project, or a service."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from vlm.data.reading import Reading
from vlm.evaluation.benchmarks.base import Benchmark
from vlm.evaluation.prompts import Prompts
from vlm.ranges import Number


@dataclass(frozen=True)
class Answer:
    """The answer to question `index`: a text, (nats, tokens) of each choice, or why there is none.

    `usage` has what a service counts, such as tokens and cost.
    """

    index: int
    prediction: str = ""
    log_likelihoods: list[tuple[float, int]] = field(default_factory=list)
    error: str = ""
    usage: dict[str, Number] = field(default_factory=dict)


Write = Callable[[Answer], None]


class Respondent(ABC):
    """Answers questions.

    Attributes:
        rank: of this process; every rank calls each method.
        reading: limits of images.
        remembers: an answered question costs nothing to ask again, so those that failed before are asked again.
    """

    rank: int = 0
    remembers: bool = False
    reading: Reading = Reading()

    @abstractmethod
    def respond(self, prompts: Prompts, indices: Sequence[int], answered: Container[int], write: Write) -> None:
        """Ask the questions `indices` that are not answered, and pass on each answer at once.

        Each rank asks its own share, which does not depend on what is answered.
        """

    def embed(self, benchmark: Benchmark) -> Float[Tensor, "q d"]:
        """A vector of each question's first image, for the nearest demonstrations."""
        raise ValueError("shots=nearest needs a model with an encoder here; set shots=fixed or random")

    def barrier(self) -> None:  # noqa: B027, one process has nothing to wait for
        """Wait for all ranks."""
