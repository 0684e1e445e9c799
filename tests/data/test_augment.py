"""Augmented pictures: the same for a seed, of the same size, otherwise each epoch, and of the training split alone."""

from __future__ import annotations

from itertools import chain, islice

import numpy as np
import pytest
from PIL import Image

from tests.helpers.sources import numbered
from vlm.data.augment import Augment


def ramp(width: int = 60, height: int = 40) -> Image.Image:
    """Red grows to the right, green downwards: a crop shows by its ends."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, np.full_like(red, 128)], axis=2).astype(np.uint8))


def test_a_seed_gives_one_picture_of_the_same_size() -> None:
    augment = Augment()
    once, again, other = (np.asarray(augment(ramp(), seed)) for seed in ("a", "a", "b"))
    assert once.shape == (40, 60, 3)
    assert (once == again).all()
    assert (once != other).any()


def test_a_crop_keeps_its_share_and_the_proportions() -> None:
    """The range of red and of green that is left is the side of the crop: between the root of the share and 1."""
    sides = []
    for seed in range(20):
        pixels = np.asarray(Augment(crop=0.25, color=0.0)(ramp(), str(seed))).astype(float)
        across, down = (pixels[..., c].max() - pixels[..., c].min() for c in (0, 1))
        assert abs(across - down) < 12, "the same side in both directions"
        assert (np.diff(pixels[0, :, 0]) >= 0).all(), "never mirrored"
        sides.append(across / 255)
    assert 0.45 < min(sides) < 0.65
    assert 0.85 < max(sides) <= 1


def test_colors_change_within_their_bounds() -> None:
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    levels = [np.asarray(Augment(crop=1.0, color=0.2)(grey, str(seed)))[0, 0, 0] for seed in range(30)]
    assert 78 <= min(levels) < 90
    assert 110 < max(levels) <= 122
    assert (np.asarray(Augment(crop=1.0, color=0.0)(ramp(), "a")) == np.asarray(ramp())).all()


def test_each_epoch_shows_other_pictures_and_validation_the_same() -> None:
    def looks(num: int, **options: object) -> list[list[float]]:
        batches = list(islice(numbered(**options).train_dataloader(), num))
        return [sorted(batch.pixel_values[:, :, 0, 0].sum(1).tolist()) for batch in batches]

    def epochs(**options: object) -> list[list[float]]:
        batches = looks(6, **options)
        return [sorted(chain(*batches[:3])), sorted(chain(*batches[3:]))]

    plain, changed = epochs(), epochs(augment={"crop": 1.0, "color": 0.5})
    assert plain[0] == plain[1]
    assert changed[0] != changed[1]
    assert changed == epochs(augment={"crop": 1.0, "color": 0.5})
    loaders = [numbered(augment=augment).val_dataloader() for augment in (None, {"color": 0.5})]
    held_out = [next(iter(loader)).pixel_values for loader in loaders]
    assert (held_out[0] == held_out[1]).all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"crop": 0.0}, r"data.augment.crop=0.0 must be in \(0, 1\]"),
        ({"color": 1.0}, r"data.augment.color=1.0 must be in"),
    ],
)
def test_a_ratio_out_of_range_is_refused(options: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Augment(**options)
