"""Tiling: LLaVA-NeXT's choice of a grid, its tiles pixel by pixel, and as many placeholders as visual tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_llava_next import LlavaNextImageProcessor

from tests.helpers.connectors import connect
from tests.helpers.encoders import build_encoder
from tests.helpers.parts import tiny_llm
from tests.helpers.text import byte_tokenizer, encoder, say
from tests.helpers.tiles import NEXT, SIZES, noise, settings, tiles
from vlm import build, config
from vlm.connectors.mlp import MLP
from vlm.data.datamodule import VLMDataModule
from vlm.encoders.tiles import Tiles
from vlm.models.composed import Composed
from vlm.schema import Sample, Source, VisualSpec
from vlm.text.row import Encoded

UP_TO_SIX = [[rows, cols] for rows in range(1, 7) for cols in range(1, 7) if rows * cols <= 6]


@pytest.mark.parametrize("side", [224, 336, 384])
@pytest.mark.parametrize("grids", [NEXT, UP_TO_SIX], ids=["llava_next", "up_to_six"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_grid_is_the_one_that_transformers_chooses(size: tuple[int, int], grids: Any, side: int) -> None:
    pinpoints = [(rows * side, cols * side) for rows, cols in grids]
    height, width = select_best_resolution((size[1], size[0]), pinpoints)
    assert tiles(grids, side).grid(size) == (height // side, width // side)


@pytest.mark.parametrize("size", [(90, 40), (40, 90), (64, 64), (33, 200), (20, 20), (101, 67)], ids=str)
def test_the_tiles_are_llava_nexts(size: tuple[int, int]) -> None:
    picture = noise(*size)
    ours = tiles(side=32)(picture)
    options = {"size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 32}, "do_normalize": False}
    pinpoints = [[rows * 32, cols * 32] for rows, cols in NEXT]
    theirs = LlavaNextImageProcessor(**options, image_grid_pinpoints=pinpoints)(picture, return_tensors="pt")
    assert ours.shape == theirs["pixel_values"][0].shape
    torch.testing.assert_close(ours, theirs["pixel_values"][0], atol=1e-5, rtol=0)


def test_the_thumbnail_is_first_and_the_tiles_come_row_by_row() -> None:
    picture = Image.new("RGB", (96, 64))
    for number in range(6):
        picture.paste(Image.new("RGB", (32, 32), (40 * number, 0, 0)), (number % 3 * 32, number // 3 * 32))
    made = tiles([[2, 3]], side=32)
    found = made(picture)
    assert torch.equal(found[0], made.transform(picture))
    assert [tile[0].unique().mul(255).tolist() for tile in found[1:]] == [[40.0 * number] for number in range(6)]
    assert made.rows(picture.size) == [1, 3, 3]


def test_a_grid_of_one_is_the_thumbnail_alone() -> None:
    made = tiles([[1, 1], [1, 2]], side=32)
    assert made.rows((32, 32)) == [1]
    assert torch.equal(made(noise(32, 32)), made.transform(noise(32, 32))[None])
    assert made.rows((64, 32)) == [1, 2]


def words(row: Encoded) -> list[int]:
    """The ids that are not places of visual tokens."""
    return [token for token, visual in zip(row.input_ids, row.image_mask, strict=True) if not visual]


def test_the_placeholders_follow_the_rows_of_tiles() -> None:
    plain = encoder(byte_tokenizer(), "chatml", num_image_tokens=2)
    row = plain.encode(Sample("a/1", [], MESSAGES))
    plain.tile_rows = tiles(side=32).rows
    images = [noise(96, 32), noise(32, 64)]  # grids 1×3 and 2×1
    tiled = plain.encode(Sample("a/1", images, MESSAGES))
    assert (sum(row.image_mask), sum(tiled.image_mask)) == (4, 2 * (1 + 3) + 2 * (1 + 2))
    assert len(tiled.input_ids) - len(row.input_ids) == sum(tiled.image_mask) - 4
    assert words(row) == words(tiled)
    assert [label for label in tiled.labels if label >= 0] == [label for label in row.labels if label >= 0]
    shown = plain.display(tiled)
    assert "<image×8>" in shown
    assert "<image×6>" in shown


def test_rows_of_tiles_are_parted_by_line_breaks() -> None:
    tokenizer = byte_tokenizer()
    (newline,) = tokenizer.encode("\n", add_special_tokens=False)
    subject = encoder(tokenizer, "chatml", num_image_tokens=2)
    whole = type(subject)(
        tokenizer=tokenizer,
        num_image_tokens=2,
        max_length=99,
        chat_template="chatml",
        tile_rows=tiles(side=32).rows,
        row_separator="\n",
    )
    image = noise(64, 64)  # thumbnail, 2×2
    row = whole.encode(Sample("a/1", [image], [say("user", None, "Hi"), say("assistant", "no")]))
    start = row.image_mask.index(True)
    length = 2 + 1 + 4 + 1 + 4
    expected = [True] * 2 + [False] + [True] * 4 + [False] + [True] * 4
    assert row.image_mask[start : start + length] == expected
    assert [row.input_ids[start + offset] for offset in (2, 7)] == [newline] * 2
    assert row.images_before[start : start + length] == [1] * length
    assert sum(row.image_mask) == 10
    prompt = whole.encode_prompt(Sample("a/1", [image], [say("user", None, "Hi")]))
    assert prompt.image_mask[start : start + length] == expected


MESSAGES = [say("user", None, "and", None, "?"), say("assistant", "no")]


class Mixed(Source):
    """Rows with two pictures of unlike shapes, with none, with one; `side` is that of a tile."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Sample:
        shapes = [[(3, 1), (1, 2)], [], [(2, 2)]][index]
        images = [noise(width * self.side, height * self.side) for width, height in shapes]
        question = say("user", *[None] * len(images), "What?")
        return Sample(f"mixed/{index}", images, [question, say("assistant", "This.")])


