"""Every encoder option keeps the contract: P patches and only those, in rows, from the layer that was asked for."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.helpers.encoders import FAMILIES, OPTIONS, build_encoder, members, pixels_for

every_option = pytest.mark.parametrize("option", OPTIONS)
every_family = pytest.mark.parametrize("option", FAMILIES)

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
    "siglip2": (*HALF[:2], "bilinear"),  # as its image processor resizes
}


@every_option
def test_contract(option: str) -> None:
    encoder = build_encoder(option)
    features = encoder(pixels_for(encoder))
    assert features.shape == (2, encoder.grid[0] * encoder.grid[1], encoder.width)
    assert encoder.transform(Image.new("RGB", (50, 70))).shape == (3, *encoder.image_size)
    assert features.isfinite().all()


@every_option
def test_the_tokens_before_the_patches_are_dropped_and_only_those(option: str) -> None:
    encoder = build_encoder(option, layer=-1)
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


@every_family
def test_layers_are_chosen_and_joined(option: str) -> None:
    maps = option in ("convnext_b_224", "convnext_l_clip_320", "efficientnet_lite0", "timm")
    chosen = [-1, -1] if maps else [-2, -1]  # a ConvNet's stages of different grids: test_encoders_timm.py
    joined = build_encoder(option, layer=chosen)
    single = [build_encoder(option, layer=layer) for layer in chosen]
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


@every_family
def test_an_unknown_layer_names_the_choices(option: str) -> None:
    with pytest.raises(ValueError, match=r"encoder.layer=99, but this encoder has \d+ layers: choose \d+\.\.\d+"):
        build_encoder(option, layer=99)


@every_option
def test_pictures_are_prepared_as_in_training(option: str) -> None:
    mean, std, interpolation = TRAINED_WITH[max((n for n in TRAINED_WITH if option.startswith(n)), key=len)]
    transform = build_encoder(option, weights="meta").transform
    assert (list(transform.mean), list(transform.std), transform.interpolation) == (mean, std, interpolation)


@every_family
def test_another_image_size(option: str) -> None:
    own = build_encoder(option)
    side = own.image_size[0] // own.grid[0] * 2 * (own.grid[0] // 3)
    other = build_encoder(option, image_size=side)
    assert other.grid == (2 * (own.grid[0] // 3),) * 2
    assert other.grid != own.grid
    assert other.transform.size == other.image_size == (side, side)
    assert other(pixels_for(other, 1)).shape == (1, other.grid[0] * other.grid[1], own.width)


@every_family
def test_meta_weights_have_the_names_and_shapes_of_real_ones(option: str) -> None:
    real, meta = build_encoder(option), build_encoder(option, weights="meta")
    assert {k: v.shape for k, v in meta.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}
    assert all(parameter.is_meta for parameter in meta.parameters())
