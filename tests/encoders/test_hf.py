"""HFEncoder against Transformers' own hidden states, on small random towers."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.helpers.encoders import NORMALIZED, pixels_for
from vlm.encoders.hf import HFEncoder
from vlm.encoders.transform import Transform

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
FACTS = {**SMALL, "image_size": 32, "patch_size": 8}
SMALL_CLIP = {"model_type": "clip_vision_model", **FACTS}


def build_clip(**changes: object) -> HFEncoder:
    options = {"pretrained": "none", "config": SMALL_CLIP, "weights": "random", "drop_tokens": 1}
    return HFEncoder(**{**options, **NORMALIZED, **changes}).eval()


@pytest.mark.parametrize("layer", [-3, -2, -1, 1, 3, [-2, -1], [3, 1]])
def test_clip_layers_are_transformers_hidden_states(layer: int | list[int]) -> None:
    reference = CLIPVisionModel(CLIPVisionConfig(**FACTS)).eval()
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
    reference = SiglipVisionModel(SiglipVisionConfig(**FACTS)).eval()
    encoder = build_clip(config={"model_type": "siglip_vision_model", **FACTS}, drop_tokens=0)
    encoder.tower.load_state_dict(reference.state_dict(), strict=False)
    assert {name.split(".")[0] for name, _ in encoder.tower.named_parameters()} == {"embeddings", "encoder"}
    pixels = pixels_for(encoder)
    expected = reference(pixels, output_hidden_states=True).hidden_states[-2]
    assert expected.shape == (2, 16, 32)
    torch.testing.assert_close(encoder(pixels), expected)


def test_a_wrong_number_of_dropped_tokens_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"drop_tokens=0 leaves 17 of 17 tokens, but the grid has 16 patches; .*drop_tokens=1$"
    ):
        build_clip(drop_tokens=0)
    with pytest.raises(ValueError, match=r"encoder.image_size=30 must be a multiple of the patch size 8; try 24"):
        build_clip(image_size=30)


def test_clip_interpolates_positions_as_transformers_does() -> None:
    encoder = build_clip(image_size=48, layer=-1)
    reference = CLIPVisionModel(CLIPVisionConfig(**FACTS)).eval()
    encoder.tower.load_state_dict(reference.state_dict(), strict=False)
    pixels = pixels_for(encoder)
    expected = reference(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    assert expected.shape == (2, 36, 32)
    torch.testing.assert_close(encoder(pixels), expected)


def test_vision_tower_is_read_from_a_whole_clip(tmp_path: Path) -> None:
    whole = CLIPModel(CLIPConfig(vision_config=FACTS, text_config=SMALL)).eval()
    whole.save_pretrained(tmp_path)
    encoder = build_clip(weights="pretrained", pretrained=str(tmp_path))
    pixels = pixels_for(encoder)
    expected = whole.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(encoder(pixels), expected)
    with pytest.raises(ValueError, match=r"encoder.config.num_hidden_layers=2, but the weights of .* have 3"):
        build_clip(weights="pretrained", pretrained=str(tmp_path), config={**SMALL_CLIP, "num_hidden_layers": 2})


def test_incomplete_weights_are_refused(tmp_path: Path) -> None:
    tower = CLIPVisionModel(CLIPVisionConfig(**FACTS))
    state = {key: value for key, value in tower.state_dict().items() if "layers.1.mlp.fc1" not in key}
    tower.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 2 of the encoder's tensors, first '.*layers.1.mlp.fc1.bias'"):
        build_clip(weights="pretrained", pretrained=str(tmp_path))


def test_missing_weights_name_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("vlm.hub.try_to_load_from_cache", lambda *_, **__: None)
    with pytest.raises(
        ValueError, match=r"hub id 'openai/clip'.*set encoder.pretrained=<folder>, or encoder.weights=ran"
    ):
        build_clip(weights="pretrained", pretrained="openai/clip")


def test_a_folder_tells_what_the_options_do_not(tmp_path: Path) -> None:
    tower = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**FACTS, num_register_tokens=3)).eval()
    tower.save_pretrained(tmp_path)
    told = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2, "image_processor_type": "x"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    encoder = HFEncoder(pretrained=str(tmp_path), interpolation=None).eval()
    assert encoder.transform == Transform(
        size=(32, 32), mean=told["image_mean"], std=told["image_std"], interpolation="bilinear"
    )
    assert "mask_token" not in dict(encoder.tower.embeddings.named_parameters())
    pixels = pixels_for(encoder)
    expected = tower(pixels, output_hidden_states=True).hidden_states[-2]
    assert expected.shape == (2, 1 + 3 + 16, 32)
    torch.testing.assert_close(encoder(pixels), expected[:, 4:])


def test_missing_files_name_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("vlm.hub.try_to_load_from_cache", lambda *_, **__: None)
    with pytest.raises(ValueError, match=r"no config.json .* hub id 'a/b' .*or encoder.config.model_type="):
        HFEncoder(pretrained="a/b")
    with pytest.raises(ValueError, match=r"no preprocessor_config.json .* folder .*or encoder.mean=, encoder.std= and"):
        HFEncoder(pretrained=str(tmp_path), config=SMALL_CLIP)


def test_towers_without_a_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a 'convnext' has hidden_size=None, .*or encoder=timm"):
        build_clip(config={"model_type": "convnext"})
    with pytest.raises(ValueError, match=r"gives 5 tokens for 16 patches, so they form no grid"):
        build_clip(config={"model_type": "vit_mae", **FACTS}, drop_tokens=None)


def test_siglip_reads_what_its_patches_cover_of_its_own_size() -> None:
    facts = {"model_type": "siglip_vision_model", **SMALL, "image_size": 34, "patch_size": 8}
    encoder = build_clip(config=facts, drop_tokens=0)
    pixels = pixels_for(encoder)
    cut = pixels.clone()
    cut[..., 32:, :] = cut[..., 32:] = 0
    assert (encoder.image_size, encoder.grid) == ((34, 34), (4, 4))
    assert torch.equal(encoder(pixels), encoder(cut))
