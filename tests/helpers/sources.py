"""Files that sources read, what a source yields, and sources of numbered samples."""

from __future__ import annotations

import base64
import json
import tarfile
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.helpers.text import byte_tokenizer, say
from vlm.data.datamodule import VLMDataModule
from vlm.data.sources.mixture import Mixture
from vlm.schema import BadSample, Sample, Source, VisualSpec


def picture(file: Path, size: tuple[int, int] = (4, 2), color: tuple[int, ...] = (255, 0, 0)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA" if len(color) == 4 else "RGB", size, color).save(file)


def samples(source: Source) -> list[Sample]:
    return [source[index] for index in range(len(source))]


def answer(sample: Sample) -> str:
    return sample.messages[-1]["content"][0]["text"]


def refusal(source: Source, index: int = 0) -> str:
    with pytest.raises(BadSample) as caught:
        source[index]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(file: Path, content: Any) -> Path:
    """JSON, or a line per item where the name ends in .jsonl; a text as it is."""
    if isinstance(content, str):
        file.write_text(content, encoding="utf-8")
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(item) + "\n" for item in content))
    else:
        file.write_text(json.dumps(content))
    return file


def png(red: int) -> bytes:
    data = BytesIO()
    Image.new("RGB", (4, 2), (red, 0, 0)).save(data, "PNG")
    return data.getvalue()


def shard(file: Path, members: dict[str, bytes | str | dict[str, Any]]) -> Path:
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            text = json.dumps(content) if isinstance(content, dict) else content
            data = text.encode() if isinstance(text, str) else text
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, BytesIO(data))
    return file


def caption_shard(file: Path, *numbers: int) -> Path:
    members = [
        (f"{n:04d}.{kind}", content) for n in numbers for kind, content in (("png", png(n)), ("txt", f"Dot {n}."))
    ]
    return shard(file, dict(members))


def cell(red: int, size: tuple[int, int] = (4, 2)) -> dict[str, Any]:
    data = BytesIO()
    Image.new("RGB", size, (red, 0, 0)).save(data, "PNG")
    return {"bytes": data.getvalue(), "path": None}


def table(columns: dict[str, list[Any]], *, images: bool = False) -> Any:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict(columns)
    image = datasets.List(datasets.Image()) if images else datasets.Image()
    return made.cast_column("images" if images else "image", image)


def url(red: int) -> str:
    data = BytesIO()
    Image.new("RGB", (2, 2), (red, 0, 0)).save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


class Numbers(Source):
    """Ten times fewer samples in val; every seventh cannot be read."""

    def __init__(self, *, split: str, size: int) -> None:
        self.split, self.size = split, size if split == "train" else size // 10

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if index % 7 == 6:
            raise BadSample(f"sample '{index}' is a seventh")
        return Sample(id=f"{self.split}/{index}", images=[], messages=[], meta={"n": str(index)})


def mixture(*, kind: Any = Numbers, split: str = "train", a: int = 30, b: int = 10, **options: Any) -> Mixture:
    sources = {"a": partial(kind, split="train", size=a), "b": partial(kind, split="train", size=b)}
    return Mixture(split=split, sources=sources, **options)


K = 3


class Numbered(Source):
    """Sample i has i % 3 images and an answer of i + 1 letters; those in `bad` cannot be read."""

    def __init__(self, split: str, size: int = 12, bad: tuple[int, ...] = ()) -> None:
        self.split, self.size, self.bad = split, size, bad

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(index)
        if index in self.bad:
            raise BadSample(f"sample '{self.split}/{index}' is broken; mend it")
        images = [Image.new("RGB", (8, 8), (index, n, 0)) for n in range(index % 3)]
        question = say("user", *[None] * len(images), "Hi")
        return Sample(f"{self.split}/{index}", images, [question, say("assistant", "x" * (index + 1))])


def pixels(image: Image.Image) -> Tensor:
    return torch.tensor(image.getpixel((0, 0)), dtype=torch.float32).view(3, 1, 1).expand(3, 4, 4).clone()


def numbered(tmp_path: Path | None = None, bad: tuple[int, ...] = (), size: int = 12, **options) -> VLMDataModule:
    data = VLMDataModule(
        source=lambda split: Numbered(split, size, bad if split == "train" else ()),
        bad_samples_file=tmp_path / "bad_samples.jsonl" if tmp_path else None,
        **{"batch_size": 4} | options,
    )
    spec = VisualSpec(num_tokens=K, image_size=(4, 4), transform=pixels)
    data.connect(spec=spec, tokenizer=byte_tokenizer(), chat_template="chatml")
    return data
