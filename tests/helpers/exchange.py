"""Small runs that fit classes of Transformers, and the program that exports them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.programs import QUICK, train
from vlm.cli import export as export_program
from vlm.exchange import check, reload

TOWER = "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 3, num_attention_heads: 2, patch_size: 16"
HF = [
    *("encoder=hf", "encoder.pretrained=none", "encoder.weights=random", "encoder.interpolation=bicubic"),
    *("encoder.mean=[0.4,0.5,0.6]", "encoder.std=[0.2,0.3,0.4]"),
]
LLAVA = ["connector.norm=false", "connector.position=false"]
# Of a random LLM whose answers depend on the image.
LIVELY = ["llm.config.tie_word_embeddings=false", "+llm.config.initializer_range=0.3"]


def tower(model_type: str, side: int = 64) -> str:
    return f"encoder.config={{model_type: {model_type}, image_size: {side}, {TOWER}}}"


def noise(width: int, height: int, seed: int) -> Image.Image:
    """A picture as smooth as a photograph."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def captions(folder: Path, num: int = 8) -> list[str]:
    """Options of data of pictures of different shapes, with captions."""
    (folder / "photos").mkdir(parents=True)
    for number in range(num):
        noise(60 + 10 * number, 100 - 10 * (number % 5), number).save(folder / "photos" / f"{number}.png")
    lines = [f'{{"image": "{number}.png", "caption": "Picture {number}."}}\n' for number in range(num)]
    (folder / "captions.jsonl").write_text("".join(lines))
    files = [f"data.annotations={folder / 'captions.jsonl'}", f"data.images={folder / 'photos'}"]
    return ["data=captions", *files, "data.val_fraction=0.5"]


def run_of(folder: Path, *options: str) -> Path:
    """A short run with these options, on `captions`."""
    parts = [option for option in QUICK if not option.startswith("encoder")]
    run = folder / "run"
    assert train(*parts, *LIVELY, *captions(folder), *options, f"run_dir={run}") == 0
    return run


def export(*arguments: Any) -> int:
    """The program in this process; its exit code."""
    before, sys.argv = sys.argv, ["vlm-export", *map(str, arguments)]
    try:
        export_program.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have an export reload in this process, which saves the seconds of a start; another test starts one."""
    monkeypatch.setattr(check, "reload", reload.answer)
