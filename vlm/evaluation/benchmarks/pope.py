"""POPE: does the model see objects that are not there (Li et al. 2023, arXiv:2305.10355)?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from vlm.data.annotations import read_json
from vlm.evaluation.benchmarks.base import Question, Record, Sums, kinds, ratio, types
from vlm.evaluation.benchmarks.dataset_table import DatasetTable, table_at
from vlm.evaluation.benchmarks.published import Published, records_of, text_in
from vlm.evaluation.scorers.yes_no import YesNo
from vlm.ranges import Length, Name

Category = Literal["random", "popular", "adversarial"]


class Pope(Published):
    """Questions such as "Is there a dog in the image?", a third about objects drawn in each of three ways.

    Args:
        annotations: folder of coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json, or of the
            hub's dataset.
        images: folder of COCO's val2014 images; the dataset has them itself.
        split: of the dataset, where it has several.
        categories: which of these files are asked, None for all; each is a type.
    """

    source: ClassVar[str] = "https://github.com/RUCAIBox/POPE (output/coco)"
    no_scores: ClassVar[tuple[str, ...]] = ("yes_ratio",)
    prompt = "<image>\n{question}\nAnswer the question using a single word or phrase."

    def __init__(
        self,
        *,
        annotations: Name,
        images: Name | None = None,
        split: Name | None = None,
        categories: Annotated[list[Category], Length(1)] | None = None,
    ) -> None:
        table = table_at(annotations, split=split, image_id="image_source")
        super().__init__(images=images, table=table)
        self.scorer = YesNo(rule="pope")
        wanted = categories or get_args(Category)
        if table is not None:
            self.questions = [question for question in _rows(table) if question.type in wanted]
            return
        folder = self._folder(annotations, option="annotations", holds="coco_pope_random.json and the like")
        self.questions = [question for category in wanted for question in self._read(folder, category)]

    def _read(self, folder: Path, category: Category) -> Iterator[Question]:
        file = self._file(folder / f"coco_pope_{category}.json", option="annotations")
        for where, record, problem in records_of(file, read_json(file)):
            if problem:
                raise ValueError(f"{where} {problem}; correct it")
            yield _question({**record, "category": category}, where, answer="label", text="text")

    def sums(self, records: Sequence[Record]) -> dict[str, float]:
        """Questions, correct answers, questions whose answer is yes, answers that say yes, and those that are right."""
        found: dict[str, float] = defaultdict(float)
        for record in records:
            is_yes = record["references"] == ["yes"]
            says_yes = is_yes == (record["score"] == 1)
            for kind in kinds(record):
                found[f"n{kind}"] += 1
                found[f"score{kind}"] += record["score"]
                found[f"is_yes{kind}"] += is_yes
                found[f"says_yes{kind}"] += says_yes
                found[f"both{kind}"] += is_yes and says_yes
        return found

    def metrics(self, sums: Sums) -> dict[str, Any]:
        """Accuracy, precision, recall and F1 of the answer yes, and the ratio of answers yes."""
        result = {}
        for kind in ("", *types(sums)):
            both, is_yes, says_yes = (sums[f"{name}{kind}"] for name in ("both", "is_yes", "says_yes"))
            result[f"accuracy{kind}"] = ratio(sums[f"score{kind}"], sums[f"n{kind}"])
            result[f"precision{kind}"] = ratio(both, says_yes)
            result[f"recall{kind}"] = ratio(both, is_yes)
            result[f"f1{kind}"] = ratio(2 * both, is_yes + says_yes)
            result[f"yes_ratio{kind}"] = ratio(says_yes, sums[f"n{kind}"])
        return result

    def constants(self) -> list[str]:
        return ["yes", "no"]


def _rows(table: DatasetTable) -> Iterator[Question]:
    for where, record, _ in table.records():
        yield _question(record, where, answer="answer", text="question")


def _question(record: Mapping[str, Any], where: str, *, answer: str, text: str) -> Question:
    label, category = text_in(record, answer, where=where).lower(), text_in(record, "category", where=where)
    if label not in ("yes", "no"):
        raise ValueError(f"{where} has the {answer} {label!r}, neither yes nor no; correct it")
    return Question(
        id=f"{category}/{text_in(record, 'question_id', where=where)}",
        text=text_in(record, text, where=where),
        references=(label,),
        images=(text_in(record, "image", where=where),),
        type=category,
    )
