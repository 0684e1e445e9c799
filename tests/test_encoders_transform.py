"""The picture's way to pixels: squashed whole, antialiased, normalised, the same every time."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from eyes import build
from PIL import Image
from torch import nn

from vlm.encoders.transform import Transform


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
