"""Small runs that fit classes of Transformers, and the program that exports them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.helpers.programs import LIVELY, QUICK, program, train
from vlm.cli import export as export_program
from vlm.cli import import_run
from vlm.exchange import check, reload

TOWER = "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 3, num_attention_heads: 2, patch_size: 16"
HF = [
    *("encoder=hf", "encoder.pretrained=none", "encoder.weights=random", "encoder.interpolation=bicubic"),
    *("encoder.mean=[0.4,0.5,0.6]", "encoder.std=[0.2,0.3,0.4]"),
]
LLAVA = ["connector.norm=false", "connector.position=false"]


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
    return program(export_program.main, "vlm-export", *arguments)


def import_(*arguments: Any) -> int:
    return program(import_run.main, "vlm-import", *arguments)


def check_usage(program: Callable[..., int], first_line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without options a program fails, and with --help it ends well; both show how it is used, and nothing else."""
    for arguments, code in (([], 2), (["--help"], 0)):
        assert program(*arguments) == code
        said = capsys.readouterr()
        assert said.out.startswith(first_line)
        assert said.err == ""


@contextmanager
def one_process() -> Iterator[None]:
    """Have an export reload in this process, which saves the seconds of a start; one test starts one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "reload", reload.answer)
        yield


def answers(
    folder: Path, asked: list[list[Any]], question: str, *, adapter: str | None = None, trust_remote_code: bool = False
) -> list[str]:
    """The greedy answers of an exported folder about lists of images, with nothing but Transformers' auto classes."""
    trust = {"trust_remote_code": trust_remote_code}
    processor = AutoProcessor.from_pretrained(folder, **trust)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **trust)
    if adapter:
        model.load_adapter(folder / adapter)
    found = []
    for images in asked:
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        ids = model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
        found.append(processor.decode(ids, skip_special_tokens=True).strip())
    return found
