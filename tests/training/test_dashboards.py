"""Names of a run in a dashboard."""

from __future__ import annotations

from vlm.training.dashboards import names
from vlm.training.run import name_loggers

CHOICES = {
    "stage": "align",
    "encoder": "tiny",
    "connector": "mlp",
    "llm": "x" * 70,
    "experiment": None,
    "debug": "fast",
}
PARTS = ["encoder", "connector", "llm"]


def test_a_run_of_its_own_is_named_after_stage_and_parts() -> None:
    found = names(CHOICES, PARTS, job=None, sweep=None)
    assert (found["name"], found["group"]) == (f"align tiny-mlp-{'x' * 70}", None)
    assert found["tags"] == ["stage=align", "encoder=tiny", "connector=mlp", f"llm={'x' * 60}"]


def test_a_model_without_parts_to_choose_gives_its_own_name() -> None:
    assert (
        names({"stage": "pairs", "model": "single_stream"}, ["all"], job=None, sweep=None)["name"]
        == "pairs single_stream"
    )


def test_a_job_of_a_sweep_is_named_after_both() -> None:
    found = names(CHOICES, PARTS, job="connector=mlp,seed=1", sweep="2026-11-26_12-00-00")
    assert (found["name"], found["group"]) == ("connector=mlp,seed=1", "2026-11-26_12-00-00")


def test_names_that_the_user_gives_stand_and_a_resumed_run_keeps_its_own() -> None:
    loggers = {"wandb": {"id": None, "name": "mine", "group": None, "tags": None}, "csv": {"name": "csv"}}
    found = names(CHOICES, PARTS, job=None, sweep="sweep")
    name_loggers(loggers, step=0, names=found)
    started = {name: dict(options) for name, options in loggers.items()}
    assert started["wandb"] == {"id": started["wandb"]["id"], "name": "mine", "group": "sweep", "tags": found["tags"]}
    assert started["csv"] == {"name": "csv"}
    name_loggers(loggers, step=3, names=names(CHOICES, PARTS, job=None, sweep="another"))
    assert loggers == started
