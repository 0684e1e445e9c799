"""Captions of COCO, nocaps, Flickr30k or one's own images, by CIDEr-D, BLEU-4 and ROUGE-L."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from vlm.data.sources.captions import read_captions
from vlm.evaluation.benchmarks.base import Question, Record, Sums, ratio
from vlm.evaluation.benchmarks.dataset_table import DatasetTable, is_dataset
from vlm.evaluation.benchmarks.published import Published
from vlm.evaluation.captioning import MAX_N, bleu_sums, rouge_l
from vlm.evaluation.scorers.cider import CiderD
from vlm.ranges import Name

Karpathy = Literal["train", "val", "test"]
NUM_CONSTANTS = 5  # captions that are tried as the best constant one; CIDEr-D takes long


class Caption(Published):
    """One caption for each image, compared with all its captions.

    Args:
        annotations: a file that data=captions reads, such as captions_val2014.json, Karpathy's dataset_coco.json or
            dataset_flickr30k.json, nocaps_val_4500_captions.json, or records of an image and its captions;
            or the folder of a dataset of the hub.
        images: folder of the images; a dataset has them itself.
        split: the images that are captioned: of Karpathy's files train, val or test (None), or a split of the dataset,
            where it has several. Other files have no splits.
    """

    source: ClassVar[str] = (
        "https://cocodataset.org/#download (Karpathy's split: https://cs.stanford.edu/people/karpathy/deepimagesent)"
    )
    prompt = "<image>\nProvide a one-sentence caption for the provided image."
    max_new_tokens = 64

    def __init__(self, *, annotations: Name, images: Name | None = None, split: Name | None = None) -> None:
        path = Path(annotations).expanduser()
        table = DatasetTable(path, split=split) if is_dataset(path) else None
        super().__init__(images=images, table=table)
        if table is None:
            captions = self._of_file(self._file(path, option="annotations"), split or "test")
            self.questions = [
                Question(id=image, text="", references=tuple(texts), images=(image,))
                for image, texts in captions.items()
            ]
        else:
            self.questions = [
                Question(id=name, text="", references=tuple(texts), images=(image,), group=name)
                for name, image, texts in table.captions()
            ]
        self.scorer = CiderD(captions=[list(question.references) for question in self.questions])

    @staticmethod
    def _of_file(file: Path, split: Any) -> dict[str, list[str]]:
        """The captions of each image. Raises ValueError for a split that no such file has."""
        if split not in get_args(Karpathy):
            raise ValueError(f"data.split={split} must be one of {', '.join(get_args(Karpathy))}; '{file}' is a file")
        captions: dict[str, list[str]] = defaultdict(list)
        for caption in read_captions(file, split, {})[0]:
            if caption.problem:
                raise ValueError(f"'{file}': sample '{caption.id}' {caption.problem}")
            captions[caption.image].append(caption.text)
        return captions

    def sums(self, records: Sequence[Record]) -> dict[str, float]:
        """The sums of the scores, and those of BLEU."""
        found: dict[str, float] = defaultdict(float)
        for record in records:
            caption, references = record["prediction"], record["references"]
            found["n"] += 1
            found["score"] += record["score"]
            found["rouge_l"] += rouge_l(caption, references)
            for name, value in bleu_sums(caption, references).items():
                found[name] += value
        return found

    def metrics(self, sums: Sums) -> dict[str, Any]:
        """The mean CIDEr-D and ROUGE-L, and BLEU-4 of all captions together."""
        return {
            "cider_d": ratio(sums["score"], sums["n"]),
            "bleu_4": _bleu(sums),
            "rouge_l": ratio(sums["rouge_l"], sums["n"]),
        }

    def constants(self) -> list[str]:
        counts = Counter(caption for question in self.questions for caption in question.references)
        return [caption for caption, _ in counts.most_common(NUM_CONSTANTS)]


def _bleu(sums: Sums) -> Any:
    """The geometric mean of the precisions of 1- to 4-grams, less where captions are shorter than references."""
    with np.errstate(divide="ignore", invalid="ignore"):
        precisions = [ratio(sums[f"matched_{n}"], sums[f"total_{n}"]) for n in range(1, MAX_N + 1)]
        mean = np.exp(np.mean([np.log(precision) for precision in precisions], axis=0))
        penalty = np.exp(np.minimum(0, 1 - ratio(sums["reference_length"], sums["length"])))
    return np.nan_to_num(mean * penalty)  # not a number where no caption has four words
