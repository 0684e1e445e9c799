"""UNITER's tasks: conditional masking, matching, and alignment of words and cells (Chen et al., arXiv 1909.11740).

Axes: B rows of this rank, T tokens, P cells, Dv encoder width, Y classes, M masked positions.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm.models.base import FusesPairs, PredictsFeatures
from vlm.objectives.base import Objective
from vlm.objectives.gather import from_rank_zero
from vlm.objectives.masked_pairs import divergence
from vlm.objectives.masking import (
    Draws,
    Texts,
    chosen,
    draws,
    masked,
    texts_of_all_ranks,
    with_other_texts,
    words_of,
)
from vlm.objectives.optimal_transport import transport_distance
from vlm.ranges import Length, Number, Range, Ratio
from vlm.schema import Batch, Form, LossOutput

Task = Literal["word", "feature", "class", "matching"]
TASKS: tuple[Task, ...] = get_args(Task)
LOSSES = {
    "word": ("word_loss", "word_accuracy"),
    "feature": ("feature_loss",),
    "class": ("class_loss", "class_accuracy"),
    "matching": ("matching_loss", "transport_loss", "matching_accuracy"),
}
Weight = Annotated[Number, Range(0, 10**6)]
Sums = dict[str, tuple[Tensor, int]]


class ConditionalMasking(Objective):
    """One task per step, drawn by its weight, the same on all ranks; a validation has all of them.

    - `word_loss`: cross-entropy of masked words, with the whole image; they are masked as in BERT.
    - `feature_loss`: mean squared error over the Dv normalized features of each masked cell, with the whole text.
    - `class_loss`: KL(p‖q) of the masked cells, with p the classes that the frozen classifier sees there in the whole
      image and q the prediction, with the whole text.
    - `matching_loss` whether image and text belong together; some texts are swapped for one of another row. With it,
      `transport_loss`: the cost of moving the words onto the cells (`transport_distance`), of the pairs that belong
      together minus that of the others.

    Losses are in float32, those of words, classes and matching in nats. Each is summed over its own words, cells or
    rows. A row has at least one masked word or cell.

    Args:
        weights: of the tasks.
        mask_ratio: of the words or of the cells.
        swap_ratio: of the texts.
        transport_weight: of `transport_loss`.
    """

    needs: ClassVar[tuple[type, ...]] = (FusesPairs, PredictsFeatures)
    form: ClassVar[Form] = "pair"

    def __init__(
        self,
        *,
        weights: Annotated[dict[Task, Weight], Length(1)],
        mask_ratio: Ratio = 0.15,
        swap_ratio: Ratio = 0.5,
        transport_weight: Weight = 0.1,
    ) -> None:
        super().__init__()
        if not any(weights.values()):
            raise ValueError(f"objective.weights={weights} are all 0; set one of them above 0")
        self.weights = torch.tensor([float(weights.get(task, 0.0)) for task in TASKS], dtype=torch.float64)
        self.mask_ratio, self.swap_ratio, self.transport_weight = mask_ratio, swap_ratio, transport_weight

    def forward(self, model: Any, batch: Batch) -> LossOutput:
        others = texts_of_all_ranks(batch)
        drawn = draws(batch, num_cells=model.num_cells, num_tokens=others[0].shape[1], training=self.training)
        task = self._task(batch.input_ids.device) if self.training else None
        found: Sums = {}
        for each in TASKS:
            if task not in (None, each):  # named all the same, so that every step reports the same names
                found |= {name: (torch.zeros((), device=batch.input_ids.device), 0) for name in LOSSES[each]}
            elif each == "word":
                found |= self._words(model, batch, drawn)
            elif each == "matching":
                texts = with_other_texts(batch, others, drawn.swap, ratio=self.swap_ratio)
                found |= self._matching(model, batch, texts)
            else:
                found |= self._cells(model, batch, drawn, each)
        return LossOutput(
            sums={name: total for name, (total, _) in found.items()},
            counts={name: count for name, (_, count) in found.items()},
        )

    def _task(self, device: torch.device) -> Task:
        number = from_rank_zero(torch.multinomial(self.weights, 1).to(device))
        return TASKS[int(number)]

    def _words(self, model: Any, batch: Batch, drawn: Draws) -> Sums:
        texts = Texts(batch.input_ids, batch.attention_mask, torch.ones_like(batch.attention_mask[:, 0]))
        uniform = drawn.words[:, : texts.ids.shape[1]]  # B T 3
        words = chosen(
            words_of(texts, model.tokenizer), uniform[..., 0], ratio=self.mask_ratio, at_least_one=True
        )  # B T
        ids = masked(texts.ids, words, uniform[..., 1:], model.tokenizer)  # B T
        fused = model.fuse(model.masked_features(batch.pixel_values, None), ids, texts.mask)
        logits, targets = model.predict_words(fused.words[words]).float(), texts.ids[words]  # M V, M
        return {
            "word_loss": (F.cross_entropy(logits, targets, reduction="sum") + 0 * fused.pair.sum(), len(targets)),
            "word_accuracy": ((logits.argmax(1) == targets).float().sum(), len(targets)),
        }

    def _cells(self, model: Any, batch: Batch, drawn: Draws, task: Task) -> Sums:
        uniform = drawn.cells[..., 0]  # B P
        hidden = chosen(torch.ones_like(uniform, dtype=torch.bool), uniform, ratio=self.mask_ratio, at_least_one=True)
        features = model.masked_features(batch.pixel_values, hidden)  # B P Dv
        fused = model.fuse(features, batch.input_ids, batch.attention_mask)
        states, unused = fused.cells[hidden], 0 * fused.pair.sum()  # M W
        if task == "feature":
            targets = model.masked_features(batch.pixel_values, None)[hidden].float()  # M Dv
            errors = (model.predict_features(states).float() - targets).square().mean(1)  # M
            return {"feature_loss": (errors.sum() + unused, len(errors))}
        classes = model.cell_classes(batch.pixel_values)[hidden].float()  # M Y
        logits = model.predict_classes(states).float()  # M Y
        return {
            "class_loss": (divergence(classes, logits) + unused, len(logits)),
            "class_accuracy": ((logits.argmax(1) == classes.argmax(1)).float().sum(), len(logits)),
        }

    def _matching(self, model: Any, batch: Batch, texts: Texts) -> Sums:
        fused = model.fuse(model.masked_features(batch.pixel_values, None), texts.ids, texts.mask)
        logits, matches = model.match_pair(fused.pair).float(), texts.matches  # B 2, B
        distances = transport_distance(fused.words, fused.cells, texts.mask)  # B
        transport = self.transport_weight * torch.where(matches, distances, -distances).sum()
        return {
            "matching_loss": (F.cross_entropy(logits, matches.long(), reduction="sum"), len(matches)),
            "transport_loss": (transport, len(matches)),
            "matching_accuracy": ((logits.argmax(1) == matches).float().sum(), len(matches)),
        }
