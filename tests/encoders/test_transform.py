"""The picture's way to pixels: made to fit, antialiased, normalized, the same every time."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.models.clip.image_processing_clip import CLIPImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_llava import LlavaImageProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip.image_processing_siglip import SiglipImageProcessor

from tests.helpers.encoders import build_encoder
from vlm.encoders.transform import Transform

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (102, 127.5, 153)  # grey: the mean color


def transform(side: int = 32, **options: Any) -> Transform:
    return Transform(**{"size": (side, side), "mean": MEAN, "std": STD, "interpolation": "bicubic", **options})


def photo(width: int, height: int) -> Image.Image:
    """Coarse noise, scaled up: as smooth as a photograph."""
    rng = np.random.default_rng(width * height)
    coarse = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def colors(pixels: Tensor) -> Tensor:
    """[H, W, 3] in 0 to 255, the normalisation undone."""
    return 255 * (pixels.permute(1, 2, 0) * torch.tensor(STD) + torch.tensor(MEAN))


def test_the_filter_antialiases_as_torch_does_and_the_values_are_normalized() -> None:
    picture = np.random.default_rng(1).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    made = transform(size=(24, 32))(Image.fromarray(picture))
    tensor = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    exact = nn.functional.interpolate(tensor, (24, 32), mode="bicubic", antialias=True)[0].clamp(0, 255) / 255
    expected = (exact - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(made, expected, atol=1.5 / 255 / 0.2, rtol=0)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(120, 90), (47, 101), (20, 12)], ids=str)
def test_the_filter_is_pillows(size: tuple[int, int], interpolation: str) -> None:
    picture = photo(*size)
    made = colors(transform(interpolation=interpolation)(picture))
    theirs = np.asarray(picture.resize((32, 32), Image.Resampling[interpolation.upper()]))
    torch.testing.assert_close(made, torch.tensor(theirs).float(), atol=2.01, rtol=0)


# Which colors stand where in 32×32, of a picture in three equal bands: red, green, blue along its long side.
PLACES = {
    ("squash", "wide"): {(16, 4): RED, (16, 16): GREEN, (16, 27): BLUE, (1, 16): GREEN, (30, 16): GREEN},
    ("squash", "tall"): {(4, 16): RED, (16, 16): GREEN, (27, 16): BLUE, (16, 1): GREEN, (16, 30): GREEN},
    ("pad", "wide"): {(16, 4): RED, (16, 16): GREEN, (16, 27): BLUE, (9, 16): GREY, (12, 16): GREEN, (22, 16): GREY},
    ("pad", "tall"): {(4, 16): RED, (16, 16): GREEN, (27, 16): BLUE, (16, 9): GREY, (16, 12): GREEN, (16, 22): GREY},
    ("crop", "wide"): {(1, 2): GREEN, (16, 16): GREEN, (30, 29): GREEN},
    ("crop", "tall"): {(2, 1): GREEN, (16, 16): GREEN, (29, 30): GREEN},
}


@pytest.mark.parametrize(("resize", "shape"), PLACES)
def test_where_a_picture_of_another_shape_goes(resize: str, shape: str) -> None:
    picture = Image.new("RGB", (150, 50))
    for number, color in enumerate((RED, GREEN, BLUE)):
        picture.paste(color, (50 * number, 0, 50 * number + 50, 50))
    if shape == "tall":
        picture = picture.transpose(Image.Transpose.TRANSPOSE)
    made = colors(transform(resize=resize)(picture))
    assert made.shape == (32, 32, 3)
    for (row, col), color in PLACES[resize, shape].items():
        torch.testing.assert_close(made[row, col], torch.tensor(color).float(), atol=1, rtol=0)


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (100, 37), (33, 200), (20, 12), (32, 32), (31, 33)], ids=str)
@pytest.mark.parametrize(
    ("resize", "theirs", "pillows"),
    [("crop", CLIPImageProcessor, CLIPImageProcessorPil), ("squash", SiglipImageProcessor, SiglipImageProcessorPil)],
    ids=["clip", "siglip"],
)
def test_crop_is_clips_and_squash_is_siglips(resize: str, theirs: Any, pillows: Any, size: tuple[int, int]) -> None:
    sizes = {"crop": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}}
    options = sizes.get(resize, {"size": {"height": 32, "width": 32}})
    options = {**options, "resample": 3, "image_mean": MEAN, "image_std": STD}
    picture = photo(*size)
    made = transform(resize=resize)(picture)
    torch.testing.assert_close(made, theirs(**options)(picture, return_tensors="pt").pixel_values[0])
    with_pillow = pillows(**options)(picture, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(colors(made), colors(with_pillow), atol=2.01, rtol=0)


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (256, 64)], ids=str)
def test_pad_is_llavas_but_for_the_seam(size: tuple[int, int]) -> None:
    """LLaVA pads before it scales, so that the colors mix where picture and padding meet; and rounds its color."""
    picture = photo(*size)
    made = transform(resize="pad")(picture)
    options = {"do_pad": True, "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    theirs = LlavaImageProcessor(**options, image_mean=MEAN, image_std=STD)(picture, return_tensors="pt")
    far = torch.ones(32, 32, dtype=torch.bool)
    for side, columns in ((size[1], True), (size[0], False)):
        margin = (32 - 32 * side // max(size)) // 2
        for seam in (margin, 32 - margin) if margin else ():
            (far if columns else far.T)[seam - 2 : seam + 2] = False
    assert 0.5 < far.float().mean() < 1
    there = colors(theirs.pixel_values[0])
    torch.testing.assert_close(colors(made)[far], there[far], atol=1.01, rtol=0)


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("resize", ["squash", "pad", "crop"])
def test_strips_and_specks_are_never_scaled_to_a_bomb(
    monkeypatch: pytest.MonkeyPatch, resize: str, size: tuple[int, int]
) -> None:
    made: list[Tensor] = []
    resampled = Transform.resampled
    monkeypatch.setattr(Transform, "resampled", lambda *args: made.append(resampled(*args)) or made[-1])
    pixels = colors(transform(resize=resize)(Image.new("RGB", size, RED)))
    torch.testing.assert_close(pixels[15, 15], torch.tensor(RED).float())
    assert pixels.shape == (32, 32, 3)
    assert made[0].numel() <= 16 * 3 * 32 * 32


def test_transform_is_deterministic_picklable_and_takes_any_mode() -> None:
    ours = build_encoder("tiny").transform
    again = pickle.loads(pickle.dumps(ours))
    grey = Image.linear_gradient("L")
    assert again == ours
    assert torch.equal(again(grey), ours(grey.convert("RGB")))
    assert ours(grey).permute(1, 2, 0).is_contiguous()  # channels last
    assert ours(Image.new("RGB", (64, 64), (255, 0, 255)))[:, 5, 6].tolist() == [1.0, -1.0, 1.0]


def test_an_unknown_interpolation_names_the_choices() -> None:
    with pytest.raises(ValueError, match=r"encoder.interpolation='lanczos' must be one of bilinear, bicubic"):
        transform(interpolation="lanczos")


@pytest.mark.parametrize(
    ("option", "resize"),
    [("clip_vit_l14_336", "pad"), ("siglip_so400m14_384", "squash"), ("dino_siglip", "squash"), ("tiny", "squash")],
)
def test_every_encoder_takes_the_option(option: str, resize: str) -> None:
    assert build_encoder(option).transform.resize == resize
    assert build_encoder(option, resize="crop").transform.resize == "crop"
