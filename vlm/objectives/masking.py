"""What is masked or swapped in a batch of pairs of an image and a text.

Axes: B rows of this rank, A rows of all ranks, T tokens, P cells.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from vlm.objectives.gather import from_rank_zero, joined, num_ranks, of_all_ranks
from vlm.objectives.representation_learning import draw_one
from vlm.schema import Batch

MASKED, RANDOM = 0.8, 0.1  # of the chosen words, as BERT (arXiv 1810.04805); the others stay as they are


class Draws(NamedTuple):
    """Random numbers in [0, 1) for each row; those of a row do not depend on its padding or on the number of ranks."""

    swap: Float[Tensor, "b 2"]
    cells: Float[Tensor, "b p 2"]
    words: Float[Tensor, "b t 3"]


class Texts(NamedTuple):
    """Token ids, right-padded where `mask` is False; `matches` is False for a text of another row."""

    ids: Int[Tensor, "b t"]
    mask: Bool[Tensor, "b t"]
    matches: Bool[Tensor, " b"]


def draws(batch: Batch, *, num_cells: int, num_tokens: int, training: bool) -> Draws:
    """New numbers in training; in validation those of a sample are always the same."""
    if training:
        sizes = [len(each) for each in of_all_ranks(torch.zeros(len(batch.ids), device=batch.input_ids.device))]
        rank = dist.get_rank() if num_ranks() > 1 else 0
        seeds = (
            from_rank_zero(torch.randint(2**62, (sum(sizes),)).to(batch.input_ids.device)).split(sizes)[rank].tolist()
        )
    else:
        seeds = [_number(name) for name in batch.ids]
    size = 2 + 2 * num_cells + 3 * num_tokens
    numbers = torch.stack([torch.rand(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    swap, cells, words = numbers.to(batch.input_ids.device).split([2, 2 * num_cells, 3 * num_tokens], dim=1)
    return Draws(swap, cells.unflatten(1, (num_cells, 2)), words.unflatten(1, (num_tokens, 3)))


def texts_of_all_ranks(batch: Batch) -> tuple[Int[Tensor, "a t"], Bool[Tensor, "a t"]]:
    ids = joined(of_all_ranks(batch.input_ids))  # A T
    lengths = torch.cat(of_all_ranks(batch.attention_mask.sum(1)))  # A
    return ids, torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]


def with_other_texts(
    batch: Batch,
    others: tuple[Int[Tensor, "a t"], Bool[Tensor, "a t"]],
    uniform: Float[Tensor, "b 2"],
    *,
    ratio: float,
) -> Texts:
    """The texts of the batch, of which about `ratio` are replaced by another text of any rank, drawn evenly.

    A text that equals all others stays.
    """
    missing = others[0].shape[1] - batch.input_ids.shape[1]
    ids, mask = F.pad(batch.input_ids, (0, missing)), F.pad(batch.attention_mask, (0, missing))  # B T
    differs = (ids[:, None] != others[0]).any(-1)  # B A
    chosen = (uniform[:, 0] < ratio) & differs.any(1)  # B
    partners = draw_one(differs[chosen].float(), uniform[chosen, 1].double())  # R
    ids, mask = ids.clone(), mask.clone()
    ids[chosen], mask[chosen] = others[0][partners], others[1][partners]
    return Texts(ids, mask, ~chosen)


def chosen(
    candidates: Bool[Tensor, "b s"], uniform: Float[Tensor, "b s"], *, ratio: float, at_least_one: bool = False
) -> Bool[Tensor, "b s"]:
    """Each candidate with probability `ratio`; with `at_least_one`, one in each row that has candidates."""
    found = candidates & (uniform < ratio)  # B S
    if at_least_one:
        first = uniform.masked_fill(~candidates, 2.0).argmin(1, keepdim=True)  # B 1
        found = found | (torch.zeros_like(found).scatter(1, first, True) & candidates & ~found.any(1, keepdim=True))
    return found


def words_of(texts: Texts, tokenizer: Any) -> Bool[Tensor, "b t"]:
    """Where a token is a word or a part of one, not a special token."""
    special = torch.tensor(tokenizer.all_special_ids, device=texts.ids.device)
    return texts.mask & ~torch.isin(texts.ids, special)


def masked(
    ids: Int[Tensor, "b t"], where: Bool[Tensor, "b t"], uniform: Float[Tensor, "b t 2"], tokenizer: Any
) -> Int[Tensor, "b t"]:
    """The ids with 80 % of the chosen words replaced by [MASK] and 10 % by a random word."""
    random = (uniform[..., 1] * tokenizer.vocab_size).long()  # B T
    ids = torch.where(where & (uniform[..., 0] < MASKED + RANDOM), random, ids)  # B T
    return torch.where(where & (uniform[..., 0] < MASKED), tokenizer.mask_token_id, ids)  # B T


def _number(name: str) -> int:
    """A number for a sample, the same in all runs."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=7).digest())
