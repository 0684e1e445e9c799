"""Retrieval among the validation pairs: by embeddings, then re-ranked by matching (BLIP-2, arXiv 2301.12597).

Axes: I images, T texts, K embeddings per image, E their width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch import distributed as dist

from vlm.evaluation.base import Context, Evaluator
from vlm.evaluation.benchmarks.retrieval import AT, chance
from vlm.evaluation.intervals import wilson
from vlm.models.base import MatchesPairs
from vlm.ranges import BatchSize, Samples
from vlm.schema import Batch, LossOutput, Message, Sample


@dataclass
class _Pairs:
    """The images of a rank with their texts, in the order of the validation."""

    features: list[Tensor]  # each P Dv, on the CPU
    image_embeds: list[Tensor]  # each K E
    texts: list[tuple[int, ...]]  # token ids
    text_embeds: list[Tensor]  # each E
    owners: list[int]  # of each text, its image


class PairRetrieval(Evaluator):
    """`val/image_to_text/R@k` and `val/text_to_image/R@k`: the ratio of queries with a right answer among the best k.

    All validation images and all their texts are candidates: of an image with several texts each is right, and so is an
    equal text of another image. The best `num_reranked` by cosine are ordered again by cosine plus the logit of
    matching; the others count as worse. `…_contrastive` is without matching, `…_chance` for a random order, and `…_low`
    and `…_high` are Wilson's 95 % interval. A tie counts as a miss.

    A model that matches but embeds nothing (ViLBERT, UNITER) matches each text with each image, and has no
    `…_contrastive`.

    Args:
        num_reranked: candidates per query that matching orders; BLIP-2 takes 128.
        batch_size: pairs that are matched together.
    """

    at: Literal["validation", "end"] = "validation"
    needs: ClassVar[tuple[type, ...]] = (MatchesPairs,)

    def __init__(self, *, num_reranked: Samples = 128, batch_size: BatchSize = 64) -> None:
        self.num_reranked, self.batch_size = num_reranked, batch_size

    def start(self) -> None:
        self._own = _Pairs([], [], [], [], [])

    def update(self, context: Context, batch: Batch, output: LossOutput) -> None:
        model, own = context.model, self._own
        features = batch.of_each_image(model.features(batch))  # B P Dv
        texts = [self._texts(context, sample) for sample in batch.samples]
        own.owners += [len(own.features) + row for row, of_image in enumerate(texts) for _ in of_image]
        flat = [*chain.from_iterable(texts)]
        own.texts += flat
        if hasattr(model, "embed_images"):
            own.text_embeds += model.embed_texts(*_padded(flat, context.device)).cpu()
            own.image_embeds += model.embed_images(features).cpu()
        else:  # all cosines are equal
            own.text_embeds += [torch.zeros(1)] * len(flat)
            own.image_embeds += [torch.zeros(1, 1)] * len(features)
        own.features += features.cpu()

    @staticmethod
    def _texts(context: Context, sample: Sample) -> list[tuple[int, ...]]:
        """The token ids of an image's texts: of `meta["references"]` where there are several."""
        answer = "".join(item.get("text", "") for item in sample.messages[-1]["content"])
        texts = json.loads(sample.meta.get("references", "[]")) or [answer]
        turns = [Message(role="assistant", content=[{"type": "text", "text": text}]) for text in dict.fromkeys(texts)]
        samples = (replace(sample, messages=[*sample.messages[:-1], turn]) for turn in turns)
        return [tuple(context.data.text.encode_pair(each).input_ids) for each in samples]

    def finish(self, context: Context) -> dict[str, float]:
        own = self._own
        ranks = _gathered((own.image_embeds, own.texts, own.text_embeds, own.owners))
        starts = [0]
        for images, *_ in ranks:
            starts.append(starts[-1] + len(images))
        texts = [*chain.from_iterable(texts for _, texts, _, _ in ranks)]
        owners = [start + owner for start, (*_, own_owners) in zip(starts, ranks, strict=False) for owner in own_owners]
        text_embeds = torch.stack([*chain.from_iterable(embeds for _, _, embeds, _ in ranks)])  # T E
        images = chain.from_iterable(embeds for embeds, *_ in ranks)
        cosines = torch.stack([(image @ text_embeds.T).amax(0) for image in images])  # I T
        right = torch.zeros_like(cosines, dtype=torch.bool)  # I T
        for image, text in zip(owners, texts, strict=True):
            right[image] |= torch.tensor([other == text for other in texts])
        embeds = hasattr(context.model, "embed_images")
        num = self.num_reranked if embeds else max(cosines.shape)
        candidates = (_best(cosines, num, axis=1), _best(cosines, num, axis=0))  # I T each
        first = starts[dist.get_rank() if len(ranks) > 1 else 0]
        pairs = [
            (i, t) for i, t in (candidates[0] | candidates[1]).nonzero().tolist() if 0 <= i - first < len(own.features)
        ]
        scores = cosines.clone()
        for of_rank, logits in _gathered((pairs, self._match(context, pairs, texts, first))):
            for (image, text), logit in zip(of_rank, logits, strict=True):
                scores[image, text] += logit
        metrics: dict[str, float] = {}
        for axis, direction in ((1, "image_to_text"), (0, "text_to_image")):
            ordered = scores.masked_fill(~candidates[1 - axis], -torch.inf)
            metrics |= _metrics(direction, *(each if axis else each.T for each in (ordered, cosines, right)))
        return metrics if embeds else {name: metrics[name] for name in metrics if not name.endswith("_contrastive")}

    def _match(
        self, context: Context, pairs: Sequence[tuple[int, int]], texts: Sequence[tuple[int, ...]], first: int
    ) -> list[float]:
        """The logit of matching of each pair; every rank calls the model equally often."""
        chunks = [pairs[start : start + self.batch_size] for start in range(0, len(pairs), self.batch_size)]
        most = max(_gathered(len(chunks)))
        logits: list[float] = []
        for number in range(most):
            chunk = chunks[number] if number < len(chunks) else pairs[:1]
            features = torch.stack([self._own.features[image - first] for image, _ in chunk]).to(context.device)
            with context.autocast():
                found = context.model.match(features, *_padded([texts[text] for _, text in chunk], context.device))
            logits += found[:, 1].float().tolist() if number < len(chunks) else []
        return logits


