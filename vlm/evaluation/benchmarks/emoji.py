"""The names of the held-out emoji of data=emoji, in a style of drawing that training may have never shown."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from vlm.data.sources import emoji
from vlm.evaluation.benchmarks.of_source import OfSource
from vlm.evaluation.scorers.base import Scorer
from vlm.evaluation.scorers.exact_match import ExactMatch
from vlm.ranges import Length, Name, RatioBelowOne
from vlm.schema import Split


class Emoji(OfSource):
    """The name of each emoji of a split, in one language or several; then also by language."""

    source: ClassVar[str] = emoji.INSTALL
    demonstrations: ClassVar[dict[str, str]] = {"split": "train"}

    def __init__(
        self,
        *,
        root: Name = "emoji",
        style: Literal["noto", "fluent"] = "noto",
        languages: Annotated[list[Name], Length(1)] | None = None,
        split: Split = "val",
        val_fraction: RatioBelowOne = 0.15,
        scorer: Scorer | None = None,
    ) -> None:
        source = emoji.Emoji(split=split, root=root, style=style, languages=languages, val_fraction=val_fraction)
        super().__init__(source=source, scorer=scorer or ExactMatch(), max_new_tokens=64)
