"""`plan.memory_gb`: the search for options that fit, by cases computed by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from tests.helpers import programs
from vlm import config
from vlm.launch import probe
from vlm.launch.entry import CONF
from vlm.launch.plan import _print_suggestions, add_suggestions
from vlm.launch.suggest import Suggestion, Way, changes, for_gpu, suggest, with_options

TINY = ["llm=tiny", "encoder=tiny", "trainer=cpu"]
RECOMPUTE, NF4 = {"llm.gradient_checkpointing": True}, {"llm.quantization": "nf4"}
LORA = {"stage.llm": "lora", "stage.lr.llm": 2e-4}


def settings(*overrides: str) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        return config.plain(compose("train", [*TINY, "run_dir=x", *overrides]))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], [{}, RECOMPUTE, NF4, {**NF4, **RECOMPUTE}]),
        (["stage=instruct", "llm.gradient_checkpointing=true"], [{}, NF4]),
        (["llm.quantization=nf4"], [{}, RECOMPUTE]),
        (
            ["stage=full"],
            [{}, RECOMPUTE, LORA, LORA | RECOMPUTE, LORA | NF4, LORA | NF4 | RECOMPUTE],
        ),
    ],
)
def test_the_order_of_preference(overrides: list[str], expected: list[dict[str, Any]]) -> None:
    assert list(changes(settings(*overrides))) == expected


def test_every_way_is_a_valid_config() -> None:
    full = {**settings("stage=full"), "llm": {**settings()["llm"], "weights": "meta"}}
    for options in changes(full):
        config.check(with_options(full, options))


def of(held: float, row: float, update: float = 0.0) -> Callable[[dict[str, Any]], Way]:
    """A measurement in which recomputing leaves a quarter of a row, and LoRA and NF4 half of what is held each."""

    def measure(options: dict[str, Any]) -> Way:
        smaller = 0.5 ** (("stage.llm" in options) + ("llm.quantization" in options))
        return Way(options, held * smaller, row / (4 if "llm.gradient_checkpointing" in options else 1), update)

    return measure


def found(ways: list[dict[str, Any]], measure: Any, memory_gb: float, **options: Any) -> Any:
    given = {"rows": 8, "accumulate_grad_batches": 2, **options}
    return suggest(ways, measure, memory_gb=memory_gb, **given)


WAYS = [{}, RECOMPUTE, LORA, LORA | RECOMPUTE]


def test_what_fits_as_it_is_ends_the_search() -> None:
    measured: list[dict[str, Any]] = []

    def measure(options: dict[str, Any]) -> Way:
        measured.append(options)
        return of(10, 1)(options)

    assert found(WAYS, measure, 20)[0] == [Suggestion((), 18.0)]  # 10 + 8 · 1, exactly nine tenths of 20
    assert measured == [{}]


def test_smaller_batches_come_before_recomputing() -> None:
    fitting, _ = found(WAYS, of(10, 2), 20)
    assert fitting == [
        Suggestion(("data.batch_size=4", "trainer.accumulate_grad_batches=4"), 18.0),  # 10 + 4 · 2
        Suggestion(("llm.gradient_checkpointing=true",), 14.0),  # 10 + 8 · 0.5, all rows: nothing further
    ]


def test_a_way_that_holds_too_much_is_skipped() -> None:
    fitting, _ = found(WAYS, of(30, 2), 20)
    lora = ("stage.llm=lora", "stage.lr.llm=0.0002")
    assert fitting == [
        Suggestion((*lora, "data.batch_size=1", "trainer.accumulate_grad_batches=16"), 17.0),
        Suggestion(
            (*lora, "llm.gradient_checkpointing=true", "data.batch_size=4", "trainer.accumulate_grad_batches=4"), 17.0
        ),
    ]


def test_where_nothing_fits_the_smallest_is_known() -> None:
    fitting, smallest = found(WAYS, of(30, 2, update=3.0), 10)
    assert fitting == []
    assert smallest.memory_gb == 15 + 3.0  # the update needs more than the rows
    assert smallest.options[:2] == ("stage.llm=lora", "stage.lr.llm=0.0002")


def test_batches_of_tokens_hold_one_row_at_least() -> None:
    tokens = {"rows": 8192, "rows_option": "data.batch_tokens", "least_rows": 1500, "accumulate_grad_batches": 1}
    fitting, _ = found([{}], of(10, 0.001), 15, **tokens)
    assert fitting == [Suggestion(("data.batch_tokens=2048", "trainer.accumulate_grad_batches=4"), 12.048)]
    assert found([{}], of(10, 0.001), 13, **tokens)[0] == []  # 1,024 tokens would fit


def test_a_gpu_has_another_attention_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    changed = for_gpu(settings("llm.attention=eager"))
    assert (changed["trainer"]["precision"], changed["llm"]["attention"]) == ("bf16-mixed", "eager")
    changed = for_gpu(settings("trainer.precision=32-true"))
    assert (changed["trainer"]["precision"], changed["llm"]["attention"]) == ("32-true", "sdpa")


def test_without_a_probe_nothing_can_be_suggested(capfd: pytest.CaptureFixture[str]) -> None:
    assert programs.train(*TINY, "plan.memory_gb=24", "plan.probe=false") == 2
    assert "plan.memory_gb=24 needs a probe of the activations; leave out plan.probe=false" in capfd.readouterr().err


def test_what_the_command_says_of_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    smallest = {"options": ("llm.quantization=nf4", "data.batch_size=1"), "memory_gb": 31.5}
    found = {"gpu_gb": 24, "precision": "bf16-mixed", "fitting": [], "smallest": smallest}
    _print_suggestions({"suggestions": found, "tokens_of_longest_sample": 1200})
    printed = capfd.readouterr().out
    assert "the smallest way takes at least 31.50 GB, with llm.quantization=nf4 data.batch_size=1; choose a" in printed
    assert "with rows of 1,200 tokens (the longest sample read)" in printed


def test_a_probe_that_fails_gives_no_suggestions(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("its process was killed by signal 9")

    monkeypatch.setattr(probe, "run_apart", fail)
    cfg = settings()
    report = {"tokens_of_longest_sample": 90, "tokens_per_sample": 80.0}
    add_suggestions(report, {**cfg, "llm": {**cfg["llm"], "weights": "meta"}}, 24)
    _print_suggestions(report)
    said = "There are no suggestions, because the probe failed: its process was killed by signal 9"
    assert said in capfd.readouterr().out


@pytest.mark.slow
def test_suggestions_of_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of a model that holds 1.3 MB, with activations of some more."""
    arguments = [*TINY, "stage=full", "encoder.image_size=32", f"plan.json={tmp_path / 'plan.json'}", "plan=true"]
    assert programs.train(*arguments, "plan.memory_gb=0.02", f"run_dir={tmp_path / 'run'}") == 0
    plan = json.loads((tmp_path / "plan.json").read_text())["suggestions"]
    assert (plan["gpu_gb"], plan["precision"]) == (0.02, "bf16-mixed")
    assert all(0 < each["memory_gb"] <= 0.018 for each in plan["fitting"])
    printed = capfd.readouterr().out
    assert "Options that fit into a GPU of 0.02 GB, of which 10% stay free" in printed
    first = plan["fitting"][0]["options"]
    assert " ".join(first) in printed
    assert first[0].startswith("data.batch_size=")