def _metrics(
    direction: str, scores: Float[Tensor, "q a"], cosines: Float[Tensor, "q a"], right: Bool[Tensor, "q a"]
) -> dict[str, float]:
    """The metrics of one direction, with its queries in rows and its answers in columns."""
    num_right = right.sum(1).tolist()
    metrics = {}
    for k in AT:
        name = f"val/{direction}/R@{k}"
        metrics[name] = recall = float((ranks_of(scores, right) <= k).float().mean())
        metrics[f"{name}_low"], metrics[f"{name}_high"] = wilson(recall, len(right))
        metrics[f"{name}_contrastive"] = float((ranks_of(cosines, right) <= k).float().mean())
        metrics[f"{name}_chance"] = sum(chance(right.shape[1], num, k) for num in num_right) / len(num_right)
    return metrics


def ranks_of(scores: Float[Tensor, "q a"], right: Bool[Tensor, "q a"]) -> Tensor:
    """The rank of each query's best right answer, from 1; wrong answers with the same score come before it."""
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)  # Q 1
    return 1 + ((scores >= best) & ~right).sum(1)  # Q


def _best(scores: Float[Tensor, "i t"], num: int, *, axis: int) -> Bool[Tensor, "i t"]:
    """The `num` largest scores of each row (axis 1) or column (axis 0)."""
    indices = scores.topk(min(num, scores.shape[axis]), dim=axis).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(axis, indices, True)


def _padded(texts: Sequence[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids, right-padded with 0, and their mask."""
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=device)  # B T
    lengths = torch.tensor([len(text) for text in texts], device=device)  # B
    return ids, torch.arange(longest, device=device) < lengths[:, None]


def _gathered(value: Any) -> list[Any]:
    """The value of each rank; every rank must call this."""
    if not dist.is_available() or not dist.is_initialized():
        return [value]
    gathered = [value] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
