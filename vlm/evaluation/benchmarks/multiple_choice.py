"""Multiple-choice questions about images: by the letter of the answer, or by the likelihood of letters or options."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from PIL import Image

from vlm.evaluation.benchmarks.base import Benchmark, Question, Record, Sums, kinds, ratio, types
from vlm.evaluation.benchmarks.choice_files import SHOWN, Item, Layout, layout_of, read_items
from vlm.evaluation.scorers.letter import LETTERS, Letter, read_letter
from vlm.ranges import Name
from vlm.schema import Content, Message

NUMBERED = re.compile(r"<image (\d+)>")  # where the text of a question shows one of its images
BY_LETTER = "<image>\n{question}\nAnswer with the option's letter from the given choices directly."


class MultipleChoice(Benchmark):
    """Questions with two or more options.

    Args:
        path: a folder of ScienceQA or of MMMU, a .tsv file of MMBench, the .json file of SEED-Bench, or JSON lines.
        layout: None tells it by `path`.
        split: of ScienceQA (by default test) or MMMU (validation).
        images: folder of the images, by default where they are published: beside the file, `images` of ScienceQA,
            `SEED-Bench-image` of SEED-Bench.
        answer_by: `letter` generates an answer and reads a letter from it (see `read_letter`); `letter_likelihood`
            ranks the letters, `likelihood` the texts of the options by their mean log-likelihood per token. The prompt
            lists the options in the first two.
        circular: a question is asked with its options in every rotation, and counts only if all are right. None is
            true for MMBench, unless `answer_by=likelihood`, in which the options have no order.
        only: all questions, or those with or without an image, as in ScienceQA's IMG.
    """

    no_scores: ClassVar[tuple[str, ...]] = ("chance", "chance_single", "no_letter")
    source: ClassVar[str] = (
        "ScienceQA: https://github.com/lupantech/ScienceQA; MMBench: https://github.com/open-compass/MMBench; MMMU: "
        "https://huggingface.co/datasets/MMMU/MMMU; SEED-Bench: https://huggingface.co/datasets/AILab-CVC/SEED-Bench"
    )

    def __init__(
        self,
        *,
        path: Name,
        layout: Layout | None = None,
        split: Name | None = None,
        images: Name | None = None,
        answer_by: Literal["letter", "letter_likelihood", "likelihood"] = "letter",
        circular: bool | None = None,
        only: Literal["all", "with_image", "without_image"] = "all",
    ) -> None:
        self.scorer, self._answer_by = Letter(), answer_by
        self.method = "generate" if answer_by == "letter" else "rank"
        self.prompt = "<image>\n{question}" if answer_by == "likelihood" else BY_LETTER
        layout = layout or layout_of(path)
        items, self._open, self.num_left_out = read_items(path, layout=layout, split=split, images=images)
        by_letter = answer_by != "likelihood"
        self.circular = layout == "mmbench" and by_letter if circular is None else circular
        self.demonstrations = {"split": SHOWN[layout]} if layout in SHOWN else {}
        if answer_by == "likelihood":  # an option that is an image has no likelihood
            self.num_left_out += sum(_options_show_images(item) for item in items)
            items = [item for item in items if not _options_show_images(item)]
        wanted = {"all": (True, False), "with_image": (True,), "without_image": (False,)}[only]
        self.questions = [
            question for item in items if bool(item.images) in wanted for question in self._questions(item)
        ]
        self._asked = {question.id: question for question in self.questions}

    def _questions(self, item: Item) -> Iterator[Question]:
        """The question, and with `circular` each rotation of its options."""
        num = len(item.choices)
        for shift in range(num if self.circular else 1):
            options = (*item.choices[shift:], *item.choices[:shift])
            asked = [item.hint, item.question]
            if self._answer_by != "likelihood":
                asked += [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
            text = "\n".join(line for line in asked if line)
            yield Question(
                id=f"{item.id}#{shift}" if shift else item.id,
                text=text,
                references=() if item.answer is None else (LETTERS[(item.answer - shift) % num],),
                images=_shown_images(item, text),
                group=item.images[0] if item.images else item.id,
                type=item.type,
                choices=options if self._answer_by == "likelihood" else tuple(LETTERS[:num]),
                unit=item.id,
                meta={"options": json.dumps(options, ensure_ascii=False)},
            )

    def image(self, name: str) -> Image.Image:
        return self._open(name)

    def answer(self, question: Question) -> str:
        """The letter, or the text of the option where the texts are ranked."""
        letter = super().answer(question)
        return question.choices[LETTERS.index(letter)] if self._answer_by == "likelihood" else letter

    def messages(self, question: Question) -> list[Message]:
        """The user message; an image that the text shows by its number is there, the others come first."""
        text = self.ask(question)
        numbers = NUMBERED.findall(text)
        if not numbers:
            return super().messages(question)
        content: list[Content] = [{"type": "image"} for _ in range(len(question.images) - len(numbers))]
        text = text.replace("<image>\n", "", 1).replace("<image>", "", 1)
        for number, part in enumerate(NUMBERED.split(text)):
            if number % 2:
                content.append({"type": "image"})
            elif part:
                content.append({"type": "text", "text": part})
        return [Message(role="user", content=content)]

    def choose(self, question: Question, log_likelihoods: Sequence[tuple[float, int]]) -> str:
        """The best letter, with the text of its option where the texts were ranked."""
        best = super().choose(question, log_likelihoods)
        if self._answer_by != "likelihood":
            return best
        return f"{LETTERS[question.choices.index(best)]}. {best}"

    def sums(self, records: Sequence[Record]) -> dict[str, float]:
        """All rotations of a question count as one; it is left out where some could not be asked."""
        found = defaultdict(float, dict.fromkeys(("n", "score", "single", "chance", "chance_single", "no_letter"), 0.0))
        rotations: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            rotations[self._asked[record["id"]].unit].append(record)
        for asked in rotations.values():
            num = len(self._options(asked[0]))
            if len(asked) < (num if self.circular else 1):
                continue
            published = min(asked, key=lambda record: len(record["id"]))  # the order of the file
            for kind in kinds(published):
                found[f"n{kind}"] += 1
                found[f"score{kind}"] += all(record["score"] == 1 for record in asked)
            found["single"] += published["score"]
            found["chance"] += (1 / num) ** len(asked)
            found["chance_single"] += 1 / num
            found["no_letter"] += not read_letter(published["prediction"], self._options(published))
        return found

    def metrics(self, sums: Sums) -> dict[str, Any]:
        """Accuracy, over all questions and by type, what guessing reaches, and the ratio of answers without a letter.

        With `circular`, all rotations must be right; `accuracy_single` takes the order of the file alone.
        """
        names = {"accuracy": "score", "accuracy_single": "single", "chance": "chance", "chance_single": "chance_single"}
        result = {
            name: ratio(sums[of], sums["n"])
            for name, of in names.items()
            if self.circular or not name.endswith("single")
        }
        if self.method == "generate":
            result["no_letter"] = ratio(sums["no_letter"], sums["n"])
        return result | {f"accuracy{kind}": ratio(sums[f"score{kind}"], sums[f"n{kind}"]) for kind in types(sums)}

    def constants(self) -> list[str]:
        return list(LETTERS[: max(len(json.loads(q.meta["options"])) for q in self.questions)])

    def _options(self, record: Record) -> list[str]:
        options: list[str] = json.loads(self._asked[record["id"]].meta["options"])
        return options


def _options_show_images(item: Item) -> bool:
    return any(NUMBERED.search(choice) for choice in item.choices)


def _shown_images(item: Item, text: str) -> tuple[str, ...]:
    """The images in the order of the message. Raises ValueError where the text shows one that the question has not."""
    numbers = [int(number) for number in NUMBERED.findall(text)]
    if numbers and max(numbers) > len(item.images):
        raise ValueError(f"question '{item.id}' shows image {max(numbers)}, and it has {len(item.images)}; check it")
    others = [name for number, name in enumerate(item.images, start=1) if number not in numbers]
    return (*others, *(item.images[number - 1] for number in numbers))
