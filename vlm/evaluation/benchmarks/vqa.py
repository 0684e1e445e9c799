"""VQAv2 (Goyal et al. 2017, arXiv:1612.00837) and benchmarks with its accuracy: OK-VQA, TextVQA, VizWiz."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from vlm.data.annotations import Record, read_json
from vlm.data.record_keys import as_text
from vlm.evaluation.benchmarks.base import Question
from vlm.evaluation.benchmarks.dataset_table import table_at
from vlm.evaluation.benchmarks.published import Published, document_of, records_of, text_in
from vlm.evaluation.scorers.base import Scorer
from vlm.evaluation.scorers.vqa_accuracy import VqaAccuracy, normalize
from vlm.ranges import Name

NUM_CONSTANTS = 10  # answers that are tried as the best constant one; VQAv2 has 214,354 questions in val


class Vqa(Published):
    """Open questions with the answers of ten people.

    The form of the file of questions tells the benchmark: an object with `questions` (VQAv2 and OK-VQA, whose answers
    are in a second file), an object with `data` (TextVQA), or a list (VizWiz). A dataset of the hub has its images and
    answers itself. Without answers, they are not scored.

    Args:
        questions: v2_OpenEnded_mscoco_val2014_questions.json, TextVQA_0.5.1_val.json, or VizWiz's val.json;
            or the folder of a dataset of the hub.
        images: folder of COCO's val2014 images, of TextVQA's train_images (also for its val), or of VizWiz's val.
        annotations: v2_mscoco_val2014_annotations.json, or OK-VQA's; null for TextVQA, VizWiz and the hub's datasets.
        split: of the dataset, where it has several.
        types: `answer_type` or `question_type`, where the file has it.
    """

    source: ClassVar[str] = "https://visualqa.org/download.html (or okvqa.allenai.org, textvqa.org, vizwiz.org)"
    prompt = "<image>\n{question}\nAnswer the question using a single word or phrase."

    def __init__(
        self,
        *,
        questions: Name,
        images: Name | None = None,
        annotations: Name | None = None,
        split: Name | None = None,
        types: Literal["answer_type", "question_type"] = "answer_type",
        scorer: Scorer | None = None,
    ) -> None:
        table = table_at(questions, split=split, image_id="image_id")
        super().__init__(images=images, table=table)
        self.scorer = scorer or VqaAccuracy()
        if table is not None:
            self.questions = [_of_row(record, types) for record in table.records()]
            return
        file = self._file(questions, option="questions")
        document = read_json(file)
        if isinstance(document, dict) and "questions" in document:
            answers = {} if annotations is None else self._answers(self._file(annotations, option="annotations"))
            found = _of_vqa(file, document, answers, types)
        else:
            if annotations is not None:
                raise ValueError(f"'{file}' has its own answers; set data.annotations=null")
            data = document.get("data") if isinstance(document, dict) else document
            found = (_of_record(record, types) for record in records_of(file, data))
        self.questions = list(found)

    def _answers(self, file: Path) -> dict[str, Record]:
        """The annotations by the id of their question."""
        records = records_of(file, document_of(file).get("annotations"))
        return {text_in(record.fields, "question_id", where=record.location): record for record in records}

    def answer(self, question: Question) -> str:
        """The most frequent answer; of equally frequent ones, the first."""
        return Counter(question.references).most_common(1)[0][0]

    def constants(self) -> list[str]:
        """The answers that the most people gave to the questions."""
        counts = Counter(normalize(answer) for question in self.questions for answer in question.references)
        return [answer for answer, _ in counts.most_common(NUM_CONSTANTS)]


def _of_vqa(file: Path, document: Mapping[str, Any], answers: Mapping[str, Record], types: str) -> Iterator[Question]:
    subset = text_in(document, "data_subtype", where=file.name)
    for where, record, _ in records_of(file, document["questions"]):
        number, image = (text_in(record, key, where=where) for key in ("question_id", "image_id"))
        if answers and number not in answers:
            raise ValueError(
                f"{where} has the question_id {number}, which the {len(answers):,} annotations do not have; "
                "give the annotations of the same split"
            )
        annotation = answers.get(number)
        yield Question(
            id=number,
            text=text_in(record, "question", where=where),
            references=() if annotation is None else _references(annotation.fields, annotation.location),
            images=(f"COCO_{subset}_{image:0>12}.jpg",),
            type=None if annotation is None else as_text(annotation.fields.get(types)),
        )


def _of_record(record: Record, types: str) -> Question:
    """A question of TextVQA, which names its image `image_id`, or of VizWiz, which asks one question an image."""
    where, fields = record.location, record.fields
    image = f"{text_in(fields, 'image_id', where=where)}.jpg" if "image_id" in fields else ""
    image = image or text_in(fields, "image", where=where)
    return Question(
        id=text_in(fields, "question_id", where=where) if "question_id" in fields else image,
        text=text_in(fields, "question", where=where),
        references=_references(fields, where) if "answers" in fields else (),
        images=(image,),
        type=as_text(fields.get(types)),
    )


def _of_row(record: Record, types: str) -> Question:
    """A question of a dataset of the hub; VizWiz has the type of its answers as `category`."""
    where, fields, _ = record
    return Question(
        id=text_in(fields, "question_id", where=where),
        text=text_in(fields, "question", where=where),
        references=_references(fields, where) if fields.get("answers") else (),
        images=(text_in(fields, "image", where=where),),
        type=as_text(fields.get(types, fields.get("category") if types == "answer_type" else None)),
    )


def _references(fields: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The answers of all people: texts, or objects that hold a text."""
    listed = fields.get("answers")
    answers = [
        as_text(each.get("answer") if isinstance(each, dict) else each)
        for each in (listed if isinstance(listed, list) else [])
    ]
    if not answers or None in answers:
        raise ValueError(f"{where} has no list of answers; check that the file is the published one")
    return tuple(answer for answer in answers if answer is not None)
