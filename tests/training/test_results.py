"""The tables at the end of a run: groups, units, the number of answers, cells that are cut."""

from __future__ import annotations

from typing import Any

from vlm.training import results, run

METRICS = {
    "train/loss": 0.5,
    "val/visual_rms": 1.0,
    "val/visual_gain": -0.0001,
    "val/lm_loss": 1.5,
    "val/loss": 1.5,
    "val/exact_match": 0.75,
    "val/exact_match_constant": 0.25,
    "val/exact_match_no_image": 0.375,
    "val/exact_match_low": 0.66823,
    "val/exact_match_high": 0.8169,
    "val/num_answers": 128,
    "val/accuracy/count": 0.5,
    "val/accuracy_constant/count": 0.4,
    "val/num_answers/count": 8,
    "val/num_too_long": 3,
    "text/loss": 2.0,
    "perf/step_seconds": 0.25,
    "time/fit_seconds": 60.0,
    "params/total": 1_000_000,
}


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line[0] == "│"]


def printed(metrics: dict[str, Any]) -> list[list[str]]:
    with run.CONSOLE.capture() as shown:
        results.print_metrics(metrics)
    return rows(shown.get())


def test_metrics_are_printed_in_groups_with_units() -> None:
    assert printed(METRICS) == [
        ["Validation", "", ""],
        ["val/loss", "1.500", "nats per token"],
        ["val/lm_loss", "1.500", "nats per token"],
        ["val/visual_gain", "0.000", "nats per token"],
        ["val/visual_rms", "1.000", "root mean square of the visual tokens"],
        ["val/exact_match", "0.750", "128 answers, 95 %: 0.668 to 0.817; best without image: 0.375"],
        ["val/accuracy/count", "0.500", "8 answers; best constant answer: 0.400"],
        ["val/num_too_long", "3", "samples"],
        ["Text without images", "", ""],
        ["text/loss", "2.000", "nats per token"],
        ["Training, last step", "", ""],
        ["train/loss", "0.500", "nats per token"],
        ["Time", "", ""],
        ["time/fit_seconds", "60.000", "seconds of training and of the validations in it"],
        ["Speed and memory", "", ""],
        ["perf/step_seconds", "0.250", "seconds per step, validation excluded"],
        ["Parameters", "", ""],
        ["params/total", "1,000,000", ""],
    ]


def test_the_losses_of_another_objective_have_no_unit() -> None:
    units = {name: unit for name, _, unit in printed({"val/match_loss": 1.0, "val/loss": 1.0, "text/loss": 1.0})}
    assert units["val/loss"] == units["val/match_loss"] == ""
    assert units["text/loss"] == "nats per token"


def test_a_long_answer_is_cut_after_three_lines() -> None:
    record = {"id": "a", "prompt": "What?", "prediction": "one two three\n" * 50, "reference": "x" * 500, "score": 0.5}
    with run.CONSOLE.capture() as shown:
        results.print_samples([record] * 8)
    title, *_ = shown.get().split("\n")
    assert title.strip() == "6 of 8 answers to validation samples"
    first, second, third = rows(shown.get())[:3]
    assert [first[0], first[1], first[2], first[4]] == ["a", "What?", "one two three", "0.50"]
    assert second[2] == "one two three"
    assert third[2] == "one two three…"
    assert third[3].startswith("xxx")
    assert third[3].endswith("x…")
    assert len(rows(shown.get())) == 3 * 6
