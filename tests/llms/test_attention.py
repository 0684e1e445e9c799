"""Attention in blocks against PyTorch's, and batches in one row against padded ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.helpers.llms import small_llm
from tests.helpers.parts import IMAGE, make_batch, tiny_model
from vlm.launch.configs import options_of
from vlm.llms import attention
from vlm.llms.attention import BlockAttention
from vlm.objectives.language_modeling import LanguageModeling

CAUSAL = sorted({*options_of("llm")} - {"hf", "flan_t5_xl"})
ROWS = (
    ([11, IMAGE, 12, IMAGE, 13], [21, 31]),
    ([14, 15], [22, 23]),
    ([IMAGE, 16, 17, 18, 19, 20, 33, 34], [24, 25, 26, 27]),
)


def heads(number: int, *, length: int, dtype: torch.dtype, rows: int = 1, width: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, length, number, width, generator=generator).to(dtype).transpose(1, 2).requires_grad_()


def masked(q: Tensor, k: Tensor, v: Tensor, *, scale: float, ends: tuple[int, ...], window: int | None) -> Tensor:
    """PyTorch's attention with a mask of T x T."""
    position = torch.arange(q.shape[2])
    sample = torch.bucketize(position, torch.tensor(ends), right=True)
    distance = position[:, None] - position
    mask = (distance >= 0) & (distance < (window or len(position))) & (sample[:, None] == sample)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return attended.transpose(1, 2)


@pytest.mark.parametrize("window", [None, 7, 150])
@pytest.mark.parametrize(
    ("rows", "ends"),
    [(3, (300,)), (1, (100, 200, 300)), (1, (1, 7, 300)), (2, (130, 300)), (1, (300,))],
    ids=["rows", "equal samples", "samples", "two rows of samples", "one sample"],
)
def test_output_and_gradients_are_those_of_the_masked_kernel(rows: int, ends: tuple[int, ...], window: Any) -> None:
    q, k, v = (heads(n, length=300, rows=rows, dtype=torch.float32, seed=n) for n in (6, 2, 2))
    v.data += 0.1
    found = BlockAttention.apply(q, k, v, 0.3, ends, window)
    expected = masked(q, k, v, scale=0.3, ends=ends, window=window)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    given = torch.randn(found.shape, generator=torch.Generator().manual_seed(9))
    gradients = (torch.autograd.grad(output, (q, k, v), given) for output in (found, expected))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_as_close_to_float32_as_the_kernel() -> None:
    exact = [heads(n, length=200, dtype=torch.float32, seed=n) for n in (6, 2, 3)]
    exact[2] = exact[1].detach().flip(2).requires_grad_()
    rounded = [each.detach().bfloat16().requires_grad_() for each in exact]
    options: dict[str, Any] = {"scale": 0.3, "ends": (200,), "window": None}

    def errors(output: Tensor) -> list[float]:
        truth = masked(*exact, **options)
        found = [output, *torch.autograd.grad(output.float().square().sum(), rounded)]
        expected = [truth, *torch.autograd.grad(truth.square().sum(), exact)]
        return [
            float((a.detach().float() - b.detach()).square().mean().sqrt())
            for a, b in zip(found, expected, strict=True)
        ]

    mine = errors(BlockAttention.apply(*rounded, 0.3, (200,), None))
    theirs = errors(masked(*rounded, **options))
    assert all(0 < a < 2 * b for a, b in zip(mine, theirs, strict=True)), (mine, theirs)


@pytest.mark.parametrize("option", CAUSAL)
def test_a_batch_in_one_row_has_the_loss_and_the_gradients_of_padded_rows(option: str) -> None:
    batch = make_batch(*ROWS)
    losses, gradients = [], []
    for kind in ("auto", "sdpa"):
        model = tiny_model(llm=small_llm(option, attention=kind))  # type: ignore[arg-type]
        model.llm.requires_grad_(True)
        assert model.llm.joins_rows == (kind == "auto")
        loss = LanguageModeling()(model, batch).sums["lm_loss"]
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    assert {name.partition(".")[0] for name in gradients[0]} == {"connector", "llm", "encoder"}
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_the_llm_computes_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(*ROWS)
    model = tiny_model(llm=small_llm("smollm2_135m"))  # type: ignore[arg-type]
    shapes = []
    model.llm.layers()[0].register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[:2]))
    model(batch)
    assert batch.attention_mask.numel() > int(batch.attention_mask.sum())
    assert shapes == [(1, int(batch.attention_mask.sum()))]


