"""Documents of images and text in turn: what they yield, what is left out, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.programs import QUICK, read, train
from tests.helpers.sources import picture, refusal, samples, write
from vlm.data.sources.interleaved import DocumentReader, Interleaved
from vlm.llms.bytes import byte_tokenizer
from vlm.schema import Sample
from vlm.text.encode import TextEncoder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for index in range(8):
        picture(tmp_path / "images" / f"{index}.png", color=(index, 0, 0))
    return tmp_path / "images"


def mmc4(sentences: list[Any], *infos: tuple[str, int, float], **rest: Any) -> dict[str, Any]:
    """MMC4's record, with keys that are not read."""
    keys = ("image_name", "matched_text_index", "matched_sim")
    listed = [{**dict(zip(keys, info, strict=True)), "raw_url": "x"} for info in infos]
    return {"text_list": sentences, "image_info": listed, "url": "y", "similarity_matrix": [[0.1]], **rest}


def obelics(*pieces: str) -> dict[str, Any]:
    """OBELICS' record; a piece that ends in .png is an image."""
    is_image = [piece.endswith(".png") for piece in pieces]
    return {
        "texts": [None if image else piece for piece, image in zip(pieces, is_image, strict=True)],
        "images": [piece if image else None for piece, image in zip(pieces, is_image, strict=True)],
        "general_metadata": "{}",
    }


def source(file: Path, images: Path, **options: Any) -> Interleaved:
    usual = {"split": "train", "val_fraction": 0.0, "keep_single_image": 1.0}
    return Interleaved(**{**usual, "annotations": file, "images": images, **options})


def turns(sample: Sample) -> list[tuple[str, str]]:
    return [
        (message["role"][0], "|".join(piece.get("text", "IMAGE") for piece in message["content"]))
        for message in sample.messages
    ]


def test_an_image_comes_before_its_sentence(images: Path, tmp_path: Path) -> None:
    document = mmc4(
        ["One. ", " Two.", "Three.", "Four.", "  "],
        *[("3.png", 3, 0.3), ("1.png", 1, 0.24), ("2.png", 1, 0.9), ("7.png", 0, 0.2399)],
    )
    (found,) = samples(source(write(tmp_path / "a.jsonl", [document]), images))
    assert turns(found) == [("u", "One.|IMAGE|IMAGE"), ("a", "Two. Three."), ("u", "IMAGE"), ("a", "Four.")]
    assert [image.getpixel((0, 0))[0] for image in found.images] == [1, 2, 3]
    assert found.meta == {"image": "1.png, 2.png, 3.png"}


def test_pieces_keep_their_order(images: Path, tmp_path: Path) -> None:
    records = [
        obelics("0.png", "A", "B", "1.png", "2.png", "C", "3.png"),
        obelics("Intro", "4.png", "D"),
    ]
    one, two = samples(source(write(tmp_path / "a.json", records), images))
    assert turns(one) == [("u", "IMAGE"), ("a", "A B"), ("u", "IMAGE|IMAGE"), ("a", "C")]  # the last image has no text
    assert [image.getpixel((0, 0))[0] for image in one.images] == [0, 1, 2]
    assert turns(two) == [("u", "Intro|IMAGE"), ("a", "D")]


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (1, [("u", "IMAGE"), ("a", "A B C")]),
        (2, [("u", "IMAGE"), ("a", "A"), ("u", "IMAGE"), ("a", "B C")]),
        (3, [("u", "IMAGE"), ("a", "A"), ("u", "IMAGE|IMAGE"), ("a", "B C")]),
        (4, [("u", "IMAGE"), ("a", "A"), ("u", "IMAGE|IMAGE"), ("a", "B"), ("u", "IMAGE"), ("a", "C")]),
    ],
)
def test_the_first_images_are_kept(most: int, expected: list[tuple[str, str]]) -> None:
    reader = DocumentReader(max_images=most, min_similarity=0.0)
    found = reader.conversation(obelics("0.png", "A", "1.png", "2.png", "B", "3.png", "C"))
    assert turns(Sample("x", [], found.messages)) == expected
    assert found.images == [f"{index}.png" for index in range(most)]


