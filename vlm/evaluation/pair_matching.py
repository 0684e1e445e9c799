"""Whether a model of pairs tells a text's own image from another one."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from vlm.evaluation.base import Context, Evaluator
from vlm.evaluation.intervals import wilson
from vlm.evaluation.visual_gain import swapped
from vlm.models.base import MatchesPairs
from vlm.schema import Batch, LossOutput


class PairMatching(Evaluator):
    """`val/pair_matching/accuracy`: how often the model is right about an image and a text belonging together.

    Each text is shown with its own image and with that of another sample, so without the images 50 % is the best.
    `…_shuffled`, the control, takes two images of other samples and calls the first one right: 50 % is expected.
    `…_low` and `…_high` are Wilson's 95 % interval of the first. Texts whose image cannot be swapped are left out.
    """

    at: Literal["validation", "end"] = "validation"
    needs: ClassVar[tuple[type, ...]] = (MatchesPairs,)

    def start(self) -> None:
        self._right, self._right_shuffled, self._num = 0, 0, 0

    def update(self, context: Context, batch: Batch, output: LossOutput) -> None:
        model = context.model
        exchanged, rows = swapped(batch)
        own, other = model.features(batch), model.features(exchanged)  # B P Dv
        third = other.roll(1, 0)  # B P Dv
        chosen = torch.tensor(rows, dtype=torch.long, device=batch.input_ids.device)  # R
        yes = []
        for features in (own, other, third):
            logits = model.match(features, batch.input_ids, batch.attention_mask)  # B 2
            yes.append(logits.argmax(1)[chosen] == 1)  # R
        self._right += int(yes[0].sum() + (~yes[1]).sum())
        self._right_shuffled += int(yes[1].sum() + (~yes[2]).sum())
        self._num += 2 * len(rows)

    def finish(self, context: Context) -> dict[str, float]:
        right, shuffled, num = context.sum_over_ranks([self._right, self._right_shuffled, self._num])
        if not num:
            return {}
        low, high = wilson(right / num, int(num))
        name = "val/pair_matching/accuracy"
        return {name: right / num, f"{name}_low": low, f"{name}_high": high, f"{name}_shuffled": shuffled / num}
