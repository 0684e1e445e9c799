"""Scores of generated answers to validation prompts, beside what the best answers without the image get."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from vlm import files
from vlm.evaluation.base import Context, Evaluator
from vlm.evaluation.intervals import wilson
from vlm.evaluation.scorers.base import Scorer, references
from vlm.evaluation.without_image import Asked, given_question
from vlm.models.base import Generates
from vlm.ranges import BatchSize, Range, Samples
from vlm.schema import Sample

MaxNewTokens = Annotated[int, Range(1, 65_536)]
MAX_QUESTIONS, MAX_BYTES = 4, 2**28  # of `few_questions`
MAX_CONSTANTS = 100  # references that are tried as the constant answer


class Answers(Evaluator):
    """`val/<score>`, the mean score of generated answers, and `val/<score>/<type>` if the source has types.

    In a mixture, a sample without a type has the name of its source as its type.

    Beside each of them are `val/num_answers`, the number of answers; `val/<score>_low` and `val/<score>_high`, Wilson's
    95 % interval; `val/<score>_constant`, the score of the best constant answer, i.e. what a model gets that ignores
    image and question; and `val/<score>_no_image`, what a model can get that ignores the image alone (see
    `vlm.evaluation.without_image`).

    Args:
        scorer: scores one answer.
        num_samples: number of validation samples, evenly spread over the split; None is all.
        batch_size: prompts per batch.
        max_new_tokens: largest number of tokens of an answer.
        at: `end` of the run, or every `validation` too, which shows when each type of question is learned.
    """

    needs: ClassVar[tuple[type, ...]] = (Generates,)

    def __init__(
        self,
        *,
        scorer: Scorer,
        num_samples: Samples | None = 256,
        batch_size: BatchSize = 32,
        max_new_tokens: MaxNewTokens = 64,
        at: Literal["validation", "end"] = "end",
    ) -> None:
        self.scorer, self.at = scorer, at
        self.num_samples, self.batch_size, self.max_new_tokens = num_samples, batch_size, max_new_tokens

    def finish(self, context: Context) -> dict[str, float]:
        indices = context.data.val_indices(self.num_samples)
        with context.autocast():
            samples, self.samples = self.answered(context, indices)  # the same on every rank
        metrics = mean_scores(self.samples, self.scorer) | scores_without_image(samples, self.scorer)
        return {f"val/{name}": value for name, value in metrics.items()}

    def answered(self, context: Context, indices: Sequence[int]) -> tuple[list[Sample], list[dict[str, Any]]]:
        """The readable samples, and a record of each: id, type, prompt, prediction, reference, score, correct."""
        text, samples, records = context.data.text, [], []
        for prompts in context.data.prompts(indices, self.batch_size):
            batch = prompts.to(context.device)
            ids = context.model.generate(batch, stop_ids=text.stop_ids, max_new_tokens=self.max_new_tokens)
            predictions = text.tokenizer.batch_decode(ids, skip_special_tokens=True)
            samples += batch.samples
            for sample, prediction in zip(batch.samples, predictions, strict=True):
                score = self.scorer(prediction, sample)
                records.append(
                    {
                        "id": sample.id,
                        "type": _type(sample),
                        "prompt": _question(sample),
                        "prediction": prediction.strip(),
                        "reference": references(sample)[0],
                        "score": score,
                        "correct": score == 1,
                    }
                )
        return samples, records


def mean_scores(records: Sequence[dict[str, Any]], scorer: Scorer) -> dict[str, float]:
    """The mean score with its interval and the number of answers, over all records and per type; empty without any."""
    result: dict[str, float] = {}
    for kind, numbers in _groups([record["type"] for record in records]).items():
        mean = sum(records[number]["score"] for number in numbers) / len(numbers)
        result[_name(scorer, kind)] = mean
        result[_name(scorer, kind, "_low")], result[_name(scorer, kind, "_high")] = wilson(mean, len(numbers))
        result[f"num_answers{kind}"] = len(numbers)
    return result


def scores_without_image(samples: Sequence[Sample], scorer: Scorer) -> dict[str, float]:
    """The best mean scores of one answer to all, and of answers without the image, over all samples and per type.

    The constant answers that are tried are the references. Where they are more than `MAX_CONSTANTS` different texts, as
    captions are, only the most frequent ones are tried.
    """
    groups = _groups([_type(sample) for sample in samples])
    constants = {kind: _best_constant([samples[n] for n in numbers], scorer) for kind, numbers in groups.items()}
    guesses = given_question([_asked(sample) for sample in samples])
    by_question = [scorer(guess, sample) for guess, sample in zip(guesses, samples, strict=True)]
    by_type = [0.0] * len(samples)
    for kind, numbers in groups.items():  # all samples come first, and types replace them
        for number, score in zip(numbers, constants[kind], strict=True):
            by_type[number] = score
    result: dict[str, float] = {}
    for kind, numbers in groups.items():
        constant = sum(constants[kind])
        best = max(constant, *(sum(scores[number] for number in numbers) for scores in (by_question, by_type)))
        result[_name(scorer, kind, "_constant")] = constant / len(numbers)
        result[_name(scorer, kind, "_no_image")] = best / len(numbers)
    return result


def _best_constant(samples: Sequence[Sample], scorer: Scorer) -> list[float]:
    """The scores of the answer that scores best if it is given to all samples."""
    found = Counter(answer for sample in samples for answer in references(sample))
    tried = (answer for answer, _ in found.most_common(MAX_CONSTANTS))
    return max(([scorer(answer, sample) for sample in samples] for answer in tried), key=sum)


def _asked(sample: Sample) -> Asked:
    return Asked(id=sample.id, text=_question(sample), type=_type(sample), references=references(sample))


def _type(sample: Sample) -> str | None:
    """The type of its question; where it has none, the source of a mixture."""
    return sample.meta.get("type") or sample.meta.get("source")


def _question(sample: Sample) -> str:
    """The text of the last user message."""
    return "".join(piece.get("text", "") for piece in sample.messages[-2]["content"])


def _groups(types: Sequence[str | None]) -> dict[str, list[int]]:
    """The indices of all items under the empty text, and those of each type under `/<type>`."""
    groups: dict[str, list[int]] = {"": [*range(len(types))]} if types else {}
    for number, type_ in sorted(enumerate(types), key=lambda pair: str(pair[1])):
        if type_:
            groups.setdefault(f"/{files.escape_controls(type_)}", []).append(number)
    return groups


def _name(scorer: Scorer, kind: str, suffix: str = "") -> str:
    return f"{scorer.name_by_type if kind else scorer.name}{suffix}{kind}"


def few_questions(path: Path) -> list[str]:
    """The questions of samples.jsonl, the most frequent first, if they are few; else none."""
    if not path.is_file():
        return []
    lines = files.read(path, max_bytes=MAX_BYTES).decode(errors="replace").splitlines()
    found = Counter(str(json.loads(line).get("prompt", "")) for line in lines)
    is_few = len(found) <= MAX_QUESTIONS and found.total() >= 2 * len(found)
    return [question for question, _ in found.most_common() if question] if is_few else []


def write_samples(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records]
    with files.create(path) as file:
        file.writelines(lines)