@pytest.mark.parametrize("option", ["tiny", "clip_vit_l14_336", "convnext_b_224", "dino_siglip"])
@pytest.mark.parametrize("separator", ["", "\n"], ids=["joined", "parted"])
def test_any_encoder_reads_tiles(option: str, separator: str) -> None:
    encoder, llm = build_encoder(option), tiny_llm()
    model = Composed(encoder=encoder, connector=connect("mlp", encoder, llm), llm=llm)
    made = Tiles(grids=NEXT).tiled(encoder.transform)
    source = Mixed(encoder.image_size[0])
    spec = VisualSpec(
        num_tokens=model.connector.num_tokens,
        image_size=encoder.image_size,
        transform=made,
        tile_rows=made.rows,
        row_separator=separator,
    )
    data = VLMDataModule(source=lambda split: source, batch_size=3, max_length=2048)
    data.connect(spec=spec, tokenizer=byte_tokenizer(), chat_template="chatml")
    batch = next(iter(data.val_dataloader()))
    counts = [[sum(made.rows(size)) for size in source[i].sizes] for i in range(3)]
    assert counts == [[4, 3], [], [5]]
    assert batch.num_images.tolist() == [7, 0, 5]
    assert batch.image_mask.sum(1).tolist() == [num * spec.num_tokens for num in (7, 0, 5)]
    with torch.no_grad():
        logits = model(batch)
        places = batch.image_mask[0].nonzero().flatten()
        visual = model.connector(model.encoder(made(source[0].images[1])))[-1]  # of the first row's last tile
        seen = capture(model, batch)[0, places[-spec.num_tokens :]]
    assert logits.shape == (len(batch.targets), llm.model.config.vocab_size)
    torch.testing.assert_close(seen, visual, atol=1e-4, rtol=1e-4)


def capture(model: Composed, batch: Any) -> torch.Tensor:
    """The embeddings that the LLM is given."""
    seen: list[torch.Tensor] = []
    hook = model.llm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(batch)
    hook.remove()
    return seen[0]


def test_the_command_line_sets_it() -> None:
    tiled = ["encoder.tiles.grids=[[1,2],[2,2]]", "encoder.tiles.row_separator=true", "encoder.resize=crop"]
    cfg = settings(*tiled, "data.max_length=2048")
    config.check(cfg)
    model, manifest = build.build_model(cfg)
    assert manifest["parts"]["encoder"]["tiles"]["grids"] == [[1, 2], [2, 2]]
    assert manifest["parts"]["encoder"]["transform"]["resize"] == "crop"  # another way at evaluation would be refused
    data = build.connect_data(build.build_data(cfg, None), cfg, model)
    batch = next(iter(data.val_dataloader()))
    assert batch.num_images.tolist() == [5, 5]  # square pictures: a thumbnail and 2×2 tiles
    assert batch.image_mask.sum(1).tolist() == [5 * model.connector.num_tokens] * 2
    (report,) = [each for each in data.preflight(num_samples=2, show=0) if each.name == "val"]
    assert report.visual == [5 * model.connector.num_tokens] * 2


def test_without_grids_nothing_changes() -> None:
    cfg = settings()
    model, manifest = build.build_model(cfg)
    assert manifest["parts"]["encoder"]["tiles"] == {"grids": [], "row_separator": False, "unpad": False}
    assert build.connect_data(build.build_data(cfg, None), cfg, model).spec.transform is model.encoder.transform


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("encoder.tiles.grids=[[1,0]]", r"encoder.tiles.grids\[0\]\[1\]=0 must be a whole number from 1"),
        ("encoder.tiles.grids=[[2]]", r"encoder.tiles.grids\[0\]=\[2\] must be a list with 2 entries"),
        ("encoder.tiles.grids=3", "encoder.tiles.grids=3 must be a list"),
        ("+encoder.tiles.grid=[[1,2]]", "there is no option encoder.tiles.grid; did you mean grids"),
        ("encoder.tiles.row_separator=2", "encoder.tiles.row_separator=2 must be true or false"),
    ],
)
def test_a_slip_is_named(override: str, said: str) -> None:
    cfg = settings(override)
    with pytest.raises(ValueError, match=said):
        config.check(cfg)


def test_a_connector_in_the_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MLP, "fusion", "layers")
    said = r"connector MLP does not support tiles, but encoder.tiles.grids=\[\[1, 2\]\]; set .*grids=\[\] or"
    with pytest.raises(ValueError, match=said):
        config.check(settings("encoder.tiles.grids=[[1,2]]", "connector=mlp"))
