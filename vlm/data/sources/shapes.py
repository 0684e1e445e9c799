"""Synthetic images without files: colored shapes on a 3x3 grid, with captions or questions.

Sample i of a split is a pure function of (seed, split, i). A scene (the objects and their cells) belongs to the split
that its hash gives, so train and validation have no scene in common.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from PIL import Image, ImageDraw

from vlm.data.sources.shapes_text import CAPTIONS, PROMPTS, QUESTIONS
from vlm.ranges import Range, Samples, Seed
from vlm.schema import Message, Sample, Source, Split

SHAPES = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 0),
    "yellow": (245, 215, 0),
    "green": (34, 139, 34),
    "blue": (31, 80, 214),
    "purple": (142, 36, 170),
    "black": (20, 20, 20),
}
BACKGROUND = (250, 250, 250)
VAL_ONE_IN = 10  # one scene in ten is held out
TASKS = ("caption", "instruct", "mixed")
LANGUAGES = tuple(PROMPTS)


@dataclass(frozen=True, order=True)
class Thing:
    """An object of a scene. Objects are sorted in reading order: by row of the grid, then by column."""

    row: int
    column: int
    shape: str
    color: str


class Shapes(Source):
    """Scenes of 1 to `max_objects` objects in different cells: `num_train` for training and `num_val` for validation.

    `task` is `caption` (all objects in reading order), `instruct` (questions with short answers), or `mixed` (one of
    the two at random). A training conversation has up to `num_questions` questions about its scene. Validation has one,
    because an earlier answer could reveal the next. `Sample.meta["type"]` is `caption` or the type of the question.
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
        things = self._scene(rng)
        image = draw(things, rng=rng, size=self.image_size)
        task = self.task if self.task != "mixed" else rng.choice(("caption", "instruct"))
        if task == "caption":
            phrasing = rng.randrange(len(CAPTIONS[self.language]))
            turns = [(PROMPTS[self.language][phrasing], CAPTIONS[self.language][phrasing](things))]
            kind = "caption"
        else:
            asked = ask(things, rng=rng, language=self.language, num_questions=self.num_questions)
            turns = [(question, answer) for _, question, answer in asked]
            kind = asked[-1][0]
        return Sample(id=name, images=[image], messages=_messages(turns), meta={"type": kind})

    def _scene(self, rng: random.Random) -> list[Thing]:
        """Draw scenes until one belongs to this split."""
        while True:
            cells = rng.sample(range(9), rng.randint(1, self.max_objects))
            things = sorted(
                Thing(row=cell // 3, column=cell % 3, shape=rng.choice(SHAPES), color=rng.choice(list(COLORS)))
                for cell in cells
            )
            if split_of(things) == self.split:
                return things


def split_of(things: list[Thing]) -> Split:
    """The split of a scene, for any seed."""
    # A fixed spelling, not repr(): a change of the class must not move scenes between the splits.
    spelled = [f"Thing(row={t.row}, column={t.column}, shape={t.shape!r}, colour={t.color!r})" for t in things]
    digest = hashlib.blake2b(f"[{', '.join(spelled)}]".encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "big") % VAL_ONE_IN == 0 else "train"


def draw(things: list[Thing], *, rng: random.Random, size: int) -> Image.Image:
    """Draw a scene. Each object has 60 to 85 % of its cell's size, at a random position inside the cell."""
    image = Image.new("RGB", (size, size), BACKGROUND)
    canvas = ImageDraw.Draw(image)
    cell = size / 3
    for thing in things:
        radius = cell / 2 * rng.uniform(0.6, 0.85)
        free = cell / 2 - radius
        x = (thing.column + 0.5) * cell + rng.uniform(-free, free)
        y = (thing.row + 0.5) * cell + rng.uniform(-free, free)
        color = COLORS[thing.color]
        if thing.shape == "circle":
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
        else:
            canvas.polygon([(x + radius * dx, y + radius * dy) for dx, dy in OUTLINES[thing.shape]], fill=color)
    return image


def _ring(corners: int, radii: tuple[float, ...]) -> list[tuple[float, float]]:
    """Corners around a center, the first one at the top; their distances alternate between `radii`."""
    angles = [2 * math.pi * i / corners for i in range(corners)]
    return [(radii[i % len(radii)] * math.sin(a), -radii[i % len(radii)] * math.cos(a)) for i, a in enumerate(angles)]


OUTLINES = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": _ring(3, (1.0,)),
    "star": _ring(10, (1.0, 0.42)),
}


