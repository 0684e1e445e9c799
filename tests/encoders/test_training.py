"""Every family of encoders trains: wholly or by its last blocks, with checkpointing, in a batch of any size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.encoders import FAMILIES, build_encoder, members, pixels_for

pytestmark = pytest.mark.parametrize("option", FAMILIES)


def gradients(encoder: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """Of every parameter that trains, after one backward pass through a sum that weighs each feature otherwise."""
    features = encoder.train()(pixels)
    weigh = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    (features * weigh).mean().backward()
    trained = {name: p.grad for name, p in encoder.named_parameters() if p.requires_grad}
    return {name: grad for name, grad in trained.items() if grad is not None}


def test_every_parameter_gets_a_gradient(option: str) -> None:
    encoder = build_encoder(option)
    assert gradients(encoder, pixels_for(encoder, 1)).keys() == dict(encoder.named_parameters()).keys()


def test_a_batch_without_images_gives_no_features_and_zero_gradients(option: str) -> None:
    encoder = build_encoder(option)
    features = encoder(torch.empty(0, 3, *encoder.image_size))
    assert features.shape == (0, encoder.grid[0] * encoder.grid[1], encoder.width)
    features.sum().backward()  # a rank without images must take part in the gradients' reduction
    assert all(p.grad is not None and not p.grad.any() for p in encoder.parameters())


def test_features_of_an_image_do_not_depend_on_its_batch(option: str) -> None:
    encoder = build_encoder(option).train()
    pixels = pixels_for(encoder)
    torch.testing.assert_close(encoder(pixels)[:1], encoder(pixels[:1]), atol=1e-4, rtol=1e-4)


def test_blocks_hold_most_parameters_and_run_in_their_order(option: str) -> None:
    encoder = build_encoder(option)
    ran: list[tuple[int, int]] = []
    for index, block in enumerate(encoder.blocks()):
        for column, member in enumerate(members(block)):
            member.register_forward_hook(lambda *_, place=(column, index): ran.append(place))
    encoder(pixels_for(encoder, 1))
    assert ran == sorted(ran)
    assert len(ran) == sum(len(members(block)) for block in encoder.blocks())
    inside = [id(p) for block in encoder.blocks() for p in block.parameters()]
    assert len(set(inside)) == len(inside)
    assert set(inside) < {id(p) for p in encoder.parameters()}


def test_features_come_in_the_weights_type(option: str) -> None:
    encoder = build_encoder(option).to(torch.bfloat16)
    assert encoder(pixels_for(encoder, 1)).dtype == torch.bfloat16


@pytest.mark.parametrize("last_n", [1, None])
def test_checkpointing_gives_the_same_gradients(option: str, last_n: int | None) -> None:
    """Pixels need no gradient; with `last_n` neither do the first blocks, so nothing before the last is to be run."""
    found, calls = [], []
    for checkpointing in (False, True):
        encoder = build_encoder(option, gradient_checkpointing=checkpointing)
        calls.append(0)
        for module in encoder.blocks()[-1].modules():
            module.register_forward_hook(lambda *_: calls.append(calls.pop() + 1))
        if last_n is not None:
            encoder.requires_grad_(False)
            for block in encoder.blocks()[-last_n:]:
                block.requires_grad_(True)
        trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
        found.append(gradients(encoder, pixels_for(encoder)))
        assert found[-1].keys() == trained
        assert any(grad.any() for grad in found[-1].values())
    torch.testing.assert_close(*found)
    assert calls[0] < calls[1]  # run again in the backward pass
