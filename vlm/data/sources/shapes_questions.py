"""Questions about shapes whose answers cannot be guessed: the answer is drawn first, and then a scene that has it.

The words and the answer of a question are drawn independently, each uniformly. All answers of a type are therefore
equally frequent, whatever the words.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vlm.data.sources.shapes_scene import COLORS, SHAPES, Thing, split_of
from vlm.schema import Split

CELLS = tuple((row, column) for row in range(3) for column in range(3))
PAIRS = tuple((shape, color) for shape in SHAPES for color in COLORS)
COUNTED = (*PAIRS, *((shape, None) for shape in SHAPES), *((None, color) for color in COLORS))
MAX_COUNT = 4  # the highest answer to "How many"
NUM_TRIES = 200  # scenes that are drawn for the same questions

Words = tuple[Any, ...]  # what the words of a question name, as `shapes_text.QUESTIONS` takes them


class Part(NamedTuple):
    """What is known of an object before its scene is drawn."""

    shape: str | None = None
    color: str | None = None
    cell: tuple[int, int] | None = None


class Asked(NamedTuple):
    """A question about a scene: its type, what its words name, and the answer."""

    type: str
    words: Words
    answer: Any


class QuestionType(NamedTuple):
    """A type of question.

    Attributes:
        answers: all answers; they are equally frequent.
        example: words for an answer, drawn uniformly, and objects of a scene that is likely to have it.
        fitting: the words of all questions that have this answer in a scene.
    """

    answers: Sequence[Any]
    example: Callable[[Any, random.Random], tuple[Words, list[Part]]]
    fitting: Callable[[list[Thing], Any], list[Words]]


def wanted(rng: random.Random, *, max_objects: int, num_questions: int) -> dict[str, Any]:
    """Different types of questions, drawn uniformly, each with an answer, drawn uniformly."""
    types = rng.sample(_possible(max_objects), min(num_questions, len(_possible(max_objects))))
    return {type_: rng.choice(_answers(type_, max_objects)) for type_ in types}


def wanted_in_turn(index: int, *, name: str, max_objects: int) -> dict[str, Any]:
    """The type and answer of a sample with one question: samples in a row have all types, and all answers, in turn.

    The order of each turn is random, by `name`. A few hundred questions are then balanced too, not only many.
    """

    def in_turn(number: int, values: Sequence[Any], what: str) -> Any:
        turn, place = divmod(number, len(values))
        return random.Random(f"{name}/{what}/{turn}").sample(values, len(values))[place]

    type_ = in_turn(index, _possible(max_objects), "types")
    return {type_: in_turn(index // len(_possible(max_objects)), _answers(type_, max_objects), type_)}


def ask(
    answers: Mapping[str, Any], rng: random.Random, *, split: Split, max_objects: int
) -> tuple[list[Thing], list[Asked]]:
    """A scene of a split, and a question about it of each type with the given answer.

    The words of one question are drawn first, then scenes until one has all answers; the other questions take words
    that fit the scene. Counting is this one question wherever it is asked, because objects drawn at random are hardly
    ever four of a kind. If no scene fits, another question is left out. Whether a scene fits does not depend on the
    answers of these other questions, so that they stay balanced.
    """
    first, *others = sorted(answers, key=lambda type_: type_ != "count")
    words, parts = TYPES[first].example(answers[first], rng)
    while True:
        for _ in range(NUM_TRIES):
            things = _scene(parts, max_objects, rng)
            if words not in TYPES[first].fitting(things, answers[first]) or split_of(things) != split:
                continue
            chosen = {first: words}
            for type_ in others:
                if not (fitting := TYPES[type_].fitting(things, answers[type_])):
                    break
                chosen[type_] = rng.choice(fitting)
            else:
                return things, [Asked(type_, chosen[type_], answers[type_]) for type_ in answers if type_ in chosen]
        if others:
            others.pop()
        else:  # of one or two objects, a split may have no scene for these words
            words, parts = TYPES[first].example(answers[first], rng)


def more_positions(things: list[Thing], asked: Sequence[Asked], rng: random.Random) -> list[Asked]:
    """The positions of the objects that can be named and were not asked about, in random order.

    All cells are equally frequent answers, because scenes do not prefer one.
    """
    named = [question.words for question in asked if question.type == "position"]
    others = [Asked("position", (t.shape, t.color), (t.row, t.column)) for t in _unique(things)]
    rng.shuffle(others)
    return [question for question in others if question.words not in named]


def _possible(max_objects: int) -> list[str]:
    return [type_ for type_ in TYPES if type_ != "relation" or max_objects > 1]


def _answers(type_: str, max_objects: int) -> Sequence[Any]:
    return range(min(MAX_COUNT, max_objects) + 1) if type_ == "count" else TYPES[type_].answers


def _scene(parts: Sequence[Part], max_objects: int, rng: random.Random) -> list[Thing]:
    """A scene with these objects and, up to `max_objects`, others; what is not known of an object is random."""
    num = rng.randint(max(1, len(parts)), max_objects)
    taken = {part.cell for part in parts}
    cells = rng.sample([cell for cell in CELLS if cell not in taken], num - len(taken - {None}))
    colors = list(COLORS)
    return sorted(
        Thing(*(part.cell or cells.pop()), part.shape or rng.choice(SHAPES), part.color or rng.choice(colors))
        for part in (*parts, *[Part()] * (num - len(parts)))
    )


def _count_example(number: int, rng: random.Random) -> tuple[Words, list[Part]]:
    shape, color = rng.choice(PAIRS)
    words = rng.choice(((shape, color), (shape, None), (None, color)))
    return words, [Part(*words)] * number


def _count_fitting(things: list[Thing], number: int) -> list[Words]:
    counts: Counter[Words] = Counter(
        words for t in things for words in ((t.shape, t.color), (t.shape, None), (None, t.color))
    )
    return [words for words in COUNTED if counts[words] == number]


def _existence_example(answer: bool, rng: random.Random) -> tuple[Words, list[Part]]:
    words = rng.choice(PAIRS)
    return words, [Part(*words)] if answer else []


def _existence_fitting(things: list[Thing], answer: bool) -> list[Words]:
    found = {(t.shape, t.color) for t in things}
    return [pair for pair in PAIRS if (pair in found) == answer]


def _color_example(color: str, rng: random.Random) -> tuple[Words, list[Part]]:
    shape = rng.choice(SHAPES)
    return (shape,), [Part(shape, color)]


def _color_fitting(things: list[Thing], color: str) -> list[Words]:
    return [(t.shape,) for t in things if t.color == color and sum(t.shape == other.shape for other in things) == 1]


def _position_example(cell: tuple[int, int], rng: random.Random) -> tuple[Words, list[Part]]:
    words = rng.choice(PAIRS)
    return words, [Part(*words, cell)]


def _position_fitting(things: list[Thing], cell: tuple[int, int]) -> list[Words]:
    return [(t.shape, t.color) for t in _unique(things) if (t.row, t.column) == cell]


def _comparison_example(answer: bool, rng: random.Random) -> tuple[Words, list[Part]]:
    words = tuple(rng.sample(SHAPES, 2))
    return words, [Part(words[0] if answer else words[1])]


def _comparison_fitting(things: list[Thing], answer: bool) -> list[Words]:
    """Shapes of which there are more, or fewer; equal numbers are not asked about."""
    counts = {shape: sum(t.shape == shape for t in things) for shape in SHAPES}
    pairs = [(a, b) for a in SHAPES for b in SHAPES if counts[a] != counts[b]]
    return [(a, b) for a, b in pairs if (counts[a] > counts[b]) == answer]


def _relation_example(answer: bool, rng: random.Random) -> tuple[Words, list[Part]]:
    first, second = rng.sample(PAIRS, 2)
    way = rng.choice(WAYS)
    while (found := _is_there(way, *(cells := rng.sample(CELLS, 2)))) is None:
        pass
    one, other = cells if found == answer else reversed(cells)
    return (first, way, second), [Part(*first, one), Part(*second, other)]


def _relation_fitting(things: list[Thing], answer: bool) -> list[Words]:
    single = _unique(things)
    return [
        ((one.shape, one.color), way, (other.shape, other.color))
        for one in single
        for other in single
        for way in WAYS
        if _is_there(way, (one.row, one.column), (other.row, other.column)) is answer
    ]


WAYS = ("left", "above")


def _is_there(way: str, cell: tuple[int, int], other: tuple[int, int]) -> bool | None:
    """Whether a cell is left of, or above, another one; None in the same column or row."""
    axis = 1 if way == "left" else 0
    return None if cell[axis] == other[axis] else cell[axis] < other[axis]


def _unique(things: list[Thing]) -> list[Thing]:
    """The objects whose pair of shape and color is unique in the scene."""
    return [t for t in things if sum((t.shape, t.color) == (o.shape, o.color) for o in things) == 1]


TYPES: dict[str, QuestionType] = {
    "count": QuestionType(range(MAX_COUNT + 1), _count_example, _count_fitting),
    "existence": QuestionType((True, False), _existence_example, _existence_fitting),
    "colour": QuestionType(tuple(COLORS), _color_example, _color_fitting),
    "position": QuestionType(CELLS, _position_example, _position_fitting),
    "comparison": QuestionType((True, False), _comparison_example, _comparison_fitting),
    "relation": QuestionType((True, False), _relation_example, _relation_fitting),
}