def ask(things: list[Thing], *, rng: random.Random, language: str, num_questions: int) -> list[tuple[str, str, str]]:
    """Up to `num_questions` tuples (type, question, answer) about a scene, of different types drawn uniformly."""
    asked: list[tuple[str, str, str]] = []
    for kind in rng.sample(list(FACTS), len(FACTS)):
        fact = FACTS[kind](things, rng)
        if fact is not None and len(asked) < num_questions:
            asked.append((kind, *QUESTIONS[language][kind](*fact)))
    return asked


def _count(things: list[Thing], rng: random.Random) -> tuple | None:
    if rng.random() < 0.75:  # mostly about an object in the scene, because otherwise zero would be the best guess
        thing = rng.choice(things)
        shape, color = thing.shape, thing.color
    else:
        shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
    wanted = rng.choice(((shape, color), (shape, None), (None, color)))
    number = sum(wanted[0] in (None, t.shape) and wanted[1] in (None, t.color) for t in things)
    return *wanted, number


def _existence(things: list[Thing], rng: random.Random) -> tuple | None:
    pairs = {(t.shape, t.color) for t in things}
    if rng.random() < 0.5:
        return *rng.choice(sorted(pairs)), True
    absent = sorted({(shape, color) for shape in SHAPES for color in COLORS} - pairs)
    return *rng.choice(absent), False


def _color(things: list[Thing], rng: random.Random) -> tuple | None:
    single = [t for t in things if sum(t.shape == other.shape for other in things) == 1]
    if not single:
        return None
    thing = rng.choice(single)
    return thing.shape, thing.color


def _position(things: list[Thing], rng: random.Random) -> tuple | None:
    single = _unique(things)
    if not single:
        return None
    thing = rng.choice(single)
    return thing.shape, thing.color, thing.row, thing.column


def _comparison(things: list[Thing], rng: random.Random) -> tuple | None:
    counts = {shape: sum(t.shape == shape for t in things) for shape in SHAPES}
    more = [(a, b) for a in SHAPES for b in SHAPES if counts[a] > counts[b]]
    first, second = rng.choice(more) if more else rng.sample(SHAPES, 2)
    if rng.random() < 0.5:
        first, second = second, first
    return first, second, counts[first] > counts[second]


def _relation(things: list[Thing], rng: random.Random) -> tuple | None:
    single = _unique(things)
    if len(single) < 2:
        return None
    first, second = rng.sample(single, 2)
    ways = [
        (way, answer)
        for way, answer, differs in (
            ("left", first.column < second.column, first.column != second.column),
            ("above", first.row < second.row, first.row != second.row),
        )
        if differs
    ]
    way, answer = rng.choice(ways)
    return (first.shape, first.color), way, (second.shape, second.color), answer


def _unique(things: list[Thing]) -> list[Thing]:
    """The objects whose pair of shape and color is unique in the scene."""
    return [t for t in things if sum((t.shape, t.color) == (o.shape, o.color) for o in things) == 1]


FACTS: dict[str, Callable[[list[Thing], random.Random], tuple | None]] = {
    "count": _count,
    "existence": _existence,
    "colour": _color,
    "position": _position,
    "comparison": _comparison,
    "relation": _relation,
}


def _messages(turns: list[tuple[str, str]]) -> list[Message]:
    messages: list[Message] = []
    for question, answer in turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    messages[0]["content"].insert(0, {"type": "image"})
    return messages
