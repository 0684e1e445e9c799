"""Every encoder option keeps the contract: P patches and only those, in rows, from the layer that was asked for."""

from __future__ import annotations

import pytest
import torch
from eyes import OPTIONS, build, members, pixels_for
from PIL import Image
from torch import Tensor, nn

pytestmark = pytest.mark.parametrize("option", OPTIONS)

# Tokens that come before the patches: class and registers.
PREFIX = {
    **dict.fromkeys(("clip_vit_b32_224", "clip_vit_l14_224", "clip_vit_l14_336"), (1,)),
    **dict.fromkeys(("siglip_b16_224", "siglip_so400m14_384", "siglip2_so400m16_384"), (0,)),
    **dict.fromkeys(("vit_b16_224", "vit_l16_224", "eva02_l14_336", "eva_g14_224", "dinov2_l14_518", "tiny"), (1,)),
    "dino_siglip": (5, 0),
    "hf": (5,),
}
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711], "bicubic")
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], "bicubic")
HALF = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], "bicubic")
TRAINED_WITH = {
    **dict.fromkeys(("clip", "convnext_l_clip", "eva"), CLIP),
    **dict.fromkeys(("convnext_b", "dino"), IMAGENET),
    "timm": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], "bilinear"),
    **dict.fromkeys(("siglip", "vit", "efficientnet", "tiny", "hf"), HALF),
}


def gradients(encoder: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """Of every parameter that trains, after one backward pass through a sum that weighs each feature otherwise."""
    features = encoder.train()(pixels)
    weigh = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    (features * weigh).mean().backward()
    trained = {name: p.grad for name, p in encoder.named_parameters() if p.requires_grad}
    return {name: grad for name, grad in trained.items() if grad is not None}


def test_contract(option: str) -> None:
    encoder = build(option)
    features = encoder(pixels_for(encoder))
    assert features.shape == (2, encoder.grid[0] * encoder.grid[1], encoder.width)
    assert encoder.transform(Image.new("RGB", (50, 70))).shape == (3, *encoder.image_size)
    assert features.isfinite().all()


def test_every_parameter_gets_a_gradient(option: str) -> None:
    encoder = build(option)
    assert gradients(encoder, pixels_for(encoder, 1)).keys() == dict(encoder.named_parameters()).keys()


def test_a_batch_without_images_gives_no_features_and_zero_gradients(option: str) -> None:
    encoder = build(option)
    features = encoder(torch.empty(0, 3, *encoder.image_size))
    assert features.shape == (0, encoder.grid[0] * encoder.grid[1], encoder.width)
    features.sum().backward()  # a rank without images must take part in the gradients' reduction
    assert all(p.grad is not None and not p.grad.any() for p in encoder.parameters())


def test_features_of_an_image_do_not_depend_on_its_batch(option: str) -> None:
    encoder = build(option).train()
    pixels = pixels_for(encoder)
    torch.testing.assert_close(encoder(pixels)[:1], encoder(pixels[:1]), atol=1e-4, rtol=1e-4)


def test_the_tokens_before_the_patches_are_dropped_and_only_those(option: str) -> None:
    encoder = build(option, layer=-1)
    found: dict[nn.Module, Tensor] = {}
    last = members(encoder.blocks()[-1])
    for block in last:
        block.register_forward_hook(lambda block, _, out: found.update({block: out}))
    features = encoder(pixels_for(encoder))
    whole = [found[block] for block in last]
    if whole[0].ndim == 4:  # a ConvNet's feature map has no such tokens; it is read row by row
        assert option not in PREFIX
        rows, cols = encoder.grid
        expected = torch.stack([whole[0][:, :, i // cols, i % cols] for i in range(rows * cols)], dim=1)
        assert torch.equal(features, expected)
    else:
        patches = encoder.grid[0] * encoder.grid[1]
        assert tuple(each.shape[1] - patches for each in whole) == PREFIX[option]
        tokens = [each[:, drop:] for each, drop in zip(whole, PREFIX[option], strict=True)]
        assert torch.equal(features, torch.cat(tokens, dim=-1))


def test_blocks_hold_most_parameters_and_run_in_their_order(option: str) -> None:
    encoder = build(option)
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


def test_layers_are_chosen_and_joined(option: str) -> None:
    maps = option in ("convnext_b_224", "convnext_l_clip_320", "efficientnet_lite0", "timm")
    chosen = [-1, -1] if maps else [-2, -1]  # stages of a ConvNet differ in their grids
    joined = build(option, layer=chosen)
    single = [build(option, layer=layer) for layer in chosen]
    for encoder in single:
        fits = encoder.load_state_dict(joined.state_dict(), strict=False)
        assert fits.missing_keys == []
    pixels = pixels_for(joined)
    parts = [encoder(pixels) for encoder in single]
    assert joined.width == sum(encoder.width for encoder in single)
    if option == "dino_siglip":  # each encoder's layers lie together
        halves = [each.split([32, 32], dim=-1) for each in parts]
        parts = [halves[0][0], halves[1][0], halves[0][1], halves[1][1]]
    torch.testing.assert_close(joined(pixels), torch.cat(parts, dim=-1))
    if not maps:
        assert len(single[0].blocks()) == len(single[1].blocks()) - 1
        assert not torch.allclose(*(encoder(pixels) for encoder in single))


def test_an_unknown_layer_names_the_choices(option: str) -> None:
    with pytest.raises(ValueError, match=r"encoder.layer=99, but this encoder has \d+ layers: choose \d+\.\.\d+"):
        build(option, layer=99)


def test_pictures_are_prepared_as_in_training(option: str) -> None:
    mean, std, interpolation = TRAINED_WITH[max((n for n in TRAINED_WITH if option.startswith(n)), key=len)]
    transform = build(option, weights="meta").transform
    assert (list(transform.mean), list(transform.std), transform.interpolation) == (mean, std, interpolation)


def test_another_image_size(option: str) -> None:
    own = build(option)
    side = own.image_size[0] // own.grid[0] * 2 * (own.grid[0] // 3)
    other = build(option, image_size=side)
    assert other.grid == (2 * (own.grid[0] // 3),) * 2
    assert other.grid != own.grid
    assert other.transform.size == other.image_size == (side, side)
    assert other(pixels_for(other, 1)).shape == (1, other.grid[0] * other.grid[1], own.width)


def test_meta_weights_have_the_names_and_shapes_of_real_ones(option: str) -> None:
    real, meta = build(option), build(option, weights="meta")
    assert {k: v.shape for k, v in meta.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}
    assert all(parameter.is_meta for parameter in meta.parameters())


def test_features_come_in_the_weights_type(option: str) -> None:
    encoder = build(option).to(torch.bfloat16)
    assert encoder(pixels_for(encoder, 1)).dtype == torch.bfloat16


@pytest.mark.parametrize("last_n", [1, 2, None])
def test_checkpointing_gives_the_same_gradients(option: str, last_n: int | None) -> None:
    """Pixels need no gradient; with `last_n` neither do the first blocks, so nothing before the last is to be run."""
    found, calls = [], []
    for checkpointing in (False, True):
        encoder = build(option, gradient_checkpointing=checkpointing)
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
