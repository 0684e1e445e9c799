"""ViLBERT's three losses: masked words, masked cells, and alignment (Lu et al., arXiv 1908.02265).

Axes: B rows of this rank, T tokens, P cells, Y classes, M masked positions.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vlm.models.base import FusesPairs
from vlm.objectives.base import Objective
from vlm.objectives.masking import chosen, draws, masked, texts_of_all_ranks, with_other_texts, words_of
from vlm.ranges import Ratio
from vlm.schema import Batch, Form, LossOutput

HIDDEN = 0.9  # of the chosen cells, as ViLBERT; the others stay visible


class MaskedPairs(Objective):
    """The sum of three losses on pairs of an image and a text, in float32 and nats.

    - `word_loss`: cross-entropy of the masked words; they are masked as in BERT.
    - `cell_loss`: KL(p‖q) of the masked cells, with p the classes that the frozen classifier sees there in the whole
      image and q the prediction.
    - `alignment_loss`: whether image and text belong together; some texts are swapped for one of another row.

    Words and cells of a row with a swapped text are masked too but have no loss, because the other side says nothing
    about them (12-in-1, arXiv 1912.02315). Each loss is summed over its own words, cells or rows; nothing masked adds
    nothing.

    Args:
        mask_ratio: of the words and of the cells.
        swap_ratio: of the texts.
    """

    needs: ClassVar[tuple[type, ...]] = (FusesPairs,)
    form: ClassVar[Form] = "pair"

    def __init__(self, *, mask_ratio: Ratio = 0.15, swap_ratio: Ratio = 0.5) -> None:
        super().__init__()
        self.mask_ratio, self.swap_ratio = mask_ratio, swap_ratio

    def forward(self, model: Any, batch: Batch) -> LossOutput:
        others = texts_of_all_ranks(batch)
        drawn = draws(batch, num_cells=model.num_cells, num_tokens=others[0].shape[1], training=self.training)
        texts = with_other_texts(batch, others, drawn.swap, ratio=self.swap_ratio)
        words = chosen(words_of(texts, model.tokenizer), drawn.words[..., 0], ratio=self.mask_ratio)  # B T
        every_cell = torch.ones_like(drawn.cells[..., 0], dtype=torch.bool)  # B P
        cells = chosen(every_cell, drawn.cells[..., 0], ratio=self.mask_ratio)  # B P

        hidden = cells & (drawn.cells[..., 1] < HIDDEN)  # B P
        features = model.masked_features(batch.pixel_values, hidden)  # B P Dv
        ids = masked(texts.ids, words, drawn.words[..., 1:], model.tokenizer)  # B T
        fused = model.fuse(features, ids, texts.mask)

        words, cells = (each & texts.matches[:, None] for each in (words, cells))  # B T, B P
        word_logits = model.predict_words(fused.words[words]).float()  # M V
        class_logits = model.predict_classes(fused.cells[cells]).float()  # M Y
        match_logits = model.match_pair(fused.pair).float()  # B 2
        targets, matches = texts.ids[words], texts.matches.long()  # M, B
        classes = model.cell_classes(batch.pixel_values)[cells].float()  # M Y
        sums = {
            "word_loss": F.cross_entropy(word_logits, targets, reduction="sum"),
            "cell_loss": divergence(classes, class_logits),
            "alignment_loss": F.cross_entropy(match_logits, matches, reduction="sum"),
            "word_accuracy": (word_logits.argmax(1) == targets).float().sum(),
            "cell_accuracy": (class_logits.argmax(1) == classes.argmax(1)).float().sum(),
            "alignment_accuracy": (match_logits.argmax(1) == matches).float().sum(),
        }
        counts = {"word": len(targets), "cell": len(classes), "alignment": len(matches)}
        return LossOutput(sums=sums, counts={name: counts[name.partition("_")[0]] for name in sums})


def divergence(target_logits: Float[Tensor, "m y"], logits: Float[Tensor, "m y"]) -> Float[Tensor, ""]:
    """KL(softmax(target_logits)‖softmax(logits)) in nats, summed over the rows."""
    return F.kl_div(logits.log_softmax(1), target_logits.log_softmax(1), reduction="sum", log_target=True)