def test_in_one_row_keeps_which_images_a_token_may_see() -> None:
    joined = make_batch(*ROWS).in_one_row()
    assert joined.num_images.tolist() == [3]
    assert joined.layouts == [[(1,), (1,), (1,)]]
    assert joined.llm_mask is None
    assert joined.targets.tolist() == make_batch(*ROWS).targets.tolist()
    lengths = [13, 4, 15]
    assert joined.sample_index[0].tolist() == [row for row, length in enumerate(lengths) for _ in range(length)]
    assert joined.position_ids[0].tolist() == [position for length in lengths for position in range(length)]
    assert joined.images_hidden[0].tolist() == [0] * 13 + [2] * 19
    assert joined.images_before[0].tolist() == [0, *[1] * 5, *[2] * 7, *[2] * 4, *[3] * 15]


def test_a_model_that_does_not_pass_the_samples_on_keeps_padded_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def deaf(*args: Any, sample_starts: Tensor | None = None, **options: Any) -> Any:
        return known(*args, **options)

    known = attention.attend
    monkeypatch.setattr(attention, "attend", deaf)
    llm = small_llm("smollm2_135m")
    assert not llm.joins_rows
    assert llm.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_the_last_token_attends_as_in_the_kernel(mask: str) -> None:
    q = heads(6, length=1, rows=3, dtype=torch.float32, seed=1)
    k, v = (heads(2, length=9, rows=3, dtype=torch.float32, seed=n) for n in (2, 3))
    hidden = torch.arange(9) < torch.tensor([0, 2, 5])[:, None, None, None]  # padding on the left
    bias = torch.randn(3, 1, 1, 9).masked_fill(hidden, float("-inf"))
    given = {"none": None, "bool": ~hidden, "float": bias}[mask]
    output, _ = attention.attend(torch.nn.Module(), q, k, v, given, scaling=0.3)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=given, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(output, expected.transpose(1, 2))


def test_decoding_does_not_use_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's takes over ten times as long for one query."""
    lengths = []

    def kernel(module: Any, query: Tensor, *args: Any, **options: Any) -> Any:
        lengths.append(query.shape[2])
        return sdpa_attention_forward(module, query, *args, **options)

    monkeypatch.setattr(attention, "sdpa_attention_forward", kernel)
    batch = make_batch(*[(prompt, []) for prompt, _ in ROWS], side="left")
    tiny_model(llm=small_llm("smollm2_135m")).generate(batch, stop_ids=[2], max_new_tokens=4)
    assert lengths
    assert min(lengths) > 1


@pytest.mark.parametrize("option", ["softcap", "position_bias", "s_aux"])
def test_scores_that_a_layer_changes_are_not_computed_in_blocks(option: str) -> None:
    q, k, v = (heads(2, length=6, dtype=torch.float32, seed=n) for n in (1, 2, 3))
    starts = torch.tensor([0, 3])
    with pytest.raises(ValueError, match="Module cannot attend within the samples of a row"):
        attention.attend(torch.nn.Module(), q, k, v, None, sample_starts=starts, **{option: torch.ones(())})


def test_generation_is_that_of_pytorchs_attention() -> None:
    batch = make_batch(*[(prompt, []) for prompt, _ in ROWS], side="left")
    answers = [
        tiny_model(llm=small_llm("gemma3_270m", attention=kind)).generate(  # type: ignore[arg-type]
            batch, stop_ids=[2], max_new_tokens=12
        )
        for kind in ("auto", "sdpa")
    ]
    assert answers[0].tolist() == answers[1].tolist()
    assert len({*answers[0].flatten().tolist()}) > 3
