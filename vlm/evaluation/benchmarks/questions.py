"""Questions of one's own, with or without answers: a model answers them, and only those with an answer are scored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm.data.annotations import Record, existing_file, existing_folder, read_json, read_jsonl, to_record
from vlm.data.conversations import RecordReader
from vlm.data.image_names import open_image
from vlm.data.record_keys import PAIRS, TURN_KEYS, Malformed, is_empty
from vlm.evaluation.benchmarks.of_source import OfSource
from vlm.evaluation.scorers.base import Scorer
from vlm.evaluation.scorers.exact_match import ExactMatch
from vlm.ranges import Name
from vlm.schema import Sample, Source

LINES = (".jsonl", ".ndjson")  # suffixes of JSON lines
NO_ANSWER = "-"  # where a record has none; it is not shown to the model


class Questions(OfSource):
    """The questions of a JSON file or JSON lines: records as of data=instruct, of which the last answer may be missing.

    A file with a single object is one question. `images` is the folder of the images, by default that of the file.
    Raises ValueError for a record that cannot be read.
    """

    def __init__(
        self,
        *,
        annotations: Name,
        images: Name | None = None,
        scorer: Scorer | None = None,
    ) -> None:
        file = existing_file(annotations, option="annotations")
        root = file.parent if images is None else existing_folder(images, option="images")
        super().__init__(source=_File(file, images=root), scorer=scorer or ExactMatch(), max_new_tokens=64)


class _File(Source):
    def __init__(self, file: Path, *, images: Path) -> None:
        self._images = images
        self._samples: list[tuple[Sample, list[str]]] = []
        for location, fields, problem in records_of(file):
            try:
                if problem:
                    raise Malformed(problem)
                has_answer, answered = with_answer(fields)
                messages, names = RecordReader().conversation(answered)
            except Malformed as error:
                raise ValueError(f"the question '{location}' {error}") from error
            meta = {} if has_answer else {"references": json.dumps([])}
            name = str(fields.get("id", location))
            self._samples.append((Sample(id=name, images=[], messages=messages, meta=meta), names))

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        sample, names = self._samples[index]
        return replace(sample, images=[open_image(name, root=self._images) for name in names])

    def outline(self, index: int) -> Sample:
        return self._samples[index][0]


def records_of(file: Path) -> list[Record]:
    """The records of a JSON file or JSON lines; a single object is one record."""
    found = list(read_jsonl(file)) if file.suffix.lower() in LINES else read_json(file)
    return [to_record(file.name, found)] if isinstance(found, dict) else found


def num_unanswered(file: Path) -> int:
    """How many questions of a file have no answer; 0 for a file of another kind."""
    if file.suffix.lower() not in (".json", *LINES) or not file.is_file():
        return 0
    return sum(not with_answer(record.fields)[0] for record in records_of(file))


def with_answer(record: Mapping[str, Any]) -> tuple[bool, Mapping[str, Any]]:
    """Whether a record has its last answer, and the record with `NO_ANSWER` where it has not."""
    for key in TURN_KEYS:
        turns: Any = record.get(key)
        last = turns[-1] if isinstance(turns, list) and turns else None
        if isinstance(last, dict) and last.get("role", last.get("from")) in ("user", "human"):
            return False, {**record, key: [*turns, {"role": "assistant", "content": NO_ANSWER}]}
    for question, answer in PAIRS:
        if not is_empty(record.get(question)) and is_empty(record.get(answer)):
            return False, {**record, answer: NO_ANSWER}
    return True, record
