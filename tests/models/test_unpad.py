"""Packed visual tokens are those of Transformers' LLaVA-NeXT, from the same features and sizes of images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers.models.llava_next.image_processing_llava_next import LlavaNextImageProcessor
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from tests.helpers.parts import FACTS, tiny_llm
from tests.helpers.text import Listed, byte_tokenizer, say
from tests.helpers.tiles import NEXT, SIZES, noise, settings, tiles
from vlm import build, config
from vlm.connectors.mlp import MLP
from vlm.data.datamodule import VLMDataModule
from vlm.encoders.hf import HFEncoder
from vlm.encoders.tiles import Tiles
from vlm.models.composed import Composed
from vlm.models.unpad import Unpad, pack
from vlm.schema import IGNORE, Sample

SIDE, PATCH, IMAGE_ID = 32, 8, 31  # 4 × 4 patches a tile
PATCHES = (SIDE // PATCH, SIDE // PATCH)
PINPOINTS = [[rows * SIDE, cols * SIDE] for rows, cols in NEXT]
TOWER: dict[str, Any] = {
    **{"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2},
    **{"image_size": SIDE, "patch_size": PATCH},
}


@pytest.fixture(scope="module")
def theirs() -> LlavaNextForConditionalGeneration:
    torch.manual_seed(0)
    facts = {key: value for key, value in FACTS.items() if key != "model_type"}
    model = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=CLIPVisionConfig(**TOWER),
            text_config=LlamaConfig(**facts),
            image_token_index=IMAGE_ID,
            image_grid_pinpoints=PINPOINTS,
            vision_feature_layer=-2,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def ours(theirs: LlavaNextForConditionalGeneration) -> Composed:
    """The same weights."""
    encoder = HFEncoder(
        pretrained="none",
        config={"model_type": "clip_vision_model", **TOWER},
        weights="random",
        interpolation="bicubic",
        mean=[0.5] * 3,
        std=[0.5] * 3,
    )
    llm = tiny_llm()
    sizes = {"vision_width": encoder.width, "llm_width": llm.width, "grid": encoder.grid, "output_rms": llm.embed_rms}
    connector = MLP(**sizes, norm=False, position=False)
    model = Composed(encoder=encoder, connector=connector, llm=llm, tiles=Tiles(grids=NEXT, unpad=True))
    found = theirs.state_dict()
    renamed = {
        "model.vision_tower.": "encoder.tower.",
        "model.multi_modal_projector.linear_1.": "connector.layers.0.",
        "model.multi_modal_projector.linear_2.": "connector.layers.1.",
        "model.image_newline": "connector.newline",
        "model.language_model.": "llm.model.model.",
        "lm_head.": "llm.model.lm_head.",
    }
    weights = {
        new + name.removeprefix(old): t
        for name, t in found.items()
        for old, new in renamed.items()
        if name.startswith(old)
    }
    model.load_state_dict({name: tensor for name, tensor in weights.items() if name in model.state_dict()})
    return model.eval()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_as_many_tokens_and_the_same(size: tuple[int, int], theirs: LlavaNextForConditionalGeneration) -> None:
    made = tiles(side=SIDE)
    unpad = Unpad(grid=made.grid, patches=PATCHES)
    num_tiles = sum(made.rows(size))
    features = torch.randn(num_tiles, PATCHES[0] * PATCHES[1], 8)
    newline = torch.randn(8)
    expected, lengths = theirs.model.pack_image_features(
        [features], torch.tensor([size[::-1]]), vision_feature_select_strategy="default", image_newline=newline
    )
    packed = pack(features, newline, layouts=[tuple(made.rows(size))], kept=[unpad.kept(size)], patches=PATCHES)
    assert unpad.number(size) == len(packed) == int(lengths[0])
    assert torch.equal(packed, torch.cat(list(expected)) if isinstance(expected, tuple | list) else expected)
    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)  # only its count of tokens
    processor.image_processor = LlavaNextImageProcessor(image_grid_pinpoints=PINPOINTS)
    processor.patch_size, processor.num_additional_image_tokens = PATCH, 0
    assert processor._get_number_of_features(size[1], size[0], SIDE, SIDE) == len(packed)


def test_a_thumbnail_alone_ends_with_one_newline() -> None:
    unpad = Unpad(grid=lambda size: (1, 1), patches=(2, 2))
    features, newline = torch.randn(1, 4, 3), torch.randn(3)
    packed = pack(features, newline, layouts=[(1,)], kept=[unpad.kept((9, 5))], patches=(2, 2))
    assert torch.equal(packed, torch.cat([features[0], newline[None]]))
    assert unpad.number((9, 5)) == 5


def batch_of(model: Composed, images: list[list[Image.Image]]) -> Any:
    rows = [
        Sample(f"a/{n}", each, [say("user", *[None] * len(each), "What?"), say("assistant", "This.")])
        for n, each in enumerate(images)
    ]
    data = VLMDataModule(source=lambda split: Listed(rows), batch_size=len(rows), max_length=4096)
    data.connect(spec=model.visual_spec(), tokenizer=byte_tokenizer(), chat_template="chatml")
    return next(iter(data.val_dataloader()))


IMAGES = [[noise(90, 40)], [noise(33, 200), noise(20, 20)], []]


def test_the_logits_are_theirs(theirs: LlavaNextForConditionalGeneration, ours: Composed) -> None:
    """Rows with one image, with two of other shapes, and with none, in one batch."""
    batch = batch_of(ours, IMAGES)
    ids = batch.input_ids % (IMAGE_ID - 1)  # the small LLM has few words
    ids[batch.image_mask] = IMAGE_ID
    labels = torch.where(batch.labels == IGNORE, IGNORE, batch.labels % (IMAGE_ID - 1))
    tiled = ours.visual_spec().transform
    pixels = [tiled(image) for row in IMAGES for image in row]
    most = max(map(len, pixels))
    padded = torch.stack([torch.cat([each, torch.zeros(most - len(each), *each.shape[1:])]) for each in pixels])
    expected = theirs(
        input_ids=ids,
        attention_mask=batch.attention_mask.long(),
        pixel_values=padded,
        image_sizes=torch.tensor([image.size[::-1] for row in IMAGES for image in row]),
    ).logits
    from dataclasses import replace

    logits = ours(replace(batch, input_ids=ids, labels=labels))
    torch.testing.assert_close(logits, expected[batch.logits_mask], atol=1e-5, rtol=0)


def test_a_text_only_batch_gives_the_newline_a_gradient(ours: Composed) -> None:
    """Every rank must have a gradient for every trained parameter, also with no image in its rows."""
    batch = batch_of(ours, [[], []])
    ours.requires_grad_(False)
    ours.connector.requires_grad_(True)
    ours.llm.requires_grad_(True)
    ours(batch).sum().backward()
    assert ours.connector.newline.grad is not None
    assert not ours.connector.newline.grad.any()
    ours.zero_grad()


def test_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    unpadded = ["encoder.tiles.grids=[[1,2],[2,2]]", "encoder.tiles.unpad=true", "data.max_length=2048"]
    cfg = settings(*unpadded)
    config.check(cfg)
    model, manifest = build.build_model(cfg)
    assert manifest["parts"]["encoder"]["tiles"]["unpad"]
    assert "connector.newline" in dict(model.named_parameters())
    data = build.connect_data(build.build_data(cfg, None), cfg, model)
    batch = next(iter(data.val_dataloader()))
    rows, cols = (2 * num for num in model.encoder.grid)
    whole = model.connector.num_tokens + rows * (cols + 1)  # square pictures have no padding
    assert batch.image_mask.sum(1).tolist() == [whole] * 2
    assert model.visual_spec().max_packed == whole
    for words, said in (
        (["encoder.tiles.unpad=true"], r"encoder.tiles.unpad=true needs grids .*encoder.tiles.grids=\[\] and row_sep"),
        ([*unpadded, "connector=pixel_shuffle"], r"unpad=true needs a visual token for each of the \d+ patches, but"),
    ):
        with pytest.raises(ValueError, match=said):
            build.build_model(settings(*words))
