"""Emoji with their Unicode names in many languages, as drawn by Google (Noto) or Microsoft (Fluent): npm packages.

Names are those of the Unicode CLDR (Unicode License). Both packages of pictures have the MIT License.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from vlm import files
from vlm.data.conversations import CAPTION_PROMPTS, caption_messages
from vlm.data.images import load_image
from vlm.data.split import check_split, in_split
from vlm.ranges import Length, Name, RatioBelowOne
from vlm.schema import Sample, Source, Split

STYLES = {
    "noto": "emoji-datasource-google/img/google/64",
    "fluent": "@lobehub/fluent-emoji-3d/assets",
}
NAMES = "cldr-annotations-full/annotations"
INSTALL = (
    "npm install --prefix emoji --ignore-scripts emoji-datasource-google @lobehub/fluent-emoji-3d cldr-annotations-full"
)
MAX_BYTES = 2**26  # of a file of names; the largest one has 0.3 MB

Codes = tuple[str, ...]  # hexadecimal code points, without the variation selectors

VARIATION, JOINER = "fe0f", "200d"
SKIN_TONES = frozenset(("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"))
SIGNS = (["2640"], ["2642"])  # female and male, after a joiner
SANTA, NEUTRAL_SANTA = ("1f385",), ("1f9d1", "1f384")
SAME_BASE = {  # the emoji that stands for those of another gender; of people, the neutral one
    **{"1f468": "1f9d1", "1f469": "1f9d1"},  # man, woman: adult
    **{"1f466": "1f9d2", "1f467": "1f9d2"},  # boy, girl: child
    **{"1f474": "1f9d3", "1f475": "1f9d3"},  # old man, old woman: older person
    **{"1f934": "1fac5", "1f478": "1fac5"},  # prince, princess: person with crown
    **{"1f57a": "1f483", "1f936": "1f385"},  # man dancing, Mother Christmas
    **{"1f46b": "1f46d", "1f46c": "1f46d"},  # two people who hold hands
}


class Emoji(Source):
    """One sample for each picture of a style and each language in which it has a name: the short name of the CLDR.

    The split is by a hash of the base emoji, which is the same for all skin tones and genders, styles and languages: a
    held-out emoji is held out in every style. `Sample.meta["type"]` is the language, where there are several.

    Args:
        root: the folder of `npm install --prefix`.
        style: `noto` or `fluent`, two ways of drawing the same emoji.
        languages: of the names, by their codes in the CLDR, such as en, ja, de.
        val_fraction: the fraction of the base emoji that is held out, about.
        prompt: the question that a name answers; by default that of the language.
    """

    num_hashed = 256

    def __init__(
        self,
        *,
        split: Split,
        root: str | Path = "emoji",
        style: Literal["noto", "fluent"] = "noto",
        languages: Annotated[list[Name], Length(1)] | None = None,
        val_fraction: RatioBelowOne = 0.15,
        prompt: str | None = None,
    ) -> None:
        check_split(split=split, val_fraction=val_fraction)
        packages = Path(root).expanduser() / "node_modules"
        self._pictures = packages / STYLES[style]
        for folder in (self._pictures, packages / NAMES):
            if not folder.is_dir():
                raise ValueError(f"there is no folder '{folder}'; run {INSTALL}, or set data.root= to its --prefix")
        languages = ["en"] if languages is None else list(dict.fromkeys(languages))
        pictures = dict(
            sorted((_codes_of_file(path), path.name) for path in self._pictures.iterdir() if _is_picture(path))
        )
        names = {language: _names(packages / NAMES, language) for language in languages}
        self.left_out = {
            f"pictures without a name in '{language}'": sum(codes not in names[language] for codes in pictures)
            for language in languages
        }
        # Each: the id of the sample, the file, the language, the name.
        self.items = [
            (f"{'-'.join(codes)}/{language}", file, language, names[language][codes])
            for codes, file in pictures.items()
            if in_split("-".join(base(codes)), split=split, val_fraction=val_fraction)
            for language in languages
            if codes in names[language]
        ]
        if not self.items:
            raise ValueError(
                f"none of the {len(pictures)} pictures in '{self._pictures}' has a name and falls into {split} with "
                f"val_fraction {val_fraction}; set data.val_fraction= to another ratio, or check data.root="
            )
        self._several, self._prompt = len(languages) > 1, prompt

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        sample = self.outline(index)
        return replace(sample, images=[load_image(sample.meta["image"], root=self._pictures)])

    def outline(self, index: int) -> Sample:
        """The sample without its image, which is not opened."""
        id_, file, language, name = self.items[index]
        prompt = self._prompt or CAPTION_PROMPTS.get(language, CAPTION_PROMPTS["en"])
        meta = {"image": file} | ({"type": language} if self._several else {})
        return Sample(id=id_, images=[], messages=caption_messages(prompt, name), meta=meta)


def base(codes: Codes) -> tuple[str, ...]:
    """The emoji without skin tone and gender, by which the splits are made: what its joiners join."""
    joined: list[list[str]] = [[]]
    for code in codes:
        if code == JOINER:
            joined.append([])
        elif code not in SKIN_TONES:
            joined[-1].append(SAME_BASE.get(code, code))
    found = tuple("-".join(part) for part in joined if part and part not in SIGNS)
    return SANTA if found == NEUTRAL_SANTA else found or codes  # a skin tone is an emoji too


def _is_picture(path: Path) -> bool:
    return path.suffix in (".png", ".webp")


def _codes_of_file(path: Path) -> Codes:
    return tuple(code for code in path.stem.lower().split("-") if code != VARIATION)


def _names(folder: Path, language: str) -> dict[Codes, str]:
    """The short names of a language. Raises ValueError where the language is not there."""
    known = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if language not in known:
        raise ValueError(
            f"data.languages={language} has no names in '{folder}'; choose of {', '.join(known) or '(none is there)'}"
        )
    file = folder / language / "annotations.json"
    try:
        annotations: Any = json.loads(files.read(file, max_bytes=MAX_BYTES))["annotations"]["annotations"]
        return {_codes(text): str(each["tts"][0]) for text, each in annotations.items() if each.get("tts")}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is not a file of names of the CLDR ({error!r}); install the package again") from error


def _codes(text: str) -> Codes:
    return tuple(code for character in text if (code := f"{ord(character):04x}") != VARIATION)
