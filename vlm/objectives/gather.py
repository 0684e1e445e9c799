"""Rows of all ranks, for losses that compare each row with all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def of_all_ranks(tensor: Tensor) -> list[Tensor]:
    """The tensor of each rank, in their order; they may differ in their first two axes.

    The gradient of a rank's tensor is the sum over all ranks. Every rank must call this.
    """
    if num_ranks() == 1:
        return [tensor]
    mine = torch.tensor([*tensor.shape[:2], 0][:2], device=tensor.device)
    shapes = torch.stack(_Gather.apply(mine)).tolist()
    most = [max(sizes) for sizes in zip(*shapes, strict=True)]
    axes = min(2, tensor.ndim)
    padding = [0] * (2 * (tensor.ndim - axes))
    for axis in reversed(range(axes)):
        padding += [0, most[axis] - tensor.shape[axis]]
    gathered = _Gather.apply(F.pad(tensor, padding))
    cut = [tuple(slice(size) for size in sizes[:axes]) for sizes in shapes]
    return [each[slices] for each, slices in zip(gathered, cut, strict=True)]


class _Gather(torch.autograd.Function):
    """`all_gather` with the gradient of all ranks' losses."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> tuple[Tensor, ...]:
        gathered = [torch.empty_like(tensor) for _ in range(num_ranks())]
        dist.all_gather(gathered, tensor.contiguous())
        return tuple(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        summed = torch.stack(gradients)
        dist.all_reduce(summed)
        return summed[dist.get_rank()]


def from_rank_zero(tensor: Tensor) -> Tensor:
    """The tensor of rank 0; every rank must call this with one of the same shape."""
    if num_ranks() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Rows of all ranks, padded on the right to the longest."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, longest - part.shape[1])) for part in parts])
