"""Causal attention for CPUs: blocks of queries as plain matrix products, separately for each sample of a row.

Where rows are short, PyTorch's attention kernel for CPUs takes a third of a training step, most of it in the backward
pass. Here each block of queries attends to the keys up to its end, so about half of the scores are never computed, and
each product is a matrix product of the library. The gradient is that of softmax(q kᵀ · scale) v (FlashAttention, arXiv
2205.14135, appendix B).

Axes: B rows, T tokens per row, H query heads, G key heads, R = H / G, E width of a head. S samples of length L have the
same length; a block has n queries and m keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "blocks"  # of `attn_implementation` in Transformers
BLOCK = 128  # queries per block, on average
NOT_IN_BLOCKS = ("softcap", "position_bias", "s_aux")  # options of attention layers that change the scores


def register() -> None:
    """Make `NAME` known to Transformers."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attend(
    module: nn.Module,
    query: Float[Tensor, "b h t e"],
    key: Float[Tensor, "b g s e"],
    value: Float[Tensor, "b g s e"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sample_starts: Int[Tensor, " n"] | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "b t h e"], None]:
    """Transformers' attention interface; masked rows and other devices use PyTorch's kernel.

    With `sample_starts`, the first positions of the samples in a single row, tokens attend within their sample, and
    `attention_mask` has no effect. Raises ValueError if this attention cannot be computed in blocks.
    """
    length, causal = query.shape[2], options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    special = [name for name in NOT_IN_BLOCKS if options.get(name) is not None]
    plain = not special and not dropout and query.device.type == "cpu"
    decoding = plain and length == 1 and sample_starts is None
    if sample_starts is not None:
        if not (plain and causal):
            raise ValueError(f"{type(module).__name__} cannot attend within the samples of a row")
    elif not decoding and (not (plain and causal) or attention_mask is not None or length != key.shape[2]):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (each.to(torch.get_autocast_dtype("cpu")) for each in (query, key, value))
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if decoding:
        return _attend_from_last(query * scale, key, value, attention_mask), None
    ends = (*(() if sample_starts is None else sample_starts.tolist()[1:]), length)
    return BlockAttention.apply(query, key, value, scale, ends, options.get("sliding_window")), None


def _attend_from_last(
    query: Float[Tensor, "b h 1 e"], key: Float[Tensor, "b g s e"], value: Float[Tensor, "b g s e"], mask: Tensor | None
) -> Float[Tensor, "b 1 h e"]:
    """Attention of one scaled query per head to all keys, as in decoding.

    The query heads of a key head are the rows of one matrix product, so no key is copied for each of them.
    """
    scores = torch.matmul(query[:, :, 0].unflatten(1, (key.shape[1], -1)), key.mT)  # B G R S
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    return torch.matmul(torch.softmax(scores, -1), value).flatten(1, 2)[:, None]  # B 1 H E


class BlockAttention(torch.autograd.Function):
    """Causal attention within samples that end at `ends`. The probabilities are kept for the backward pass.

    Each token attends to itself and to the `window` - 1 tokens before it; None is no limit.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, ends: tuple[int, ...], window: int | None
    ) -> Tensor:
        heads, width = query.shape[1], query.shape[3]
        group = heads // key.shape[1]
        output = query.new_empty(query.shape[0], query.shape[2], heads, width)  # B T H E
        probabilities = []
        query = query * scale
        views = zip(*(_samples(each, ends) for each in (query, key, value, output.transpose(1, 2))), strict=True)
        for q, k, v, out in views:  # S H L E, S G L E, S G L E, S H L E: S samples of length L
            q, out = q.unflatten(1, (-1, group)), out.unflatten(1, (-1, group))  # S G R L E
            for rows, columns in _blocks(q.shape[3], window):
                scores = _product(q[..., rows, :], k[..., columns, :].mT)  # S G R n m
                hidden = _hidden(rows.start - columns.start, *scores.shape[3:], window, scores.dtype)  # n m
                p = torch.softmax(scores.add_(hidden), -1)  # S G R n m
                out[..., rows, :] = _product(p, v[..., columns, :])
                probabilities.append(p)
        ctx.save_for_backward(query, key, value, *probabilities)
        ctx.scale, ctx.ends, ctx.window = scale, ends, window
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *probabilities = ctx.saved_tensors
        group = query.shape[1] // key.shape[1]
        grads = [torch.zeros_like(each) for each in (query, key, value)]
        given = grad_output.to(query.dtype).transpose(1, 2)  # B H T E
        views = zip(*(_samples(each, ctx.ends) for each in (query, key, value, given, *grads)), strict=True)
        blocks = iter(probabilities)
        for q, k, v, do, dq, dk, dv in views:
            q, do, dq = (each.unflatten(1, (-1, group)) for each in (q, do, dq))  # S G R L E
            for rows, columns in _blocks(q.shape[3], ctx.window):
                p, do_rows = next(blocks), do[..., rows, :]
                dv[..., columns, :] += _product_over_rows(p, do_rows)
                dp = _product(do_rows, v[..., columns, :].mT)  # S G R n m
                ds = torch._softmax_backward_data(dp, p, -1, dp.dtype)  # S G R n m
                dq[..., rows, :] = _product(ds, k[..., columns, :])
                dk[..., columns, :] += _product_over_rows(ds, q[..., rows, :])
        grads[0] *= ctx.scale
        return *grads, None, None, None


def _samples(tensor: Float[Tensor, "b h t e"], ends: tuple[int, ...]) -> Iterator[Tensor]:
    """Views of the samples along T, or one view of all if they are equally long."""
    lengths = [end - start for start, end in itertools.pairwise((0, *ends))]
    if len(set(lengths)) == 1 and len(tensor) == 1:
        yield tensor[0].unflatten(1, (len(ends), -1)).transpose(0, 1)  # S H L E
    else:
        yield from tensor.split(lengths, dim=2)  # each B H L E


def _blocks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """For each block of queries: its positions, and those of the keys that it may attend to."""
    number = max(1, round(length / BLOCK))
    for block in range(number):
        start, end = block * length // number, (block + 1) * length // number
        first = 0 if window is None else max(0, start + 1 - window)
        yield slice(start, end), slice(first, end)


@lru_cache(maxsize=64)  # all layers need the same ones
def _hidden(shift: int, num_queries: int, num_keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """-inf at the keys that come after a query, or are out of its window, else 0; the first query is key `shift`."""
    distance = shift + torch.arange(num_queries)[:, None] - torch.arange(num_keys)  # n m
    visible = (distance >= 0) & (distance < (window or shift + num_queries))
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))


def _product(a: Float[Tensor, "s g r n x"], b: Float[Tensor, "s g x y"]) -> Float[Tensor, "s g r n y"]:
    """The products for the R query heads of each key head."""
    joined = torch.bmm(a.reshape(-1, a.shape[2] * a.shape[3], a.shape[4]), b.reshape(-1, *b.shape[2:]))
    return joined.view(*a.shape[:4], -1)


def _product_over_rows(a: Float[Tensor, "s g r n x"], b: Float[Tensor, "s g r n y"]) -> Float[Tensor, "s g x y"]:
    """The sum over R and n of the outer products."""
    left, right = (each.reshape(-1, each.shape[2] * each.shape[3], each.shape[4]) for each in (a, b))
    return torch.bmm(left.mT, right).unflatten(0, a.shape[:2])