def test_documents_without_an_image_or_with_one_are_left_out(images: Path, tmp_path: Path) -> None:
    records = [obelics("Text"), mmc4(["A"], ("0.png", 0, 0.1)), obelics("1.png", "A", "2.png", "B")]
    records += [obelics(f"{index % 8}.png", "A") for index in range(200)]
    found = source(write(tmp_path / "a.jsonl", records), images, keep_single_image=0.5)
    left_out = found.left_out["documents with a single image"]
    assert 75 <= left_out <= 125
    assert found.left_out["documents without an image"] == 2
    assert len(found) == 1 + 200 - left_out
    assert min(sample.num_images for sample in samples(found)) == 1
    with pytest.raises(ValueError, match=r"no document of the train split in '.*' has an image that is kept; set "):
        source(write(tmp_path / "b.jsonl", records[3:]), images, keep_single_image=0.0)


def test_documents_that_share_an_image_stay_in_one_split(images: Path, tmp_path: Path) -> None:
    records = [obelics(f"{a}.png", "A", f"{a + 1}.png", str(a)) for a in (0, 2, 4, 6)]
    records += [obelics(f"{a}.png", "B") for a in range(8)]
    file = write(tmp_path / "a.jsonl", records)
    names = [
        {name for sample in samples(source(file, images, split=split, val_fraction=0.7)) for name in _names(sample)}
        for split in ("train", "val")
    ]
    assert names[0] | names[1] == {f"{index}.png" for index in range(8)}
    assert not names[0] & names[1]


def _names(sample: Sample) -> list[str]:
    return sample.meta["image"].split(", ")


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"id": "d", "text": "A"}, "has neither 'text_list' (MMC4) nor 'texts' (OBELICS); write one of them"),
        (
            mmc4(["A", "B"], ("0.png", 2, 0.5), id="d"),
            "has an image '0.png' of sentence 2 of 2; name an image and one of the sentences",
        ),
        (
            {"id": "d", "text_list": ["A"], "image_info": None},
            "has a 'text_list' or 'image_info' that is not a list; write both as lists",
        ),
        (
            {"id": "d", "texts": ["A"], "images": []},
            "has 'texts' and 'images' that are not lists of one length; write a null beside each value",
        ),
        (
            {"id": "d", "texts": ["A"], "images": ["0.png"]},
            "has a place with both a text and an image, or with neither; write one of them",
        ),
        ({"id": "d", "texts": [3], "images": [None]}, "has a text 3; write it as a string"),
        ({"id": "d", "texts": [None], "images": [3]}, "has an image 3; write the name of a file"),
    ],
)
def test_refusals(record: dict[str, Any], said: str, images: Path, tmp_path: Path) -> None:
    found = source(write(tmp_path / "a.jsonl", [obelics("1.png", "A"), record]), images)
    assert len(found) == 2
    assert refusal(found, 1) == f"sample 'd' {said}"


def test_the_text_after_an_image_is_supervised() -> None:
    reader = DocumentReader(max_images=5, min_similarity=0.0)
    found = reader.conversation(obelics("Intro", "0.png", "A cat.", "1.png", "A dog."))
    encoder = TextEncoder(tokenizer=byte_tokenizer(), num_image_tokens=2, max_length=99, chat_template="caption")
    runs = encoder.runs(encoder.encode(Sample("x", [], found.messages)))
    assert [text for text, supervised in runs if supervised] == ["A cat.\n", "A dog.\n"]
    assert "".join(text for text, _ in runs) == "<bos>Intro<image×2>A cat.\n<image×2>A dog.\n"


def test_a_run_on_documents(images: Path, tmp_path: Path) -> None:
    """Of a model whose layers attend to the last image."""
    records = [obelics(f"{a}.png", "A cat.", f"{(a + 1) % 8}.png", "A dog.") for a in range(8)]
    file = write(tmp_path / "a.jsonl", records)
    options = ["data=interleaved", f"data.annotations={file}", f"data.val_annotations={file}", f"data.images={images}"]
    parts = ["connector=cross_attention", "connector.num_queries=4", "llm.chat_template=caption", "data.num_workers=0"]
    assert train(*QUICK, *options, *parts, f"run_dir={tmp_path / 'run'}") == 0
    answered = read(tmp_path / "run" / "samples.jsonl")
    assert {line["reference"] for line in answered} == {"A dog."}
