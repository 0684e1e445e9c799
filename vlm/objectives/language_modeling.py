"""Next-token prediction: how well the model foretells the supervised tokens of a conversation about its images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlm.schema import Batch, LossOutput

CHUNK = 2**22  # logits handled at a time: their float32 copy (16 MB) stays in a CPU's cache


class LanguageModeling:
    """Cross-entropy in nats, summed over the supervised tokens, in float32 whatever the model's precision."""

    def __call__(self, model: nn.Module, batch: Batch) -> LossOutput:
        logits = model(batch)  # M V
        loss = SummedCrossEntropy.apply(logits, batch.targets)
        return LossOutput(sums={"lm_loss": loss}, counts={"lm_loss": len(batch.targets)})


class SummedCrossEntropy(torch.autograd.Function):
    """`F.cross_entropy(logits.float(), targets, reduction="sum")` a few rows at a time, the gradient on the way.

    A vocabulary makes logits the largest tensor of a step by far; no float32 copy of all of them is ever made. The
    gradient of row m is softmax(logits[m]) - onehot(targets[m]).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None  # M V
        loss = logits.new_zeros((), dtype=torch.float32)
        rows = max(1, CHUNK // logits.shape[1])
        for start in range(0, len(logits), rows):
            chunk = slice(start, start + rows)
            target = targets[chunk, None]
            log_p = logits[chunk].log_softmax(1, dtype=torch.float32)  # at most `rows` V
            loss -= log_p.gather(1, target).sum()
            if gradient is not None:
                p = log_p.exp_()
                gradient[chunk] = p.scatter_add_(1, target, p.new_full(target.shape, -1.0))
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_output), None  # in place: a second backward raises
