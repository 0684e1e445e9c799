"""Language without images: nats per token of answers, and choices by likelihood."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from vlm.evaluation.benchmarks.text import Text
from vlm.evaluation.harness import figures, records
from vlm.evaluation.respondent import Answer


def lines(folder: Path, *found: dict[str, Any]) -> str:
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in found))
    return str(file)


def metrics(benchmark: Text, likelihoods: list[list[tuple[float, int]]]) -> dict[str, float]:
    found = {
        index: Answer(index, prediction=benchmark.choose(benchmark.questions[index], each), log_likelihoods=each)
        for index, each in enumerate(likelihoods)
    }
    result = figures(benchmark, records(benchmark, found))
    return {name: metric["value"] for name, metric in result["metrics"].items()}


def test_nats_per_token_over_all_answers(tmp_path: Path) -> None:
    turns = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user", "assistant")]
    turns[2]["loss"] = False
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    benchmark = Text(annotations=lines(tmp_path, {"id": "x", "messages": turns}, {"id": "y", "messages": talk}))
    assert [(q.id, q.choices) for q in benchmark.questions] == [("x#4", ("a",)), ("y#1", ("Hello",))]
    assert [m["role"] for m in benchmark.messages(benchmark.questions[0])] == ["system", "user", "assistant", "user"]
    found = metrics(benchmark, [[(-3.0, 2)], [(-1.0, 6)]])
    assert found == {"nats_per_token": 0.5, "perplexity": pytest.approx(math.exp(0.5), abs=1e-6)}


def test_the_default_is_the_replay_of_this_project() -> None:
    questions = Text().questions
    assert len(questions) == 68
    assert questions[0].text == "How does a refrigerator keep food cold?"


def test_choices_of_arc_and_hellaswag_and_their_chance(tmp_path: Path) -> None:
    file = lines(
        tmp_path,
        {"question": "Q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2", "type": "easy"},
        {"ctx": "C", "endings": ["p", "q", "r", "s"], "label": "0", "type": "hard"},
    )
    benchmark = Text(annotations=file)
    assert [q.references for q in benchmark.questions] == [("y",), ("p",)]
    found = metrics(benchmark, [[(-4.0, 2), (-1.5, 1)], [(-1.0, 1), (-3.0, 4), (-9.0, 1), (-9.0, 1)]])
    assert found == {"accuracy": 0.5, "chance": 0.375, "accuracy/easy": 1, "accuracy/hard": 0}


def test_images_are_refused(tmp_path: Path) -> None:
    file = lines(tmp_path, {"question": "Q", "choices": ["a", "b"], "answer": 0, "image": "a.png"})
    with pytest.raises(ValueError, match=r"'texts.jsonl:1' in .* has images; ask it by benchmark=multiple_choice"):
        Text(annotations=file)
