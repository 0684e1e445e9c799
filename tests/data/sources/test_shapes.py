"""Shapes: the same sample for the same words, splits that share no scene, captions and answers that are true."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from itertools import chain, combinations
from typing import Any

import pytest

from vlm.data.sources.shapes import Shapes
from vlm.data.sources.shapes_scene import COLORS, SHAPES, Thing, split_of
from vlm.data.sources.shapes_text import EN_CELLS, JA_CELLS, JA_COLORS, JA_SHAPES, QUESTIONS
from vlm.schema import Sample

EN_PLACES, JA_PLACES = ([*chain.from_iterable(cells)] for cells in (EN_CELLS, JA_CELLS))
SHAPE_OF, COLOR_OF = ({word: name for name, word in words.items()} for words in (JA_SHAPES, JA_COLORS))
GOLDEN_CAPTIONS = "d9e55e0f54f18a04"  # of 16 samples of each split and language; the loss curves depend on them
GOLDEN = "63aacb41e5c5f00e"
GOLDEN_WORDS = {"en": "3357ad01cc34e5d1", "ja": "0fd79637a5c668be"}  # of 64 samples


def text(sample: Sample, index: int) -> str:
    return "".join(item.get("text", "") for item in sample.messages[index]["content"])


def turns(sample: Sample) -> list[tuple[str, str]]:
    return [(text(sample, i), text(sample, i + 1)) for i in range(0, len(sample.messages), 2)]


def digest(sample: Sample) -> str:
    words = "\n".join(f"{question}|{answer}" for question, answer in turns(sample))
    return hashlib.blake2b(sample.images[0].tobytes() + words.encode(), digest_size=8).hexdigest()


def scene(source: Shapes, index: int) -> list[Thing]:
    """The things of a sample: the first draw from its name."""
    rng = random.Random(f"shapes/{source.seed}/{source.split}/{index}")
    if source.task == "caption":
        return source._scene(rng)
    things, _ = source._questions(index, rng)
    return things


def test_golden_captions() -> None:
    found = hashlib.blake2b(digest_size=8)
    for split in ("train", "val"):
        for language in ("en", "ja"):
            source = Shapes(split=split, task="caption", seed=3, image_size=96, language=language)
            for index in range(16):
                found.update(digest(source[index]).encode())
    assert found.hexdigest() == GOLDEN_CAPTIONS


def test_golden_sample() -> None:
    assert digest(Shapes(split="train", task="mixed", seed=3, image_size=96)[7]) == GOLDEN


@pytest.mark.parametrize("language", GOLDEN_WORDS)
def test_golden_words(language: Any) -> None:
    source = Shapes(split="train", task="mixed", seed=3, image_size=30, language=language)
    words = repr([turns(source[index]) for index in range(64)])
    assert hashlib.blake2b(words.encode(), digest_size=8).hexdigest() == GOLDEN_WORDS[language]


def test_a_sample_is_a_function_of_seed_split_and_index() -> None:
    def make(**changes: object) -> Shapes:
        return Shapes(**{"split": "train", "task": "mixed", "image_size": 48, "seed": 1} | changes)

    one, other = make(), make()
    backwards = [digest(other[i]) for i in reversed(range(8))][::-1]
    assert [digest(one[i]) for i in range(8)] == backwards
    assert len(set(backwards)) == 8
    assert all(digest(make(seed=2)[i]) != backwards[i] for i in range(8))
    assert all(digest(make(split="val")[i]) != backwards[i] for i in range(8))
    assert [one[i].id for i in range(2)] == ["shapes/1/train/0", "shapes/1/train/1"]
    assert digest(make(num_train=9)[5]) == backwards[5]  # more data does not change what was there


def test_splits_share_no_scene_whatever_the_seed() -> None:
    train = {repr(scene(Shapes(split="train", seed=s), i)) for s in (0, 1) for i in range(2000)}
    val = {repr(scene(Shapes(split="val", seed=s), i)) for s in (0, 1) for i in range(1000)}
    assert not train & val
    assert all(split_of(scene(Shapes(split="val"), i)) == "val" for i in range(100))
    share = sum(split_of([Thing(0, 0, s, c), Thing(i, 1, t, c)]) == "val" for i in range(3) for s in SHAPES
                for t in SHAPES for c in COLORS) / (3 * 16 * 7)  # fmt: skip
    assert 0.05 < share < 0.15


@pytest.mark.parametrize("task", ["caption", "instruct"])
def test_scenes_are_as_promised(task: Any) -> None:
    source = Shapes(split="train", task=task)
    scenes = [scene(source, i) for i in range(1000)]
    assert Counter(map(len, scenes)).keys() == {1, 2, 3, 4}
    assert all(len({(t.row, t.column) for t in things}) == len(things) for things in scenes)
    assert {t.shape for things in scenes for t in things} == set(SHAPES)
    assert {t.color for things in scenes for t in things} == set(COLORS)
    assert {(t.row, t.column) for things in scenes for t in things} == {(r, c) for r in range(3) for c in range(3)}


def test_a_picture_shows_its_scene() -> None:
    source = Shapes(split="train", task="instruct", image_size=90)
    for index in range(30):
        image, things = source[index].images[0], scene(source, index)
        found = set()
        for row in range(3):
            for column in range(3):
                cell = image.crop((column * 30, row * 30, column * 30 + 30, row * 30 + 30))
                names = {name for name, rgb in COLORS.items() if rgb in {c for _, c in cell.getcolors(900)}}
                found |= {(row, column, name) for name in names}
        assert found == {(t.row, t.column, t.color) for t in things}


@pytest.mark.parametrize("language", ["en", "ja"])
def test_a_caption_names_every_thing_in_reading_order(language: str) -> None:
    source = Shapes(split="val", language=language, image_size=30)
    phrasings = set()
    for index in range(120):
        sample = source[index]
        ((prompt, caption),) = turns(sample)
        if language == "en":
            named = [(s, c) for c, s in re.findall(rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})", caption.lower())]
        else:
            pattern = rf"({'|'.join(COLOR_OF)})({'|'.join(SHAPE_OF)})"
            named = [(SHAPE_OF[s], COLOR_OF[c]) for c, s in re.findall(pattern, caption)]
        reading = sorted(scene(source, index), key=lambda t: 3 * t.row + t.column)
        assert named == [(t.shape, t.color) for t in reading], caption
        assert "a orange" not in caption.lower()
        phrasings.add(prompt)
        assert sample.meta["type"] == "caption"
    assert len(phrasings) == 3


def truth(question: str, things: list[Thing]) -> tuple[str, str]:
    """(type, right answer) of a question in either language, derived from its words alone."""
    japanese = not question.isascii()
    yes, no = ("はい", "いいえ") if japanese else ("yes", "no")
    shape_word = "|".join([*SHAPES, *SHAPE_OF])
    color_word = "|".join([*COLORS, *COLOR_OF])
    pair = rf"(?:({color_word}) ?)?({shape_word}|shape|図形)s?"

    def match(color: str | None, shape: str) -> list[Thing]:
        shape, color = SHAPE_OF.get(shape, shape), COLOR_OF.get(color or "", color)
        return [t for t in things if shape in (t.shape, "shape", "図形") and color in (t.color, None)]

    def only(*words: str) -> Thing:
        (thing,) = match(*words)  # a question about one thing must have one
        return thing

    if m := re.fullmatch(rf"How many {pair} are there\?|{pair}はいくつありますか。", question):
        return "count", str(len(match(*(m.groups()[2:] if japanese else m.groups()[:2]))))
    if m := re.fullmatch(rf"Is there an? {pair}\?|{pair}はありますか。", question):
        return "existence", yes if match(*(m.groups()[2:] if japanese else m.groups()[:2])) else no
    if m := re.fullmatch(rf"What colour is the ({shape_word})\?|({shape_word})は何色ですか。", question):
        color = only(None, m[1] or m[2]).color
        return "colour", JA_COLORS[color].removesuffix("い").removesuffix("の") if japanese else color
    if m := re.fullmatch(rf"Where is the {pair}\?|{pair}はどこにありますか。", question):
        thing = only(*(m.groups()[2:] if japanese else m.groups()[:2]))
        return "position", (JA_PLACES if japanese else EN_PLACES)[3 * thing.row + thing.column]
    if m := re.fullmatch(
        rf"Are there more ({shape_word})s than ({shape_word})s\?|({shape_word})は({shape_word})より多いですか。",
        question,
    ):
        a, b = m.groups()[2:] if japanese else m.groups()[:2]
        return "comparison", yes if len(match(None, a)) > len(match(None, b)) else no
    if m := re.fullmatch(rf"Is the {pair} (left of|above) the {pair}\?", question):
        a, b, way = only(m[1], m[2]), only(m[4], m[5]), m[3]
    elif m := re.fullmatch(rf"{pair}は{pair}より(左|上)にありますか。", question):
        a, b, way = only(m[1], m[2]), only(m[3], m[4]), {"左": "left of", "上": "above"}[m[5]]
    else:
        raise AssertionError(f"no reading of {question!r}")
    return "relation", yes if (a.column < b.column if way == "left of" else a.row < b.row) else no


@pytest.mark.parametrize("language", ["en", "ja"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_answers_are_true(language: str, split: str) -> None:
    source = Shapes(split=split, task="instruct", language=language, image_size=30, num_questions=3, num_val=300)
    seen = Counter()
    for index in range(300):
        sample, things = source[index], scene(source, index)
        asked = [truth(question, things) for question, _ in turns(sample)]
        assert [answer for _, answer in asked] == [answer for _, answer in turns(sample)], turns(sample)
        assert sample.meta["type"] == asked[-1][0]
        assert split_of(things) == split
        kinds = [kind for kind, _ in asked]
        assert len(set(kinds)) == len(kinds) <= (3 if split == "train" else 1)
        seen.update(kinds)
    assert seen.keys() == QUESTIONS[language].keys()


NUM_ANSWERS = {"count": 5, "existence": 2, "colour": 7, "position": 9, "comparison": 2, "relation": 2}


@pytest.fixture(scope="module")
def asked() -> dict[str, list[tuple[str, str, str]]]:
    """Of each split 10,000 or more questions: type, question, answer."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for split, num_scenes in (("train", 3_600), ("val", 10_000)):
        source = Shapes(split=split, task="instruct")
        found[split] = [
            (type_, *QUESTIONS["en"][type_](*words, answer))
            for number in range(num_scenes)
            for type_, words, answer in source._questions(number, random.Random(f"{split} {number}"))[1]
        ]
    return found


