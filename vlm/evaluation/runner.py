"""Let a model answer held-out prompts in batches, and score the answers."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vlm import files
from vlm.data.datamodule import VLMDataModule
from vlm.evaluation.exact_match import exact_match, references


def answer(
    model: Any,
    data: VLMDataModule,
    indices: Sequence[int],
    *,
    batch_size: int,
    device: torch.device,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """One record a sample that can be read: id, type, prompt, prediction, reference, correct."""
    records = []
    for prompts in data.prompts(indices, batch_size):
        batch = prompts.to(device)
        ids = model.generate(batch, stop_ids=data.text.stop_ids, max_new_tokens=max_new_tokens)
        predictions = data.text.tokenizer.batch_decode(ids, skip_special_tokens=True)
        for sample, prediction in zip(batch.samples, predictions, strict=True):
            records.append(
                {
                    "id": sample.id,
                    "type": sample.meta.get("type"),
                    "prompt": "".join(c.get("text", "") for c in sample.messages[-2]["content"]),
                    "prediction": prediction.strip(),
                    "reference": references(sample)[0],
                    "correct": exact_match(prediction, sample),
                }
            )
    return records


def score(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Share of right answers, over all and by type where the source tells types; nothing where there are none."""
    if not records:
        return {}
    by_type: dict[str, list[bool]] = defaultdict(list)
    for record in records:
        by_type[record["type"]].append(record["correct"])
    result = {"exact_match": sum(r["correct"] for r in records) / len(records)}
    return result | {
        f"accuracy/{files.escape_controls(kind)}": sum(v) / len(v)
        for kind, v in sorted(by_type.items(), key=str)
        if kind
    }


def write_samples(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records]
    with files.create(path) as file:
        file.writelines(lines)
