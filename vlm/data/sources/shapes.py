"""Synthetic images without files: colored shapes on a 3x3 grid, with captions or questions.

Sample i of a split is a pure function of (seed, split, i). A scene (the objects and their cells) belongs to the split
that its hash gives, so train and validation have no scene in common.
"""

from __future__ import annotations

import random
from typing import Annotated, Literal

from vlm.data.sources.shapes_questions import Asked, ask, more_positions, wanted, wanted_in_turn
from vlm.data.sources.shapes_scene import COLORS, SHAPES, Thing, draw, split_of
from vlm.data.sources.shapes_text import CAPTIONS, PROMPTS, QUESTIONS
from vlm.ranges import Range, Samples, Seed
from vlm.schema import Message, Sample, Source, Split

TASKS = ("caption", "instruct", "mixed")
LANGUAGES = tuple(PROMPTS)


class Shapes(Source):
    """Scenes of 1 to `max_objects` objects in different cells: `num_train` for training and `num_val` for validation.

    `task` is `caption` (all objects in reading order), `instruct` (questions with short answers), or `mixed` (one of
    the two at random). A training conversation has up to `num_questions` questions about its scene: one of each type,
    and beyond these the positions of other objects, which take the most questions to learn. Validation has one, because
    an earlier answer could reveal the next. `Sample.meta["type"]` is `caption` or the type of the question. All
    answers to a type of question are equally frequent, whatever its words (see `shapes_questions`).
    """

    def __init__(
        self,
        *,
        split: Split,
        task: Literal["caption", "instruct", "mixed"] = "caption",
        language: Literal["en", "ja"] = "en",
        seed: Seed = 0,
        image_size: Annotated[int, Range(8, 4_096)] = 224,
        max_objects: Annotated[int, Range(1, 9)] = 4,
        num_questions: Annotated[int, Range(1, 100)] = 3,
        num_train: Samples = 1_000_000,
        num_val: Samples = 256,
    ) -> None:
        if task not in TASKS:
            raise ValueError(f"data.task={task!r} is not known; choose one of {', '.join(TASKS)}")
        if language not in LANGUAGES:
            raise ValueError(f"data.language={language!r} is not known to shapes; choose one of {', '.join(LANGUAGES)}")
        if not 1 <= max_objects <= 9:
            raise ValueError(f"data.max_objects={max_objects} does not fit the 9 cells; choose 1 to 9")
        self.split, self.task, self.language, self.seed = split, task, language, seed
        self.image_size, self.max_objects = image_size, max_objects
        self.num_questions = num_questions if split == "train" else 1
        self.num_samples = num_train if split == "train" else num_val

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.num_samples:
            raise IndexError(index)
        name = f"shapes/{self.seed}/{self.split}/{index}"
        rng = random.Random(name)  # a string is hashed by SHA-512, so the seed is the same on every machine
        task = self.task
        if task != "instruct":
            things = self._scene(rng)
            image = draw(things, rng=rng, size=self.image_size)
            task = task if task == "caption" else rng.choice(("caption", "instruct"))
        if task == "caption":
            phrasing = rng.randrange(len(CAPTIONS[self.language]))
            turns = [(PROMPTS[self.language][phrasing], CAPTIONS[self.language][phrasing](things))]
            kind = "caption"
        else:
            things, asked = self._questions(index, rng)
            image = draw(things, rng=rng, size=self.image_size)
            turns = [QUESTIONS[self.language][type_](*words, answer) for type_, words, answer in asked]
            kind = asked[-1].type
        return Sample(id=name, images=[image], messages=_messages(turns), meta={"type": kind})

    def _scene(self, rng: random.Random) -> list[Thing]:
        """The scene of a caption: drawn until one belongs to this split."""
        while True:
            cells = rng.sample(range(9), rng.randint(1, self.max_objects))
            things = sorted(
                Thing(row=cell // 3, column=cell % 3, shape=rng.choice(SHAPES), color=rng.choice(list(COLORS)))
                for cell in cells
            )
            if split_of(things) == self.split:
                return things

    def _questions(self, index: int, rng: random.Random) -> tuple[list[Thing], list[Asked]]:
        if self.num_questions == 1:
            answers = wanted_in_turn(index, name=f"shapes/{self.seed}/{self.split}", max_objects=self.max_objects)
        else:
            answers = wanted(rng, max_objects=self.max_objects, num_questions=self.num_questions)
        things, asked = ask(answers, rng, split=self.split, max_objects=self.max_objects)
        if self.num_questions > len(QUESTIONS[self.language]):
            asked += more_positions(things, asked, rng)[: self.num_questions - len(asked)]
        return things, asked


def _messages(turns: list[tuple[str, str]]) -> list[Message]:
    messages: list[Message] = []
    for question, answer in turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    messages[0]["content"].insert(0, {"type": "image"})
    return messages
