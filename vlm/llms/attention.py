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

    Each token attends to itself and to the `window` - 1 tokens before it; None is no limit. The queries of a token for
    the R heads of a key head are beside each other, so that those of a block are the rows of one matrix.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, ends: tuple[int, ...], window: int | None
    ) -> Tensor:
        output = query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])  # B T H E
        query, out_view = (_by_key_head(each, key) for each in (query, output.transpose(1, 2)))  # B G T R E
        query = torch.mul(query, scale, out=query.new_empty(query.shape))  # B G T R E
        key, value = key.contiguous(), value.contiguous()  # B G T E
        group, probabilities = query.shape[3], []
        for q, k, v, out in zip(*(_samples(each, ends) for each in (query, key, value, out_view)), strict=True):
            q, k, v = q.flatten(0, 2).flatten(1, 2), k.flatten(0, 2), v.flatten(0, 2)  # M LR E, M L E, M L E
            for rows, columns in _blocks(k.shape[1], window):
                scores = torch.bmm(q[:, _of_group(rows, group)], k[:, columns].mT)  # M nR m
                _hide(scores.unflatten(1, (-1, group)), rows, columns, window)
                p = torch.softmax(scores, -1)  # M nR m
                part = out[:, :, :, rows]  # B G S n R E
                part.copy_(torch.bmm(p, v[:, columns]).view(part.shape))
                probabilities.append(p)
        ctx.save_for_backward(query, key, value, *probabilities)
        ctx.scale, ctx.ends, ctx.window = scale, ends, window
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *probabilities = ctx.saved_tensors
        given = _by_key_head(grad_output.to(query.dtype).transpose(1, 2), key).contiguous()  # B G T R E
        grad_query = torch.empty_like(grad_output, dtype=query.dtype).transpose(1, 2)  # B H T E
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)  # B G T E
        each = (query, given, key, value, grad_key, grad_value, _by_key_head(grad_query, key))
        group, blocks = query.shape[3], iter(probabilities)
        for q, do, k, v, dk, dv, dq in zip(*(_samples(tensor, ctx.ends) for tensor in each), strict=True):
            q, do = (tensor.flatten(0, 2).flatten(1, 2) for tensor in (q, do))  # M LR E
            k, v, dk, dv = (tensor.flatten(0, 2) for tensor in (k, v, dk, dv))  # M L E
            for rows, columns in _blocks(k.shape[1], ctx.window):
                p, queries, part = next(blocks), _of_group(rows, group), dq[:, :, :, rows]
                do_rows = do[:, queries]  # M nR E
                dv[:, columns] += torch.bmm(p.mT, do_rows)
                dp = torch.bmm(do_rows, v[:, columns].mT)  # M nR m
                ds = torch._softmax_backward_data(dp, p, -1, dp.dtype)  # M nR m
                part.copy_(torch.bmm(ds, k[:, columns]).view(part.shape))
                dk[:, columns] += torch.bmm(ds.mT, q[:, queries])
        grad_query *= ctx.scale
        return grad_query, grad_key, grad_value, None, None, None


def _by_key_head(tensor: Float[Tensor, "b h t e"], key: Float[Tensor, "b g t e"]) -> Float[Tensor, "b g t r e"]:
    return tensor.unflatten(1, (key.shape[1], -1)).transpose(2, 3)


def _of_group(rows: slice, group: int) -> slice:
    """The rows of R query heads each."""
    return slice(rows.start * group, rows.stop * group)


def _samples(tensor: Float[Tensor, "b g t *e"], ends: tuple[int, ...]) -> Iterator[Tensor]:
    """Views [B,G,S,L,·] of the samples, each alone, or all together if they are equally long."""
    lengths = [end - start for start, end in itertools.pairwise((0, *ends))]
    if len(set(lengths)) == 1:
        yield tensor.unflatten(2, (len(ends), -1))
    else:
        yield from (part[:, :, None] for part in tensor.split(lengths, dim=2))


def _blocks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """For each block of queries: its positions, and those of the keys that it may attend to."""
    number = max(1, round(length / BLOCK))
    for block in range(number):
        start, end = block * length // number, (block + 1) * length // number
        first = 0 if window is None else max(0, start + 1 - window)
        yield slice(start, end), slice(first, end)


def _hide(scores: Float[Tensor, "s n r m"], rows: slice, columns: slice, window: int | None) -> None:
    """Set the scores of keys that come after the query, or are out of its window, to -inf."""
    in_window = window is None or rows.stop - columns.start <= window  # of all queries
    first = rows.start if in_window else columns.start  # the keys before are visible to all queries
    hidden = _hidden(rows.start - first, rows.stop - rows.start, columns.stop - first, window, scores.dtype)
    scores[..., first - columns.start :].add_(hidden[:, None])


@lru_cache(maxsize=64)  # all layers need the same ones
def _hidden(shift: int, num_queries: int, num_keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """-inf at the keys that come after a query, or are out of its window, else 0; the first query is key `shift`."""
    distance = shift + torch.arange(num_queries)[:, None] - torch.arange(num_keys)  # n m
    visible = (distance >= 0) & (distance < (window or shift + num_queries))
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))
