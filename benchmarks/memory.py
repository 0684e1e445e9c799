"""Whether reading epoch after epoch holds on to memory: `python benchmarks/memory.py [rows] [epochs]`.

Conversations about small pictures in one JSON list pass through the data module, without and with workers. What counts
is the memory that this process and its workers have written to, shared pages once (Linux: Pss_Anon and Pss_Shmem of
smaps_rollup; a library's pages would count for less while another program uses it).
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from vlm.data.datamodule import VLMDataModule
from vlm.data.sources.instruct import Instruct
from vlm.encoders.transform import Transform
from vlm.llms.bytes import byte_tokenizer
from vlm.schema import VisualSpec

NUM_PICTURES, SIDE, BATCH_SIZE = 200, 64, 32


def write(folder: Path, num_rows: int) -> Path:
    """The pictures, and the file of conversations about them."""
    rng = np.random.default_rng(0)
    for number in range(NUM_PICTURES):
        pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
    rows = [
        {
            "id": str(row),
            "image": f"{row % NUM_PICTURES}.jpg",
            "conversations": [
                {"from": "human", "value": f"<image>\nWhich picture is number {row}?"},
                {"from": "gpt", "value": "It shows " + "noise " * int(rng.integers(1, 40))},
            ],
        }
        for row in range(num_rows)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def megabytes() -> float:
    """What this process and its workers hold."""
    processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    files = (Path(f"/proc/{process}/smaps_rollup") for process in processes)
    lines = (line.split() for file in files for line in file.read_text().splitlines())
    return sum(int(words[1]) for words in lines if words[0] in ("Pss_Anon:", "Pss_Shmem:")) / 1024


def main(num_rows: int, num_epochs: int) -> None:
    transform = Transform(size=(SIDE, SIDE), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic")
    spec = VisualSpec(num_tokens=16, image_size=(SIDE, SIDE), transform=transform)
    with tempfile.TemporaryDirectory() as folder:
        file = write(Path(folder), num_rows)
        source = partial(Instruct, annotations=file, images=folder, val_fraction=0.01)
        for num_workers in (0, 2):
            data = VLMDataModule(source=source, batch_size=BATCH_SIZE, num_workers=num_workers, max_length=2048)
            data.connect(spec=spec, tokenizer=byte_tokenizer(), chat_template="chatml")
            batches = iter(data.train_dataloader())
            num_batches = len(data.splits["train"]) // BATCH_SIZE
            for epoch in range(1, num_epochs + 1):
                for _ in itertools.islice(batches, num_batches):
                    pass
                print(f"workers {num_workers}   epoch {epoch}   {megabytes():8,.1f} MB", flush=True)
            del batches


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3] or (5_000, 6)))
