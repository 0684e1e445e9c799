"""Retrieval by likelihood: the caption of an image among others, and the image of a caption among others.

As VisualGPTScore (Lin et al. 2023, arXiv:2306.01879), with its correction for captions that are likely anyway.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from math import comb
from typing import Annotated, Any, Literal

import numpy as np

from vlm.data.conversations import caption_messages
from vlm.data.sources import captions, emoji, shapes, stamps
from vlm.evaluation.benchmarks.base import Question, Record, Sums, ratio
from vlm.evaluation.benchmarks.dataset_table import DatasetTable, table_at
from vlm.evaluation.benchmarks.of_source import OfSource
from vlm.evaluation.scorers.exact_match import ExactMatch
from vlm.ranges import Name, Range, Seed
from vlm.schema import Sample, Source

AT = (1, 5, 10)
STAMPS = "/usr/share/tuxpaint/stamps"  # where Debian's package puts them
NUM_SCENES = 4_096  # a third of the captions have the most frequent prompt
PROMPT = "Describe the image."  # as of data=captions
DIRECTIONS = ("image_to_text", "text_to_image")


class Retrieval(OfSource):
    """Pools of `num_candidates` images with one caption each; every caption is scored for every image of its pool.

    The score of a caption for an image is its mean log-likelihood per token. A pool takes `num_candidates` squared
    rows: 10,000 for 100. `num_samples` counts pools.

    `image_to_text/R@k` is the ratio of images whose caption is among the k best of the pool, `text_to_image/R@k` that
    of captions whose image is; a tie counts as a miss, and an equal text of another image as right. `chance` is beside
    each. Intervals draw images and leave the pools as they are.

    All are asked with the same prompt, the most frequent one of the data: another form of prompt, as shapes have, would
    tell the form of its caption. Pairs with other prompts are left out.

    Args:
        data: where the pairs are from: a file of captions, or the held-out stamps, emoji or scenes.
        annotations: the file of captions, in the layouts of data=captions; all its images are used, of Karpathy's file
            those of val; or the folder of a dataset of the hub. An image with several captions has its first.
        images: folder of the file's images, of the stamps or, as `data.root`, of the emoji; a dataset has them itself.
        split: of the dataset, where it has several.
        language: of the captions of stamps and emoji.
        style: of the emoji.
        num_candidates: pairs per pool; images that do not fill a pool are left out.
        num_pools: None is as many as the images fill.
        seed: of the pools.
        prior: from each score, subtract the mean score of that caption over the images of the pool. Without it,
            captions that are likely for any image win.
    """

    method: Literal["generate", "rank"] = "rank"

    def __init__(
        self,
        *,
        data: Literal["captions", "stamps", "emoji", "shapes"] = "captions",
        annotations: Name | None = None,
        images: Name | None = None,
        split: Name | None = None,
        language: Name = "en",
        style: Literal["noto", "fluent"] = "noto",
        num_candidates: Annotated[int, Range(2, 10_000)] = 100,
        num_pools: Annotated[int, Range(1, 10_000)] | None = 1,
        seed: Seed = 0,
        prior: bool = False,
    ) -> None:
        self.prior = prior
        super().__init__(
            source=_source(data, annotations, images, split, language, style), scorer=ExactMatch(), max_new_tokens=1
        )
        (prompt, _), *_ = Counter(question.text for question in self.questions).most_common(1)
        order = [question for question in self.questions if question.text == prompt]
        self.num_left_out += len(self.questions) - len(order)
        random.Random(seed).shuffle(order)
        possible = len(order) // num_candidates
        if possible < (num_pools or 1):
            raise ValueError(
                f"data.num_candidates={num_candidates} and data.num_pools={num_pools} need "
                f"{num_candidates * (num_pools or 1)} images, and there are {len(order)}; lower one of them"
            )
        self.questions = [
            question
            for start in range(0, (num_pools or possible) * num_candidates, num_candidates)
            for question in _pool(order[start : start + num_candidates])
        ]
        self._pools = {question.id: question for question in self.questions}

    @property
    def headline(self) -> str:
        return "image_to_text/R@1"

    def complete(self, records: Sequence[Record]) -> None:
        """Of each image, the rank of its caption and, of the caption, the rank of its image."""
        pools: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            pools[self._pools[record["id"]].unit].append(record)
        for pool in pools.values():
            captions = self._pools[pool[0]["id"]].choices
            scores = np.array([[nats / max(1, n) for nats, n in record["log_likelihoods"]] for record in pool])  # I C
            ranked = scores - scores.mean(axis=0) if self.prior else scores
            same = np.array([[caption == record["references"][0] for caption in captions] for record in pool])  # I C
            own = same.argmax(axis=1)  # I, the column of each image's caption
            for row, record in enumerate(pool):
                facts: dict[str, float] = {}
                of_image, of_caption, is_same = ranked[row], scores[:, own[row]], same[:, own[row]]
                facts["image_to_text"] = 1 + int((of_image[~same[row]] >= of_image[own[row]]).sum())
                facts["text_to_image"] = 1 + int((of_caption[~is_same] >= of_caption[is_same].max()).sum())
                for k in AT:
                    facts[f"image_to_text_chance@{k}"] = chance(len(captions), int(same[row].sum()), k)
                    facts[f"text_to_image_chance@{k}"] = chance(len(pool), int(is_same.sum()), k)
                record["facts"] = facts

    def sums(self, records: Sequence[Record]) -> dict[str, float]:
        found: dict[str, float] = defaultdict(float)
        for record in records:
            found["n"] += 1
            for direction in DIRECTIONS:
                for k in AT:
                    found[f"{direction}/R@{k}"] += record["facts"][direction] <= k
                    found[f"{direction}/chance@{k}"] += record["facts"][f"{direction}_chance@{k}"]
        return found

    def metrics(self, sums: Sums) -> dict[str, Any]:
        names = [f"{direction}/{name}@{k}" for direction in DIRECTIONS for k in AT for name in ("R", "chance")]
        return {name: ratio(sums[name], sums["n"]) for name in names}

    def num_questions(self, metric: str, sums: Sums) -> int:
        return int(sums["n"])

    def constants(self) -> list[str]:
        return []


class _OfDataset(Source):
    """The images of a dataset of the hub with their captions; the first one is the answer."""

    def __init__(self, table: DatasetTable) -> None:
        self._table, self._rows = table, list(table.captions())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        return replace(self.outline(index), images=[self._table.image(self._rows[index][1])])

    def outline(self, index: int) -> Sample:
        name, _, texts = self._rows[index]
        messages = caption_messages(PROMPT, texts[0])
        return Sample(id=name, images=[], messages=messages, meta={"references": json.dumps(texts)})


def _source(
    data: str, annotations: str | None, images: str | None, split: str | None, language: str, style: Any
) -> Source:
    if data == "captions":
        table = None if annotations is None else table_at(annotations, split=split)
        if table is not None:
            return _OfDataset(table)
        if annotations is None or images is None:
            raise ValueError("data.data=captions needs data.annotations= and data.images=; or set data.data=stamps")
        return captions.Captions(split="val", annotations=annotations, val_annotations=annotations, images=images)
    if split is not None:
        raise ValueError(f"data.split={split} is for a dataset of the hub, not for {data}; leave it out")
    try:
        if data == "stamps":
            return stamps.Stamps(split="val", root=images or STAMPS, language=language)
        if data == "emoji":
            return emoji.Emoji(split="val", root=images or "emoji", style=style, languages=[language])
    except ValueError as error:
        message = str(error).replace("data.root=", "data.images=").replace("data.languages=", "data.language=")
        raise ValueError(message) from error
    return shapes.Shapes(split="val", task="caption", num_val=NUM_SCENES)


def _pool(pairs: Sequence[Question]) -> list[Question]:
    """The images of a pool, each with the captions of all as its choices."""
    texts = tuple(question.references[0] for question in pairs)
    return [
        replace(question, references=(text,), choices=texts, unit=pairs[0].id, type=None)
        for question, text in zip(pairs, texts, strict=True)
    ]


def chance(num: int, num_right: int, k: int) -> float:
    """The probability that k of `num` candidates, drawn without replacement, hold one of the right ones."""
    return 1 - comb(num - num_right, k) / comb(num, k) if k < num else 1.0
