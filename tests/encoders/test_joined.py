"""JoinedEncoder against its encoders run by hand on pictures normalized for each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.encoders import VIT, build_encoder
from tests.helpers.parts import Parts
from vlm.encoders.timm import TimmEncoder
from vlm.training.optim import set_trainable

NAMES = ("vit_large_patch14_reg4_dinov2", "vit_so400m_patch14_siglip_384")


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))


def test_each_encoder_sees_the_picture_as_it_was_trained() -> None:
    joined = build_encoder("dino_siglip")
    pixels = joined.transform(picture())[None]
    separate = []
    for encoder, name in zip(joined.encoders, NAMES, strict=True):
        alone = TimmEncoder(name=name, weights="random", layer=-2, model_args=VIT, image_size=48).eval()
        alone.load_state_dict(encoder.state_dict())
        separate.append(alone(alone.transform(picture())[None]))
    assert not torch.allclose(joined.encoders[0].transform(picture()), joined.encoders[1].transform(picture()))
    torch.testing.assert_close(joined(pixels), torch.cat(separate, dim=-1))


def test_the_last_blocks_of_both_train_together() -> None:
    model = Parts(encoder=build_encoder("dino_siglip"))
    set_trainable(model, {"encoder": {"last_n": 1}, "connector": "frozen", "llm": "frozen"}, {})
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    blocks = {f"encoder.encoders.{number}.model.blocks.1" for number in (0, 1)}  # of the two that are run
    assert {".".join(name.split(".")[:6]) for name in trained} == blocks
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(tuple(blocks))}


def test_encoders_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"joins vit_large\S+ with grid \(37, 37\) and vit_so\S+ with grid \(27, 27\)"):
        build_encoder("dino_siglip", small=False, weights="meta", image_size=None)
    with pytest.raises(ValueError, match=r"has 2, encoder.pretrained 2 and encoder.model_args 1 entries"):
        build_encoder("dino_siglip", model_args=[{}])
