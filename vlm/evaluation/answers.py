"""Scores of generated answers to the prompts of the validation split."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from vlm import files
from vlm.evaluation.base import Context, Evaluator
from vlm.evaluation.scorers.base import Scorer, references
from vlm.models.base import Generates
from vlm.ranges import BatchSize, Range, Samples

MaxNewTokens = Annotated[int, Range(1, 65_536)]


class Answers(Evaluator):
    """`val/<score>`, the mean score of generated answers, and `val/<score>/<type>` if the source has types.

    Args:
        scorer: scores one answer.
        num_samples: number of validation samples, evenly spread over the split; None is all.
        batch_size: prompts per batch.
        max_new_tokens: largest number of tokens of an answer.
    """

    at: ClassVar[Literal["validation", "end"]] = "end"
    needs: ClassVar[tuple[type, ...]] = (Generates,)

    def __init__(
        self,
        *,
        scorer: Scorer,
        num_samples: Samples | None = 128,
        batch_size: BatchSize = 32,
        max_new_tokens: MaxNewTokens = 64,
    ) -> None:
        self.scorer = scorer
        self.num_samples, self.batch_size, self.max_new_tokens = num_samples, batch_size, max_new_tokens

    def finish(self, context: Context) -> dict[str, float]:
        indices = context.data.val_indices(self.num_samples)
        self.samples = self._records(context, indices)  # the same on every rank
        return {f"val/{name}": value for name, value in mean_scores(self.samples, self.scorer).items()}

    def _records(self, context: Context, indices: Sequence[int]) -> list[dict[str, Any]]:
        """One record per readable sample: id, type, prompt, prediction, reference, score, correct."""
        text, records = context.data.text, []
        for prompts in context.data.prompts(indices, self.batch_size):
            batch = prompts.to(context.device)
            ids = context.model.generate(batch, stop_ids=text.stop_ids, max_new_tokens=self.max_new_tokens)
            predictions = text.tokenizer.batch_decode(ids, skip_special_tokens=True)
            for sample, prediction in zip(batch.samples, predictions, strict=True):
                score = self.scorer(prediction, sample)
                records.append(
                    {
                        "id": sample.id,
                        "type": sample.meta.get("type"),
                        "prompt": "".join(piece.get("text", "") for piece in sample.messages[-2]["content"]),
                        "prediction": prediction.strip(),
                        "reference": references(sample)[0],
                        "score": score,
                        "correct": score == 1,
                    }
                )
        return records


def mean_scores(records: Sequence[dict[str, Any]], scorer: Scorer) -> dict[str, float]:
    """The mean score over all records, and per type; empty if there are no records."""
    if not records:
        return {}
    by_type: dict[str, list[float]] = defaultdict(list)
    for record in records:
        by_type[record["type"]].append(record["score"])
    result = {scorer.name: sum(record["score"] for record in records) / len(records)}
    for kind, scores in sorted(by_type.items(), key=str):
        if kind:
            result[f"{scorer.name_by_type}/{files.escape_controls(kind)}"] = sum(scores) / len(scores)
    return result


def write_samples(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records]
    with files.create(path) as file:
        file.writelines(lines)
