"""Emoji from packages in the real layouts: names, splits by base emoji, two styles, the benchmark and retrieval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.sources import answer, picture, samples
from vlm.data.sources.emoji import NAMES, STYLES, Emoji, base
from vlm.data.split import in_split
from vlm.evaluation.benchmarks import emoji as benchmark
from vlm.evaluation.benchmarks.retrieval import Retrieval

NUM = 40
FIRST = 0x1F400  # rat, mouse, ox, …
WAVES = {"1f44b": "waving hand", "1f44b-1f3fb": "", "1f44b-1f3ff": ""}  # those with a skin tone have no name
POLICE = {
    "1f46e": "police officer",
    "1f46e-200d-2640-fe0f": "woman police officer",
    "1f46e-200d-2642-fe0f": "man police officer",
}
HEART = {"2764-fe0f": "red heart"}


def characters(codes: str) -> str:
    return "".join(chr(int(code, 16)) for code in codes.split("-"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    packages = tmp_path / "emoji" / "node_modules"
    names = {f"{FIRST + n:x}": f"animal {n}" for n in range(NUM)} | WAVES | POLICE | HEART
    for number, codes in enumerate(names):
        picture(packages / STYLES["noto"] / f"{codes}.png", color=(number, 0, 0))
        picture(packages / STYLES["fluent"] / f"{codes}.webp", color=(0, 200, 0))
    for language, prefix in (("en", ""), ("ja", "日本語 ")):
        annotations: dict[str, Any] = {
            # The CLDR leaves out the variation selector of a sign, and writes it in sequences.
            characters(codes).replace("❤️", "❤"): {"default": ["word"], "tts": [prefix + name]}
            for codes, name in names.items()
            if name
        }
        annotations["ñ"] = {"default": ["a letter"]}  # of no picture, and without a short name
        file = packages / NAMES / language / "annotations.json"
        file.parent.mkdir(parents=True)
        content = {"annotations": {"identity": {"language": language}, "annotations": annotations}}
        file.write_text(json.dumps(content), encoding="utf-8")
    return tmp_path / "emoji"


def test_each_emoji_with_a_name_is_in_one_split_by_its_base(root: Path) -> None:
    train, val = (Emoji(split=split, root=root) for split in ("train", "val"))
    ids = [sample.id for sample in samples(train)], [sample.id for sample in samples(val)]
    assert len(ids[0] + ids[1]) == NUM + 1 + 3 + 1
    animals = [f"{FIRST + n:x}" for n in range(NUM)]
    assert [name for name in animals if f"{name}/en" in ids[1]] == [
        name for name in animals if in_split(name, split="val", val_fraction=0.15)
    ]
    assert 2 <= len(ids[1]) <= 14
    assert train.left_out == {"pictures without a name in 'en'": 2}


def test_a_sample(root: Path) -> None:
    found = {s.id: s for split in ("train", "val") for s in samples(Emoji(split=split, root=root))}
    sample = found["1f46e-200d-2640/en"]
    assert sample.messages == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "woman police officer"}]},
    ]
    assert sample.images[0].getpixel((0, 0)) == (list(POLICE).index("1f46e-200d-2640-fe0f") + NUM + len(WAVES), 0, 0)
    assert sample.meta == {"image": "1f46e-200d-2640-fe0f.png"}
    assert answer(found["2764/en"]) == "red heart"


def test_two_languages_of_an_emoji_are_in_one_split(root: Path) -> None:
    source = Emoji(split="val", root=root, languages=["en", "ja"], val_fraction=0.5)
    ids = [sample.id for sample in samples(source)]
    assert {id_.removesuffix("/ja") for id_ in ids if id_.endswith("/ja")} == {
        id_.removesuffix("/en") for id_ in ids if id_.endswith("/en")
    }
    first, second = source[0], source[1]
    assert (first.meta["type"], second.meta["type"]) == ("en", "ja")
    assert answer(second) == f"日本語 {answer(first)}"
    assert second.messages[0]["content"][1]["text"] == "画像を説明してください。"
    assert Emoji(split="val", root=root, prompt="What?")[0].messages[0]["content"][1]["text"] == "What?"


def test_a_held_out_emoji_is_held_out_in_every_style(root: Path) -> None:
    noto, fluent = (list(samples(Emoji(split="val", root=root, style=style))) for style in ("noto", "fluent"))
    assert [sample.id for sample in noto] == [sample.id for sample in fluent]
    assert fluent[0].images[0].getpixel((0, 0))[1] > 150  # another picture
    assert noto[0].images[0].getpixel((0, 0))[1] == 0


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ("1f44b-1f3ff", "1f44b"),  # waving hand: dark skin tone
        ("1f46e-1f3fb-200d-2642", "1f46e"),  # man police officer: light skin tone
        ("1f468-200d-1f373", "1f9d1 1f373"),  # man cook
        ("1f469-1f3fd-200d-1f373", "1f9d1 1f373"),
        ("1f9d1-200d-1f373", "1f9d1 1f373"),  # cook
        ("1f467", "1f9d2"),  # girl
        ("1f9d1-200d-1f384", "1f385"),  # neither Father nor Mother Christmas
        ("1f3fd", "1f3fd"),  # the skin tone itself
        ("2640", "2640"),
        ("1f1ef-1f1f5", "1f1ef-1f1f5"),  # a flag
        ("1f436", "1f436"),
    ],
)
def test_skin_tones_and_genders_have_one_base(codes: str, expected: str) -> None:
    assert " ".join(base(tuple(codes.split("-")))) == expected


def test_what_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no folder '/gone/node_modules/emoji.*; run npm install --prefix emoji .*, or set"
    ):
        Emoji(split="train", root="/gone")
    with pytest.raises(ValueError, match=r"data.languages=xx has no names in '.*'; choose of en, ja$"):
        Emoji(split="train", root=root, languages=["xx"])
    with pytest.raises(
        ValueError, match=r"none of the 47 pictures .* falls into val with val_fraction 1e-09; set data.val_"
    ):
        Emoji(split="val", root=root, val_fraction=1e-9)
    assert len(Emoji(split="val", root=root, val_fraction=0.0)) == len(
        Emoji(split="train", root=root, val_fraction=0.0)
    )


def test_a_broken_file_of_names_is_named(root: Path) -> None:
    file = root / "node_modules" / NAMES / "ja" / "annotations.json"
    file.write_text('{"annotations": []}')
    with pytest.raises(
        ValueError, match=r"ja/annotations.json is not a file of names of the CLDR .*; install the package"
    ):
        Emoji(split="train", root=root, languages=["ja"])


def test_the_benchmark_asks_for_held_out_names(root: Path) -> None:
    asked = benchmark.Emoji(root=str(root), style="fluent", languages=["en", "ja"], val_fraction=0.5)
    held = Emoji(split="val", root=root, languages=["en", "ja"], val_fraction=0.5)
    assert [question.id for question in asked.questions] == [sample.id for sample in samples(held)]
    assert asked.questions[0].references == (answer(held[0]),)
    assert {question.type for question in asked.questions} == {"en", "ja"}
    assert asked.image(asked.questions[0].images[0]).getpixel((0, 0))[1] > 150


def test_retrieval_of_names(root: Path) -> None:
    asked = Retrieval(data="emoji", images=str(root), language="ja", style="fluent", num_candidates=4)
    assert len(asked.questions) == 4
    assert all(text.startswith("日本語 ") for text in asked.questions[0].choices)
    assert asked.questions[0].references[0] in asked.questions[0].choices
    with pytest.raises(
        ValueError, match=r"^there is no folder '/gone/node_modules.*or set data.images= to its --prefix"
    ):
        Retrieval(data="emoji", images="/gone")
    with pytest.raises(ValueError, match=r"^data.language=xx has no names"):
        Retrieval(data="emoji", images=str(root), language="xx")
