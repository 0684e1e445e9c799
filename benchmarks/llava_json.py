"""How long a LLaVA JSON takes until its first sample, and how much memory: `python benchmarks/llava_json.py [rows]`.

Writes a file like LLaVA-1.5's mix of 665,000 conversations (1 GB) into a temporary folder, and opens both splits of it.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

from vlm.data.sources.instruct import Instruct

WORDS = ("the", "a", "cat", "dog", "table", "red", "blue", "image", "shows", "person", "\n", "street", "building")


def write(file: Path, num_rows: int) -> None:
    """Conversations of 2 to 5 questions over 350,000 pictures, one in sixteen without a picture."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(20, 60))) for _ in range(2000)]
    with file.open("w") as handle:
        for row in range(num_rows):
            turns = [
                {"from": who, "value": rng.choice(texts)} for _ in range(rng.randint(2, 5)) for who in ("human", "gpt")
            ]
            record = {"id": str(row), "image": f"coco/{rng.randrange(350_000):012d}.jpg", "conversations": turns}
            if row % 16:
                turns[0]["value"] = "<image>\n" + turns[0]["value"]
            else:
                del record["image"]
            handle.write(("[" if row == 0 else ",\n") + json.dumps(record, indent=2))
        handle.write("]")


def main(num_rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "llava.json")
        write(file, num_rows)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        train = Instruct(split="train", annotations=file, images=folder)
        one = time.perf_counter()
        val = Instruct(split="val", annotations=file, images=folder)
        val.outline(0)
        two = time.perf_counter()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        size = file.stat().st_size
    print(f"rows {num_rows:,} ({len(train):,} train, {len(val):,} val) in {size / 1e6:,.0f} MB")
    print(f"seconds to the train split {one - start:.1f}, then to a sample of val {two - one:.1f}")
    print(f"MB of peak memory {peak / 1024:,.0f}, of which before {before / 1024:,.0f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 665_000)
