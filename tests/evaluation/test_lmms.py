"""The model `vlm` of lmms-eval. Needs the extra `lmms`, in an environment of its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import vlm
from tests.helpers.benchmarks import COLORS, Squares
from tests.helpers.programs import LIVELY, QUICK, train

pytest.importorskip("lmms_eval", reason="the extra lmms is not installed")
from lmms_eval.models import get_model

from vlm.evaluation.lmms import VLM, cut, generation


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("lmms") / "run"
    options = [*LIVELY, "stage=instruct", "trainer.precision=32-true", "stage.lr.llm=0.05"]
    assert train(*QUICK, *options, f"run_dir={run}") == 0
    return run


def requests(model: VLM, options: Any) -> list[Any]:
    """A question about each square, as lmms-eval asks it."""
    model.task_dict = {"squares": {"test": list(COLORS)}}

    def visual(name: str) -> list[Any]:
        return [Squares().image(name)]

    return [SimpleNamespace(args=("Which color?", options, visual, i, "squares", "test")) for i in range(len(COLORS))]


def test_answers_are_those_of_vlm_load(run_dir: Path) -> None:
    model, trained = VLM(ckpt=str(run_dir), device="cpu", batch_size=2), vlm.load(run_dir, device="cpu")
    images = [Squares().image(name) for name in COLORS]
    asked = requests(model, {"max_new_tokens": 6, "temperature": 0, "until": ["\n\n"]})
    asked[1].args = (asked[1].args[0], {"max_new_tokens": 2}, *asked[1].args[2:])  # another batch
    expected = [
        trained.answer(image, "<image>\nWhich color?", max_new_tokens=length)
        for image, length in zip(images, (6, 2, 6), strict=True)
    ]
    assert model.generate_until(asked) == expected
    assert len(set(expected)) > 1
    found = [result.text for result in model.loglikelihood(requests(model, " red"))]
    likely = [trained.log_likelihood(image, "<image>\nWhich color?", "red") for image in images]
    assert found == [(each.nats, each.is_greedy) for each in likely]


def test_lmms_eval_finds_the_model_by_its_name() -> None:
    assert get_model("vlm") is VLM


def test_options_of_a_task() -> None:
    assert generation({"temperature": 0, "top_p": 1.0, "do_sample": False}) == {"max_new_tokens": 256}
    sampled = {"max_new_tokens": 4, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    assert generation({"max_new_tokens": 4, "temperature": 0.7, "top_p": 0.9, "num_beams": 1}) == sampled
    assert cut("a\n\nb.c", ["\n\n", "."]) == cut("a.b\n\n", ["\n\n", "."]) == "a"
    assert cut("a", None) == "a"


def test_a_task_with_other_media_is_refused(run_dir: Path) -> None:
    model = VLM(ckpt=str(run_dir), device="cpu")
    (asked, *_) = requests(model, {})
    asked.args = (*asked.args[:2], lambda _: ["a.mp4"], *asked.args[3:])
    with pytest.raises(ValueError, match="task squares shows a str, and the model vlm takes images alone"):
        model.generate_until([asked])
