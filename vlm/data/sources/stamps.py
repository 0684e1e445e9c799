"""Tux Paint's stamps: photographs and drawings with one-line captions in many languages (Debian, GPL-2)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

from vlm.data.conversations import CAPTION_PROMPTS, caption_messages
from vlm.data.images import load_image
from vlm.data.split import check_split, in_split
from vlm.ranges import RatioBelowOne
from vlm.schema import BadSample, Sample, Source, Split

_TRANSLATION = re.compile(r"(?P<code>[\w@-]+)\.utf8=(?P<text>.*)")
_MIRRORED = re.compile(r"(_mirror|_flip)+$")  # endings of names of mirrored copies


class Stamps(Source):
    """Images `NAME.png` with captions in `NAME.txt`: the first line in English, lines such as `ja.utf8=...` translated.

    The split is by a hash of the path under `root`, the same for every language. Byte-identical files, of which there
    are some, stay in one split. `left_out` counts over both splits; a mirrored copy has no text of its own.
    """

    num_hashed = 256

    def __init__(
        self,
        *,
        split: Split,
        root: str | Path = "/usr/share/tuxpaint/stamps",
        language: str = "en",
        symbols: bool = False,
        val_fraction: RatioBelowOne = 0.15,
        prompt: str | None = None,
    ) -> None:
        check_split(split=split, val_fraction=val_fraction)
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise ValueError(
                f"there is no folder '{self.root}'; run apt-get install tuxpaint-stamps-default, or set data.root= to "
                "the folder that holds the stamps"
            )
        self.prompt = prompt or CAPTION_PROMPTS.get(language, CAPTION_PROMPTS["en"])

        found = _names(self.root, "*.png")
        names = [name for name in found if symbols or not _is_symbol(name)]
        drawings = [name for name in _names(self.root, "*.svg") if symbols or not _is_symbol(name)]
        captions = {name: _captions(self.root / name) for name in names}
        items = [(name, captions[name][language]) for name in names if language in captions[name]]
        if not items:
            codes = sorted({code for texts in captions.values() for code in texts})
            raise ValueError(
                f"none of the {len(names)} stamps under '{self.root}' has a caption in language '{language}'; choose "
                f"one of {', '.join(codes) or '(no caption found: set data.root=)'}"
            )
        stems = {name.removesuffix(".png") for name in found}
        num_mirrored = sum(not captions[name] and _is_mirrored(name, captions) for name in names)
        self.left_out = {
            "symbols": len(found) - len(names),
            "drawings that exist only as SVG": len({name.removesuffix(".svg") for name in drawings} - stems),
            "mirrored copies": num_mirrored,
            f"images without a caption in '{language}'": len(names) - len(items) - num_mirrored,
        }

        keys = _split_keys(self.root, names)
        self.items = [item for item in items if in_split(keys[item[0]], split=split, val_fraction=val_fraction)]
        if not self.items:
            raise ValueError(
                f"none of the {len(items)} stamps under '{self.root}' falls into {split} with val_fraction "
                f"{val_fraction}; set data.val_fraction= to another ratio"
            )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        sample = self.outline(index)
        return replace(sample, images=[load_image(sample.id, root=self.root)])

    def outline(self, index: int) -> Sample:
        """The sample without its image, which is not opened."""
        name, caption = self.items[index]
        if "\ufffd" in caption:
            raise BadSample(f"stamp '{name}' has a caption that is not UTF-8; save its .txt file as UTF-8")
        return Sample(id=name, images=[], messages=caption_messages(self.prompt, caption), meta={"image": name})


def _names(root: Path, pattern: str) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob(pattern))


def _is_symbol(name: str) -> bool:
    return name.startswith("symbols/")


def _is_mirrored(name: str, names: dict[str, dict[str, str]]) -> bool:
    stem = name.removesuffix(".png")
    original = _MIRRORED.sub("", stem)
    return original != stem and f"{original}.png" in names


def _captions(image: Path) -> dict[str, str]:
    """Captions by language code. Bytes that are not UTF-8 become U+FFFD; such a caption is refused when it is read."""
    file = image.with_suffix(".txt")
    if not file.is_file():
        return {}
    lines = file.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    matches = [_TRANSLATION.match(line.strip()) for line in lines]
    captions = {match["code"]: match["text"].strip() for match in matches if match}
    if matches[0] is None:
        captions["en"] = lines[0].strip()
    return {code: text for code, text in captions.items() if text}


def _split_keys(root: Path, names: Sequence[str]) -> dict[str, str]:
    """The path whose hash decides the split of each stamp: its own, or that of the first stamp with the same bytes."""
    sizes = {name: (root / name).stat().st_size for name in names if (root / name).is_file()}
    num_of_size = Counter(sizes.values())
    first: dict[bytes, str] = {}
    keys = {}
    for name in names:
        keys[name] = name
        if num_of_size[sizes.get(name, -1)] > 1:  # fast: most files have a unique size
            keys[name] = first.setdefault(blake2b((root / name).read_bytes()).digest(), name)
    return keys