def guessed(fitted: list[tuple[str, str]], tried: list[tuple[str, str]], *, least: int = 20) -> int:
    """How many of the tried questions are answered by what was most frequent for their words in the fitted ones.

    The words are the whole question, one of them or two, whichever `least` or more fitted questions share and has the
    most frequent answer.
    """

    def features(question: str) -> list[tuple[str, ...]]:
        words = sorted(set(question.split()))
        return [(question,), *((word,) for word in words), *combinations(words, 2)]

    found: dict[tuple[str, ...], Counter] = {}
    for question, answer in fitted:
        for feature in features(question):
            found.setdefault(feature, Counter())[answer] += 1
    best = {
        feature: (number / answers.total(), answer)
        for feature, answers in found.items()
        if answers.total() >= least
        for answer, number in answers.most_common(1)
    }
    return sum(max(best[f] for f in features(question) if f in best)[1] == answer for question, answer in tried)


@pytest.mark.parametrize("split", ["train", "val"])
def test_no_answer_can_be_guessed_from_the_question(split: str, asked: dict[str, list[tuple[str, str, str]]]) -> None:
    assert len(asked[split]) >= 10_000
    for kind, num_answers in NUM_ANSWERS.items():
        expected = len(asked[split]) / len(NUM_ANSWERS)
        of_kind = [(question, answer) for type_, question, answer in asked[split] if type_ == kind]
        assert len(of_kind) == pytest.approx(expected, rel=0.1)
        assert len({answer for _, answer in of_kind}) == num_answers
        halves = of_kind[::2], of_kind[1::2]  # fitted on one, tried on the other
        right = (guessed(*halves) + guessed(*halves[::-1])) / len(of_kind)
        assert right < 1 / num_answers + 0.02, f"{kind}: the question gives {right:.1%} of the answers"


