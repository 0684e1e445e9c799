"""A folder of images with captions in text files of the same name: `a/cat.jpg` and `a/cat.txt`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlm.data.annotations import existing_folder
from vlm.data.files import read_text
from vlm.data.reading import current
from vlm.data.sources.captions import Caption, CaptionedImages, caption_of
from vlm.data.split import check_split
from vlm.ranges import RatioBelowOne
from vlm.schema import BadSample, Split

TEXTS = (".txt", ".caption")  # .caption is the default of kohya's scripts
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class ImageFolder(CaptionedImages):
    """Images with text files beside them, as img2dataset's `files` output and kohya's scripts write them.

    Every non-blank line of a text file is a caption, as with kohya's `enable_wildcard`; a caption cannot have several
    lines. Train uses all captions, and val uses the first one with all of them as references.

    An image without a text file, or with an empty one, is a bad sample. `left_out` counts text files without an image.
    The split is by the path under `root`. Links to folders are not followed.
    """

    def __init__(
        self,
        *,
        split: Split,
        root: str | Path,
        val_root: str | Path | None = None,
        val_fraction: RatioBelowOne = 0.05,
        prompt: str | list[str] = "Describe the image.",
    ) -> None:
        check_split(split=split, val_fraction=val_fraction)
        if split == "val" and val_root is not None:
            folder = existing_folder(val_root, option="val_root")
        else:
            folder = existing_folder(root, option="root")
        names = sorted(_names(folder))
        texts: dict[str, list[str]] = {}  # by path without ending
        for name in names:
            if name.lower().endswith(TEXTS):
                texts.setdefault(os.path.splitext(name)[0], []).append(name)
        images = [name for name in names if name.lower().endswith(SUFFIXES)]
        if not images:
            raise ValueError(
                f"'{folder}' holds 0 images among {len(names)} files; set data.root= to the folder of images"
            )
        stems = {image: os.path.splitext(image)[0] for image in images}
        with_image = set(stems.values())
        num_without_image = sum(len(found) for stem, found in texts.items() if stem not in with_image)
        self.left_out = {"text files without an image": num_without_image}
        captions = [
            caption for image, stem in stems.items() for caption in _captions(folder, image, stem, texts.get(stem, []))
        ]
        fraction = val_fraction if val_root is None else None
        super().__init__(captions, split=split, images=folder, where=folder, val_fraction=fraction, prompt=prompt)


def _names(folder: Path) -> Iterator[str]:
    limit, num, folders = current().max_files, 0, [""]
    while folders:
        inside = folders.pop()
        with os.scandir(folder / inside) as entries:
            for entry in entries:
                num += 1
                if num > limit:
                    raise ValueError(
                        f"'{folder}' holds more than {limit:,} files and folders; set data.root= to a folder that "
                        f"holds only the images, or set data.reading.max_files={2 * limit}"
                    )
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{inside}{entry.name}/")
                elif not entry.name.startswith("."):  # macOS writes ._cat.jpg beside cat.jpg
                    yield inside + entry.name


def _captions(folder: Path, image: str, stem: str, texts: Sequence[str]) -> list[Caption]:
    names = [f"'{os.path.basename(text)}'" for text in texts]
    if not texts:
        says = f"has no '{os.path.basename(stem)}.txt' or .caption beside it; write its caption there"
        return [Caption(image, image, "", says)]
    if len(texts) > 1:
        return [Caption(image, image, "", f"has {' and '.join(names)} beside it; keep one of them")]
    try:
        lines = [line for line in read_text(texts[0], root=folder).split("\n") if line.strip()]
    except BadSample as error:
        return [Caption(image, image, "", f"cannot be used: {error}")]
    if not lines:
        says = f"has an empty file {names[0]} beside it; write its caption there or remove the image"
        return [Caption(image, image, "", says, "empty_text")]
    return [caption_of(f"{image}#{i}" if i else image, image, line) for i, line in enumerate(lines)]
