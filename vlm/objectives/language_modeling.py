"""Next-token prediction: cross-entropy of the supervised tokens of conversations about images."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm.models.base import PredictsTokens
from vlm.objectives.base import Objective
from vlm.schema import Batch, LossOutput

# Logits per chunk. On a CPU a float32 copy of 4 MB stays in the cache; a GPU needs larger chunks, for fewer kernels.
CHUNK = {"cpu": 2**20, "gpu": 2**26}


class LanguageModeling(Objective):
    """Cross-entropy in nats, summed over the supervised tokens, in float32 for every precision of the model.

    `lm_loss` is over all of them; in a mixture, `loss/<source>` is over those of one source.
    """

    needs: ClassVar[tuple[type, ...]] = (PredictsTokens,)

    def forward(self, model: Any, batch: Batch) -> LossOutput:
        logits = model(batch)  # M V
        loss, losses = SummedCrossEntropy.apply(logits, batch.targets)  # and M
        sums, counts = {"lm_loss": loss}, {"lm_loss": len(batch.targets)}
        if batch.sources:  # also sources without a sample in this batch, because every rank must sum the same names
            source = torch.tensor([batch.sources.index(sample.meta["source"]) for sample in batch.samples])
            source = source.to(losses.device)[batch.sample_index[batch.logits_mask]]  # M
            for number, name in enumerate(batch.sources):
                sums[f"loss/{name}"] = losses[source == number].sum()
                counts[f"loss/{name}"] = int((source == number).sum())
        return LossOutput(sums=sums, counts=counts)


class SummedCrossEntropy(torch.autograd.Function):
    """`F.cross_entropy(logits.float(), targets, reduction="sum")` in chunks of rows, with its gradient.

    Returns the sum and the losses per row; the latter have no gradient.

    Logits are the largest tensor of a step, so they are never copied to float32 as a whole. The gradient of row m is
    softmax(logits[m]) - onehot(targets[m]).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None  # M V
        losses = logits.new_empty(len(logits), dtype=torch.float32)  # M
        rows = max(1, CHUNK["cpu" if logits.device.type == "cpu" else "gpu"] // logits.shape[1])
        # One buffer for all chunks: fresh memory pages would cost more than the arithmetic.
        buffer = logits.new_empty(2, min(rows, len(logits)), logits.shape[1], dtype=torch.float32)
        for start in range(0, len(logits), rows):
            chunk = slice(start, start + rows)
            target = targets[chunk, None]
            chunk_logits, log_p = buffer[:, : len(target)]  # each at most `rows` V
            torch.log_softmax(chunk_logits.copy_(logits[chunk]), 1, out=log_p)
            losses[chunk] = -log_p.gather(1, target)[:, 0]
            if gradient is not None:
                p = log_p.exp_()
                gradient[chunk] = p.scatter_add_(1, target, p.new_full(target.shape, -1.0))
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_output), None  # in place: a second backward raises