def test_a_few_hundred_held_out_questions_are_balanced() -> None:
    source = Shapes(split="val", task="instruct", image_size=30)
    assert len(source) == 256
    asked = [(sample.meta["type"], text(sample, 1)) for sample in map(source.__getitem__, range(256))]
    for kind, num in Counter(kind for kind, _ in asked).items():
        assert num in (42, 43)
        answers = Counter(answer for type_, answer in asked if type_ == kind)
        assert len(answers) == NUM_ANSWERS[kind]
        assert max(answers.values()) - min(answers.values()) <= 1
    order = [kind for kind, _ in asked]
    assert order[:6] != order[6:12]


def test_words_that_give_the_answer_are_found() -> None:
    """What the test above measures: half of the questions name red, and for these "1" is right."""
    questions = [("How many red stars?", "1"), ("How many blue stars?", "0"), ("How many blue stars?", "1")] * 40
    assert guessed(questions, questions) == 80
    assert guessed([("How many?", "1"), ("How many?", "0")] * 40, [("How many?", "0")] * 10) in (0, 10)


@pytest.mark.parametrize(("max_objects", "kinds", "counts"), [(1, 5, "01"), (2, 6, "012"), (9, 6, "01234")])
def test_questions_about_few_and_many_objects(max_objects: int, kinds: int, counts: str) -> None:
    source = Shapes(split="train", task="instruct", max_objects=max_objects, image_size=30, num_questions=1)
    samples = [source[index] for index in range(120)]
    assert len({sample.meta["type"] for sample in samples}) == kinds
    assert {text(sample, 1) for sample in samples if sample.meta["type"] == "count"} == set(counts)
    assert all(len(scene(source, index)) <= max_objects for index in range(120))


