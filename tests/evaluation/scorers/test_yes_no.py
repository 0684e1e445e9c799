"""Answers to yes-or-no questions by two rules; the cases were worked out by hand from the published scripts."""

from __future__ import annotations

import pytest

from vlm.evaluation.scorers.yes_no import Rule, YesNo
from vlm.schema import Sample


@pytest.mark.parametrize(
    ("answer", "pope", "mme"),
    [
        ("yes", "yes", "yes"),
        ("No", "no", "no"),
        ("no.", "no", "no"),
        ("NO", "yes", "no"),  # POPE's script knows "No" and "no" only
        ("n", "yes", "no"),
        ("Y.", "yes", "yes"),
        ("x", "yes", None),
        ("", "yes", None),
        ("There is no dog in the image.", "no", None),
        ("There is a dog. There is no cat.", "yes", None),
        ("It is not, I think", "no", None),
        ("No, there is", "no", "no"),
        ("Nothing", "yes", "no"),
        (" Yes, it is not a cat", "no", "yes"),
        ("Know", "yes", "no"),
        ("Eyes", "yes", "yes"),
    ],
)
def test_rules(answer: str, pope: str | None, mme: str | None) -> None:
    expected: dict[Rule, str | None] = {"pope": pope, "mme": mme}
    for rule, said in expected.items():
        for reference in ("yes", "no"):
            sample = Sample(id="a", images=[], messages=[], meta={"references": f'["{reference.title()}"]'})
            assert YesNo(rule=rule)(answer, sample) == (said == reference)
