"""GQA: questions about scene graphs, answered by a word or two (Hudson and Manning 2019, arXiv:1902.09506)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from vlm.evaluation.benchmarks.base import Question
from vlm.evaluation.benchmarks.dataset_table import DatasetTable, table_at
from vlm.evaluation.benchmarks.published import Published, document_of, text_in
from vlm.evaluation.scorers.base import Scorer
from vlm.evaluation.scorers.exact_match import ExactMatch
from vlm.ranges import Name


class Gqa(Published):
    """The questions of one file, with their accuracy by the structure or the topic of a question.

    Args:
        annotations: testdev_balanced_questions.json, or another file of questions; test questions have no answers. Or
            the folder testdev_balanced_instructions of the hub's dataset.
        images: folder of GQA's images, <id>.jpg, or testdev_balanced_images of that dataset.
        split: of the dataset, where it has several.
        types: `structural` (choose, compare, logical, query, verify) or `semantic` (attr, cat, global, obj, rel).
    """

    source: ClassVar[str] = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
    prompt = "<image>\n{question}\nAnswer the question using a single word or phrase."

    def __init__(
        self,
        *,
        annotations: Name,
        images: Name | None = None,
        split: Name | None = None,
        types: Literal["structural", "semantic"] = "structural",
        scorer: Scorer | None = None,
    ) -> None:
        table = table_at(annotations, split=split, image_id="imageId")
        super().__init__(images=images, table=table)
        self.scorer = scorer or ExactMatch(loose=True)
        self.questions = list(self._read(annotations, types, table))

    def _read(self, annotations: str, types: str, table: DatasetTable | None) -> Iterator[Question]:
        if table is None:
            file = self._file(annotations, option="annotations")
            records: Any = ((f"{file.name}[{number}]", number, each) for number, each in document_of(file).items())
        else:
            records = ((where, text_in(each, "id", where=where), each) for where, each, _ in table.records())
        for where, number, record in records:
            if not isinstance(record, dict):
                raise ValueError(f"{where} is not an object; check that the file is the published one")
            kinds = record.get("types") or {}
            yield Question(
                id=number,
                text=text_in(record, "question", where=where),
                references=(text_in(record, "answer", where=where),) if "answer" in record else (),
                images=(record.get("image") or f"{text_in(record, 'imageId', where=where)}.jpg",),
                type=text_in(kinds, types, where=f"{where}[types]") if kinds else None,
            )
