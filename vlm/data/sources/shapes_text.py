"""Captions and questions about shapes, in English and Japanese.

Each prompt has its own phrasing, so there is exactly one right caption for a prompt and a scene. The wording is data:
another wording would change what earlier runs were trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Named(Protocol):
    @property
    def shape(self) -> str: ...
    @property
    def color(self) -> str: ...


JA_SHAPES = {"circle": "丸", "square": "四角", "triangle": "三角", "star": "星"}
JA_COLORS = {
    "red": "赤い",
    "orange": "オレンジの",
    "yellow": "黄色い",
    "green": "緑の",
    "blue": "青い",
    "purple": "紫の",
    "black": "黒い",
}
EN_CELLS = (("top left", "top", "top right"), ("left", "centre", "right"), ("bottom left", "bottom", "bottom right"))
JA_CELLS = (("左上", "上", "右上"), ("左", "中央", "右"), ("左下", "下", "右下"))


def _en(thing: Named) -> str:
    return f"{thing.color} {thing.shape}"


def _an(thing: Named) -> str:
    return f"an {_en(thing)}" if thing.color == "orange" else f"a {_en(thing)}"


def _ja(thing: Named) -> str:
    return JA_COLORS[thing.color] + JA_SHAPES[thing.shape]


def _en_list(things: Sequence[Named]) -> str:
    names = [_an(thing) for thing in things]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _en_sentence(things: Sequence[Named]) -> str:
    words = _en_list(things)
    return words[0].upper() + words[1:] + "."


def _ja_list(things: Sequence[Named]) -> str:
    return "、".join(_ja(thing) for thing in things)


PROMPTS: dict[str, tuple[str, ...]] = {
    "en": ("Describe the image.", "What does the picture show?", "List the objects."),
    "ja": ("画像を説明してください。", "何が描かれていますか。", "図形を並べてください。"),
}
CAPTIONS: dict[str, tuple[Callable[[Sequence[Any]], str], ...]] = {
    "en": (
        _en_sentence,
        lambda things: f"The picture shows {_en_list(things)}.",
        lambda things: ", ".join(_en(thing) for thing in things),
    ),
    "ja": (
        lambda things: f"{_ja_list(things)}があります。",
        lambda things: f"この絵には{_ja_list(things)}が描かれています。",
        _ja_list,
    ),
}


def _en_kind(shape: str | None, color: str | None, *, plural: bool) -> str:
    noun = shape or "shape"
    return f"{color + ' ' if color else ''}{noun}{'s' if plural else ''}"


def _ja_kind(shape: str | None, color: str | None) -> str:
    return f"{JA_COLORS[color] if color else ''}{JA_SHAPES[shape] if shape else '図形'}"


def _en_yes(answer: bool) -> str:
    return "yes" if answer else "no"


def _ja_yes(answer: bool) -> str:
    return "はい" if answer else "いいえ"


QUESTIONS: dict[str, dict[str, Callable[..., tuple[str, str]]]] = {
    "en": {
        "count": lambda s, c, n: (f"How many {_en_kind(s, c, plural=True)} are there?", str(n)),
        "existence": lambda s, c, a: (
            f"Is there {'an' if c == 'orange' else 'a'} {_en_kind(s, c, plural=False)}?",
            _en_yes(a),
        ),
        "colour": lambda s, c: (f"What colour is the {s}?", c),
        "position": lambda s, c, cell: (f"Where is the {c} {s}?", EN_CELLS[cell[0]][cell[1]]),
        "comparison": lambda a, b, answer: (f"Are there more {a}s than {b}s?", _en_yes(answer)),
        "relation": lambda a, way, b, answer: (
            f"Is the {a[1]} {a[0]} {'left of' if way == 'left' else 'above'} the {b[1]} {b[0]}?",
            _en_yes(answer),
        ),
    },
    "ja": {
        "count": lambda s, c, n: (f"{_ja_kind(s, c)}はいくつありますか。", str(n)),
        "existence": lambda s, c, a: (f"{_ja_kind(s, c)}はありますか。", _ja_yes(a)),
        "colour": lambda s, c: (f"{JA_SHAPES[s]}は何色ですか。", JA_COLORS[c].rstrip("いの")),
        "position": lambda s, c, cell: (f"{_ja_kind(s, c)}はどこにありますか。", JA_CELLS[cell[0]][cell[1]]),
        "comparison": lambda a, b, answer: (
            f"{JA_SHAPES[a]}は{JA_SHAPES[b]}より多いですか。",
            _ja_yes(answer),
        ),
        "relation": lambda a, way, b, answer: (
            f"{_ja_kind(*a)}は{_ja_kind(*b)}より{'左' if way == 'left' else '上'}にありますか。",
            _ja_yes(answer),
        ),
    },
}
