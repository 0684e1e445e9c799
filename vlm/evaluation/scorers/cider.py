"""CIDEr-D of a caption (Vedantam et al. 2015, arXiv:1411.5726)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from vlm.evaluation.captioning import cider_d, frequencies
from vlm.evaluation.scorers.base import Scorer, references
from vlm.schema import Sample


class CiderD(Scorer):
    """CIDEr-D, from 0 to 10. A caption as good as one by a person has about 1.

    Args:
        captions: the reference captions of each image of the dataset; words in few of them count more.
    """

    name: ClassVar[str] = "cider_d"
    name_by_type: ClassVar[str] = "cider_d"

    def __init__(self, *, captions: Sequence[Sequence[str]]) -> None:
        self._frequencies, self._num_images = frequencies(captions), len(captions)

    def __call__(self, prediction: str, sample: Sample) -> float:
        return cider_d(prediction, references(sample), image_frequencies=self._frequencies, num_images=self._num_images)
