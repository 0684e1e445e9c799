"""Next-token prediction: how well the model foretells the supervised tokens of a conversation about its images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from vlm.schema import Batch, LossOutput


class LanguageModeling:
    """Cross-entropy in nats, summed over the supervised tokens, in float32 whatever the model's precision."""

    def __call__(self, model: nn.Module, batch: Batch) -> LossOutput:
        logits = model(batch)  # M V
        loss = F.cross_entropy(logits.float(), batch.targets, reduction="sum")
        return LossOutput(sums={"lm_loss": loss}, counts={"lm_loss": len(batch.targets)})
