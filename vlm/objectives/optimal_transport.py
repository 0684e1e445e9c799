"""Word-region alignment by optimal transport (Chen et al., arXiv 1909.11740; IPOT: Xie et al., arXiv 1802.04307).

Axes: B pairs, T tokens, P cells, W width.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

BETA, ITERATIONS = 0.5, 50  # as UNITER; one inner step each


def transport_distance(
    words: Float[Tensor, "b t w"], cells: Float[Tensor, "b p w"], mask: Bool[Tensor, "b t"]
) -> Float[Tensor, " b"]:
    """The cost of moving the words of each text evenly onto the cells of its image, in float32.

    The cost of a word and a cell is 1 - cosine. The plan has no gradient. `mask` is False at padding.
    """
    with torch.autocast(words.device.type, enabled=False):
        cosines = F.normalize(words.float(), dim=-1) @ F.normalize(cells.float(), dim=-1).mT  # B T P
        cost = (1 - cosines).masked_fill(~mask[..., None], 0)  # B T P
        return (cost * transport_plan(cost, mask)).sum((1, 2))  # B


@torch.no_grad()
def transport_plan(cost: Float[Tensor, "b t p"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, "b t p"]:
    """How much of each word goes to each cell, by IPOT: a word holds 1/T, a cell takes about 1/P.

    The proximal point method T ← diag(σ) (G ∘ T) diag(δ) with G = exp(-cost/β) starts from T = 1 everywhere; after its
    last step the sums over the words are exact, those over the cells as good as it has converged. Padding holds 0.
    """
    share = mask / mask.sum(1, keepdim=True)  # B T, of each word
    kernel = torch.exp(-cost / BETA) * mask[..., None]  # B T P
    plan, words = mask[..., None].to(cost.dtype).expand_as(cost), share  # B T P, B T
    for _ in range(ITERATIONS):
        scaled = kernel * plan  # B T P
        cells = 1 / (cost.shape[2] * torch.einsum("btp,bt->bp", scaled, words))  # B P
        words = share / torch.einsum("btp,bp->bt", scaled, cells).masked_fill(~mask, 1)  # B T
        plan = words[..., None] * scaled * cells[:, None]  # B T P
    return plan
