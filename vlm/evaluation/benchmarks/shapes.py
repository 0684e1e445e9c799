"""Questions about the held-out scenes of data=shapes, by type."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from vlm.data.sources import shapes
from vlm.evaluation.benchmarks.of_source import OfSource
from vlm.evaluation.scorers.base import Scorer
from vlm.evaluation.scorers.exact_match import ExactMatch
from vlm.ranges import Range, Samples, Seed
from vlm.schema import Split


class Shapes(OfSource):
    """One question, or a caption, for each of `num_scenes` scenes; training never shows a scene of `split=val`."""

    demonstrations: ClassVar[dict[str, str]] = {"split": "train"}

    def __init__(
        self,
        *,
        task: Literal["caption", "instruct", "mixed"] = "instruct",
        language: Literal["en", "ja"] = "en",
        split: Split = "val",
        seed: Seed = 0,
        num_scenes: Samples = 512,
        image_size: Annotated[int, Range(8, 4_096)] = 224,
        max_objects: Annotated[int, Range(1, 9)] = 4,
        scorer: Scorer | None = None,
    ) -> None:
        source = shapes.Shapes(
            split=split,
            task=task,
            language=language,
            seed=seed,
            image_size=image_size,
            max_objects=max_objects,
            num_questions=1,
            num_train=num_scenes,
            num_val=num_scenes,
        )
        super().__init__(source=source, scorer=scorer or ExactMatch(), max_new_tokens=64)
