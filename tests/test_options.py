"""Values against annotations: the first that does not fit is named with its key and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from vlm.options import check_values
from vlm.ranges import Known, Length, Pattern, Range

Small = Annotated[int, Range(1, 64)]
Pair = Annotated[Sequence[Small], Length(2, 2)]
Rate = Annotated[float, Range(0, 1)] | dict[str, Annotated[float, Range(0, 1)]] | None
Part = Literal["encoder", "llm"]
Facts = Annotated[dict[str, Any], Known({"width": Small, "inner": Annotated[dict[str, Any], Known({"rate": Small})]})]


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (int, 10**400),
        (float, 3),
        (Small, 64),
        (Small | None, None),
        (Pair, [1, 64]),
        (Annotated[list[Small], Length(1)], [1]),
        (tuple[float, float], [0.5, 1]),
        (Rate, 0),
        (Rate, {"rest": 0.5}),
        (dict[Part, Rate], {"encoder": None, "llm": {"rest": 1}}),
        (str | Path, "a/b"),
        (Literal["a", "b", 3], 3),
        (Annotated[float, Range(above=0, below=1)], 0.5),
        (Annotated[str, Pattern(r"\d+", "12")], "7"),
        (dict[str, Any], {"anything": [1, "x", None]}),
        (list[list[int]], []),
        (Facts, {"width": 8, "other": [None, "x"]}),
    ],
)
def test_a_value_that_fits(hint: Any, value: Any) -> None:
    check_values("part", {"option": value}, {"option": hint})
    with pytest.raises(ValueError, match="must be something else"):
        check_values("part", {"option": value}, {"option": Literal["something else"]})


@pytest.mark.parametrize(
    ("hint", "value", "said"),
    [
        (Small, 0, "part.option=0 must be a whole number from 1 to 64"),
        (Small, 10**9, "part.option=1000000000 must be a whole number from 1 to 64"),
        (Small, 2.0, "part.option=2.0 must be a whole number from 1 to 64"),
        (Small, True, "part.option=true must be a whole number from 1 to 64"),
        (Small, None, "part.option=null must be a whole number from 1 to 64"),
        (Small | None, "x", "part.option='x' must be a whole number from 1 to 64 or null"),
        (float, float("nan"), "part.option=nan must be a number"),
        (Any, {"a": [1, float("inf")]}, "part.option.a[1]=inf must be finite"),
        (Annotated[int, Range(1)], 0, "part.option=0 must be a whole number at least 1"),
        (
            Annotated[float, Range(least=0, below=1)],
            1,
            "part.option=1 must be a number at least 0 and below 1",
        ),
        (Annotated[float, Range(above=0, most=1)], False, "part.option=false must be a number above 0 and at most 1"),
        (Pair, [1], "part.option=[1] must be a list with 2 entries, each entry a whole number from 1 to 64"),
        (Pair, [1, 65], "part.option[1]=65 must be a whole number from 1 to 64"),
        (tuple[float, float], [0.5], "part.option=[0.5] must be a list of 2, each entry a number"),
        (Rate, {"rest": -1}, "part.option.rest=-1 must be a number from 0 to 1"),
        (
            Rate,
            [],
            "part.option=[] must be a number from 0 to 1, a mapping, each value a number from 0 to 1 or null",
        ),
        (dict[Part, Rate], {"llm": {"rest": 2}}, "part.option.llm.rest=2 must be a number from 0 to 1"),
        (
            dict[Part, Rate],
            {"lm": 1},
            "there is no option part.option.lm; did you mean llm? choose one of encoder, llm",
        ),
        (str | Path | None, 5, "part.option=5 must be a path or null"),
        (Literal["a", "b"], [], "part.option=[] must be one of a, b"),
        (Literal[1, 2], True, "part.option=true must be one of 1, 2"),
        (Facts | None, {"width": 0}, "part.option.width=0 must be a whole number from 1 to 64"),
        (Facts | None, {"inner": {"rate": "x"}}, "part.option.inner.rate='x' must be a whole number from 1 to 64"),
        (Facts | None, {"other": float("nan")}, "part.option.other=nan must be finite"),
        (Facts | None, 3, "part.option=3 must be a mapping or null"),
        (bool, 1, "part.option=1 must be true or false"),
        (Annotated[str, Pattern(r"\d+", "12")], "x", "part.option='x' must be a text such as 12"),
        (Annotated[str, Length(1)], "", "part.option='' must be a text that is not empty"),
    ],
)
def test_a_value_that_does_not_fit(hint: Any, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        check_values("part", {"option": value}, {"option": hint})


def test_a_long_value_is_shortened() -> None:
    with pytest.raises(ValueError, match=r"^part\.option='x{80}…' \(1,000 characters\) must be a whole number$"):
        check_values("part", {"option": "x" * 1000}, {"option": int})
