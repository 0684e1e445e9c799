"""Every encoder option keeps the contract: P patches and only those, in rows, from the layer that was asked for."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn

from vlm.encoders.hf import HFEncoder
from vlm.encoders.timm import TimmEncoder
from vlm.encoders.transform import Transform

CONF = Path(__file__).parents[1] / "conf" / "encoder"
OPTIONS = sorted(path.stem for path in CONF.glob("*.yaml"))
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}


def build(option: str, *, small: bool = True, **changes: object) -> TimmEncoder | HFEncoder:
    """The encoder of a config file with random weights, narrow where it is big."""
    config = OmegaConf.merge(OmegaConf.load(CONF / f"{option}.yaml"), {"weights": "random"}, changes)
    if small and "config" in config:
        config = OmegaConf.merge(config, {"config": SMALL})
    return instantiate(config, _convert_="all").eval()


def pixels_for(encoder: nn.Module, n: int = 2) -> Tensor:
    return torch.randn(n, 3, *encoder.image_size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("option", OPTIONS)
def test_contract(option: str) -> None:
    encoder = build(option)
    features = encoder(pixels_for(encoder))
    assert features.shape == (2, encoder.grid[0] * encoder.grid[1], encoder.width)
    assert encoder.transform(Image.new("RGB", (50, 70))).shape == (3, *encoder.image_size)
    assert features.isfinite().all()


@pytest.mark.parametrize("option", OPTIONS)
def test_every_parameter_gets_a_gradient(option: str) -> None:
    encoder = build(option)
    encoder(pixels_for(encoder, 1)).sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("option", OPTIONS)
def test_a_batch_without_images_gives_no_features_and_zero_gradients(option: str) -> None:
    encoder = build(option)
    features = encoder(torch.empty(0, 3, *encoder.image_size))
    assert features.shape == (0, encoder.grid[0] * encoder.grid[1], encoder.width)
    features.sum().backward()  # a rank without images must take part in the gradients' reduction
    assert all(p.grad is not None and not p.grad.any() for p in encoder.parameters())


@pytest.mark.parametrize("option", OPTIONS)
def test_features_of_an_image_do_not_depend_on_its_batch(option: str) -> None:
    encoder = build(option).train()
    pixels = pixels_for(encoder)
    torch.testing.assert_close(encoder(pixels)[:1], encoder(pixels[:1]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("option", OPTIONS)
def test_blocks_hold_most_parameters_and_run_in_their_order(option: str) -> None:
    encoder = build(option)
    ran: list[int] = []
    for index, block in enumerate(encoder.blocks()):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    encoder(pixels_for(encoder, 1))
    assert ran == list(range(len(encoder.blocks())))
    inside = [id(p) for block in encoder.blocks() for p in block.parameters()]
    assert len(set(inside)) == len(inside)
    assert set(inside) < {id(p) for p in encoder.parameters()}


@pytest.mark.parametrize("option", OPTIONS)
def test_another_image_size(option: str) -> None:
    own = build(option)
    other = build(option, image_size=own.image_size[0] * 2)
    assert other.grid == (own.grid[0] * 2, own.grid[1] * 2)
    assert other.transform.size == other.image_size == (own.image_size[0] * 2,) * 2
    assert other(pixels_for(other, 1)).shape == (1, other.grid[0] * other.grid[1], own.width)


@pytest.mark.parametrize("option", OPTIONS)
def test_meta_weights_have_the_names_and_shapes_of_real_ones(option: str) -> None:
    real, meta = build(option), build(option, weights="meta")
    assert {k: v.shape for k, v in meta.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}
    assert all(parameter.is_meta for parameter in meta.parameters())


@pytest.mark.parametrize("option", OPTIONS)
def test_features_come_in_the_weights_type(option: str) -> None:
    encoder = build(option).to(torch.bfloat16)
    assert encoder(pixels_for(encoder, 1)).dtype == torch.bfloat16


@pytest.mark.parametrize("option", OPTIONS)
def test_an_unknown_layer_names_the_choices(option: str) -> None:
    with pytest.raises(Exception, match=r"encoder.layer=99, but this encoder has \d+ layers: choose \d+\.\.\d+"):
        build(option, layer=99)


def test_sizes_of_the_shipped_options() -> None:
    facts = {name: build(name, small=False, weights="meta") for name in ("tiny", "efficientnet_lite0")}
    facts["clip_vit_b32_224"] = build("clip_vit_b32_224", small=False, weights="meta", layer=-1)
    found = {k: (e.width, e.grid, len(e.blocks()), sum(p.numel() for p in e.parameters())) for k, e in facts.items()}
    # CLIP: 87,456,000 of the published tower less its 2·768 of the last norm, which no patch feature needs.
    assert found == {
        "tiny": (64, (8, 8), 2, 116_544),
        "efficientnet_lite0": (320, (6, 6), 7, 2_958_848),
        "clip_vit_b32_224": (768, (7, 7), 12, 87_454_464),
    }


def test_transform_is_a_box_average_of_the_whole_picture() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (32, 64, 3), dtype=np.uint8)
    transform = Transform(size=(8, 8), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), interpolation="box")
    mean = picture.reshape(8, 4, 8, 8, 3).mean((1, 3)) / 255  # rows, cols, channel
    expected = torch.from_numpy((mean - [0.4, 0.5, 0.6]) / [0.2, 0.25, 0.3]).permute(2, 0, 1).float()
    torch.testing.assert_close(transform(Image.fromarray(picture)), expected, atol=1 / 255 / 0.2, rtol=0)


def test_transform_antialiases_as_torch_does() -> None:
    picture = np.random.default_rng(1).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    transform = Transform(size=(24, 32), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), interpolation="bicubic")
    tensor = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    expected = nn.functional.interpolate(tensor, (24, 32), mode="bicubic", antialias=True)[0].clamp(0, 255) / 255
    torch.testing.assert_close(transform(Image.fromarray(picture)), expected, atol=1.5 / 255, rtol=0)


def test_transform_is_deterministic_picklable_and_takes_any_mode() -> None:
    transform = build("tiny").transform
    again = pickle.loads(pickle.dumps(transform))
    grey = Image.linear_gradient("L")
    assert again == transform
    assert torch.equal(again(grey), transform(grey.convert("RGB")))
    assert transform(grey).is_contiguous()
    assert transform(Image.new("RGB", (64, 64), (255, 0, 255)))[:, 5, 6].tolist() == [1.0, -1.0, 1.0]


def test_an_unknown_interpolation_names_the_choices() -> None:
    with pytest.raises(ValueError, match=r"encoder.interpolation='cubic' is none of nearest, .*bicubic"):
        Transform(size=(8, 8), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), interpolation="cubic")