def test_a_conversation_has_as_many_questions_as_fit_a_scene() -> None:
    """Four red stars have no position of their own: then fewer questions are asked."""
    source = Shapes(split="train", task="instruct", image_size=30, num_questions=6)
    numbers = Counter(len(turns(source[index])) for index in range(100))
    assert max(numbers) == 6
    assert 1 <= min(numbers) < 6


def test_beyond_one_question_of_each_type_come_more_positions() -> None:
    source = Shapes(split="train", task="instruct", image_size=30, num_questions=12)
    found = [source._questions(number, random.Random(number)) for number in range(300)]
    positions = []
    for things, questions in found:
        cells = {words: cell for type_, words, cell in questions if type_ == "position"}
        assert len(cells) == sum(question.type == "position" for question in questions)  # none is asked twice
        alike = Counter((thing.shape, thing.color) for thing in things)
        assert cells.items() <= {((t.shape, t.color), (t.row, t.column)) for t in things}
        assert set(cells) == {named for named, number in alike.items() if number == 1}
        positions += [QUESTIONS["en"]["position"](*words, cell) for words, cell in cells.items()]
    assert len(positions) > 1.8 * len(found)
    halves = positions[::2], positions[1::2]
    assert (guessed(*halves) + guessed(*halves[::-1])) / len(positions) < 1 / 9 + 0.02
    seven = Shapes(split="train", task="instruct", image_size=30, num_questions=7)
    assert max(len(seven._questions(number, random.Random(number))[1]) for number in range(50)) == 7


def test_the_first_question_holds_the_image() -> None:
    sample = Shapes(split="train", task="instruct")[0]
    marks = [item["type"] == "image" for message in sample.messages for item in message["content"]]
    assert marks[0]
    assert sum(marks) == len(sample.images) == 1
    assert sample.images[0].size == (224, 224)


def test_mixed_holds_both() -> None:
    source = Shapes(split="val", task="mixed", image_size=30)
    share = sum(source[i].meta["type"] == "caption" for i in range(200)) / 200
    assert 0.35 < share < 0.65


def test_the_end_of_a_split() -> None:
    source = Shapes(split="val", num_val=4, image_size=30)
    assert len(source) == 4
    assert len(list(source)) == 4  # type: ignore[call-overload]
    for index in (4, -1):
        with pytest.raises(IndexError):
            source[index]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "poem"}, r"data.task='poem' is not known; choose one of caption, instruct, mixed"),
        ({"language": "fr"}, r"data.language='fr' is not known to shapes; choose one of en, ja"),
        ({"max_objects": 10}, r"data.max_objects=10 does not fit the 9 cells; choose 1 to 9"),
        ({"max_objects": 0}, r"data.max_objects=0 does not fit"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    make = getattr(Shapes.__init__, "__wrapped__", None)
    build = Shapes if make is None else lambda **o: make(object.__new__(Shapes), **o)  # without the type checker
    with pytest.raises(ValueError, match=message):
        build(split="train", **options)
