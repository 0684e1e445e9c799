"""Made-up words for colors (data=names): what a model learns from demonstrations alone."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from vlm.data.sources import names
from vlm.evaluation.benchmarks.of_source import OfSource
from vlm.evaluation.scorers.base import Scorer
from vlm.evaluation.scorers.exact_match import ExactMatch
from vlm.ranges import Range, Samples, Seed


class Names(OfSource):
    """Images of one shape, in turn of `num_tasks` tasks; training never shows their words, unless these are letters.

    `letters` and `as_text` are those of the source. Demonstrations are other images of the task. Without them
    a model cannot know its words; a model that repeats one that they show is right in one of `num_names` cases.
    """

    demonstrations: ClassVar[dict[str, Any]] = {"num_questions": 2048}

    def __init__(
        self,
        *,
        seed: Seed = 0,
        num_names: Annotated[int, Range(1, 7)] = 2,
        num_tasks: Samples = 64,
        num_questions: Samples = 256,
        letters: bool = False,
        as_text: bool = False,
        image_size: Annotated[int, Range(8, 4_096)] = 224,
        scorer: Scorer | None = None,
    ) -> None:
        source = names.Names(
            split="val",
            seed=seed,
            image_size=image_size,
            num_names=num_names,
            num_shots=0,
            num_tasks=num_tasks,
            letters=letters,
            as_text=as_text,
            num_val=num_questions,
        )
        super().__init__(source=source, scorer=scorer or ExactMatch(), max_new_tokens=8)
