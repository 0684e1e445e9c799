"""The names of the held-out stamps of data=stamps (Tux Paint)."""

from __future__ import annotations

from typing import ClassVar

from vlm.data.sources import stamps
from vlm.evaluation.benchmarks.of_source import OfSource
from vlm.evaluation.scorers.base import Scorer
from vlm.evaluation.scorers.exact_match import ExactMatch
from vlm.ranges import Name, RatioBelowOne
from vlm.schema import Split


class Stamps(OfSource):
    """The caption of each stamp of a split, in one language."""

    source: ClassVar[str] = "apt-get install tuxpaint-stamps-default"
    demonstrations: ClassVar[dict[str, str]] = {"split": "train"}

    def __init__(
        self,
        *,
        root: Name = "/usr/share/tuxpaint/stamps",
        language: Name = "en",
        split: Split = "val",
        val_fraction: RatioBelowOne = 0.15,
        scorer: Scorer | None = None,
    ) -> None:
        source = stamps.Stamps(split=split, root=root, language=language, val_fraction=val_fraction)
        super().__init__(source=source, scorer=scorer or ExactMatch(), max_new_tokens=64)
