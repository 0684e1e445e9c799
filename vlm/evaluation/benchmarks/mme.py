"""MME: two yes-or-no questions about each image, in 14 tasks (Fu et al. 2023, arXiv:2306.13394)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from vlm.data.annotations import text_of
from vlm.evaluation.benchmarks.base import Question, Record, Sums, ratio
from vlm.evaluation.benchmarks.dataset_table import DatasetTable, table_at
from vlm.evaluation.benchmarks.published import Published, text_in
from vlm.evaluation.scorers.yes_no import YesNo
from vlm.ranges import Length, Name

Perception = Literal[
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"
]
Cognition = Literal["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
GROUPS: dict[str, tuple[str, ...]] = {"perception": get_args(Perception), "cognition": get_args(Cognition)}
TASKS = [task for tasks in GROUPS.values() for task in tasks]
SUFFIXES = (".jpg", ".png", ".jpeg")


class Mme(Published):
    """A folder for each task, with images and text files side by side or in images/ and questions_answers_YN/.

    The score of a task is its accuracy plus the ratio of images both of whose questions are answered correctly, each in
    percent; `perception` and `cognition` are the sums over their tasks.

    Args:
        root: folder of the tasks' folders, or of the hub's dataset.
        split: of the dataset, where it has several.
        tasks: which of them are asked, None for all; each is a type.
    """

    source: ClassVar[str] = (
        "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation (MME_Benchmark)"
    )
    prompt = "<image>\n{question}\nAnswer the question using a single word or phrase."

    def __init__(
        self,
        *,
        root: Name,
        split: Name | None = None,
        tasks: Annotated[list[Perception | Cognition], Length(1)] | None = None,
    ) -> None:
        table = table_at(root, split=split, image_id="question_id")
        super().__init__(images=None if table else root, option="root", table=table)
        self.scorer = YesNo(rule="mme")
        read = self._read if table is None else partial(_rows, table)
        self.questions = [question for task in tasks or TASKS for question in read(task)]

    @property
    def headline(self) -> str:
        return (
            "perception" if any(question.type in GROUPS["perception"] for question in self.questions) else "cognition"
        )

    def _read(self, task: str) -> Iterator[Question]:
        folder = self._folder(self._images / task, option="root", holds=f"the folder {task}")
        apart = (folder / "questions_answers_YN").is_dir()
        files = sorted((folder / "questions_answers_YN" if apart else folder).glob("*.txt"))
        if not files:
            raise ValueError(f"'{folder}' has no questions (*.txt); {self.source} has them")
        for file in files:
            image = _image_of(file, folder / "images" if apart else folder)
            lines = [line for line in text_of(file).splitlines() if line.strip()]
            if len(lines) != 2:
                raise ValueError(f"'{file}' has {len(lines)} questions where 2 are published; get the file again")
            for number, line in enumerate(lines, start=1):
                text, _, answer = line.rpartition("\t")
                if answer.strip().lower() not in ("yes", "no"):
                    raise ValueError(f"'{file}' line {number} does not end in a tab and Yes or No; get the file again")
                yield Question(
                    id=f"{task}/{file.stem}/{number}",
                    text=text.strip(),
                    references=(answer.strip().lower(),),
                    images=(str(image.relative_to(self._images)),),
                    unit=f"{task}/{file.stem}",
                    type=task,
                )

    def sums(self, records: Sequence[Record]) -> dict[str, float]:
        """Of the questions about one image: their number, correct answers, whether both are there, and both correct."""
        found: dict[str, float] = defaultdict(float)
        both = len(records) == 2
        for name in ("", f"/{records[0]['type']}"):
            found[f"n{name}"] = float(len(records))
            found[f"score{name}"] = sum(record["score"] for record in records)
            found[f"pairs{name}"] = float(both)
            found[f"plus{name}"] = float(both and found[f"score{name}"] == 2)
        return found

    def metrics(self, sums: Sums) -> dict[str, Any]:
        """The sums over perception and cognition, accuracies, and the score of each task."""
        scores = {
            task: 100
            * (ratio(sums[f"score/{task}"], sums[f"n/{task}"]) + ratio(sums[f"plus/{task}"], sums[f"pairs/{task}"]))
            for task in TASKS
            if f"n/{task}" in sums
        }
        totals = {
            group: sum(scores[task] for task in tasks if task in scores)
            for group, tasks in GROUPS.items()
            if scores.keys() & set(tasks)
        }
        accuracies = {
            "accuracy": ratio(sums["score"], sums["n"]),
            "accuracy_plus": ratio(sums["plus"], sums["pairs"]),
        }
        return totals | accuracies | {f"score/{task}": score for task, score in scores.items()}

    def num_questions(self, metric: str, sums: Sums) -> int | None:
        if metric in GROUPS:
            return int(sum(sums.get(f"n/{task}", 0) for task in GROUPS[metric]))
        return super().num_questions(metric, sums)

    def constants(self) -> list[str]:
        return ["yes", "no"]


def _rows(table: DatasetTable, task: str) -> Iterator[Question]:
    """The questions of a task in the dataset of the hub, whose `question_id` names the image."""
    pairs: dict[str, int] = Counter()
    for where, record, _ in table.records():
        if record.get("category") != task:
            continue
        image = text_in(record, "question_id", where=where)
        pairs[image] += 1
        answer = text_in(record, "answer", where=where).lower().rstrip(".")
        if answer not in ("yes", "no"):
            raise ValueError(f"{where} has the answer {answer!r}, neither yes nor no; get the dataset again")
        yield Question(
            id=f"{image}/{pairs[image]}",
            text=text_in(record, "question", where=where),
            references=(answer,),
            images=(text_in(record, "image", where=where),),
            unit=image,
            type=task,
        )
    if not pairs:
        raise ValueError(f"the dataset has no questions of the task {task}; get it again, or set data.tasks=")
    if others := [image for image, num in pairs.items() if num != 2]:
        raise ValueError(f"image '{others[0]}' has {pairs[others[0]]} questions where 2 are published; get it again")


def _image_of(file: Path, folder: Path) -> Path:
    """The image with the name of a file of questions."""
    found = [path for suffix in SUFFIXES if (path := folder / f"{file.stem}{suffix}").is_file()]
    if not found:
        raise ValueError(f"there is no image '{folder / file.stem}.jpg' (or .png) for '{file}'; get it again")
    return found[0]
