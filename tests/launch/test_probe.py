"""The probe of `plan=true`: what it counts, how it extrapolates, and how a run is compared with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from torch import nn

from tests.helpers import programs
from vlm import config
from vlm.architecture import from_facts
from vlm.launch import probe
from vlm.launch.entry import CONF
from vlm.launch.probe import LiveBytes, Measured, fill, measure, predict
from vlm.llms import attention
from vlm.models.composed import Composed

TINY = ["llm=tiny", "encoder=tiny", "trainer=cpu", "trainer.precision=32-true", "run_dir=x"]
SMALL = ["encoder.image_size=32", "data.batch_size=2", "data.num_questions=1"]


def settings(*overrides: str) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        return config.plain(compose("train", [*TINY, *SMALL, *overrides]))


def counted(cfg: dict[str, Any], **options: Any) -> Measured:
    """One probe that times nothing, without the masks that attention keeps from earlier ones in this process."""
    attention._hidden.cache_clear()
    return measure(cfg, **{"num_timed": 0, **options})


def test_live_bytes_are_those_of_tensors_that_are_alive() -> None:
    before = torch.ones(1000)
    with LiveBytes() as live:
        kept = before + 1  # 4,000 bytes
        view = kept[10:].view(-1)  # no bytes of its own
        kept.mul_(2)
        del view
        large = kept.repeat(5)  # 20,000
        del large
        with_graph = nn.Linear(10, 10)(torch.ones(2, 10))  # 440, 80, 80
    assert live.now == 4_000 + 440 + 80 + 80
    assert live.peak == 24_000
    del with_graph
    assert live.now == 4_000


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(["stage=instruct"], marks=pytest.mark.slow),
        pytest.param(["stage=full", "trainer.accumulate_grad_batches=2"], marks=pytest.mark.slow),
        ["llm.gradient_checkpointing=true"],
        ["connector=cross_attention", "connector.depth=1"],
    ],
    ids=str,
)
def test_two_shallow_copies_tell_the_activations_of_the_whole_model(changes: list[str]) -> None:
    cfg = settings(*changes, "llm.config.num_hidden_layers=8")
    whole = counted(cfg)
    shallow = [counted(cfg, depth=depth) for depth in probe.DEPTHS[0]]
    found, exact = (predict(of, depth=8, held_gb=2.0, accumulate_grad_batches=1) for of in (shallow, [whole]))
    assert shallow[1].forward_gb < 0.95 * whole.forward_gb
    assert found.activations_gb == pytest.approx(exact.activations_gb, rel=0.02)


def test_blocks_that_are_trained_are_in_both_copies() -> None:
    assert [probe.smallest_depth(settings(f"stage.llm={state}")) for state in ("frozen", "{last_n: 3}")] == [0, 3]


def test_a_model_of_the_users_own_can_be_made_shallow(tmp_path: Path) -> None:
    """`llm=hf` names no architecture: its files tell it, if they are on this machine."""
    llm = settings()["llm"]
    from_facts(llm["config"], option="llm.config").save_pretrained(tmp_path)
    own = {**settings(), "llm": {**llm, "pretrained": str(tmp_path), "config": None}}
    assert Composed.depth(own) == 2
    changed = Composed.with_depth(own, 1)["llm"]["config"]
    assert (changed["num_hidden_layers"], changed["hidden_size"]) == (1, 64)
    assert counted(own, depth=1).forward_gb == pytest.approx(counted(settings(), depth=1).forward_gb)
    unknown = {**own, "llm": {**own["llm"], "pretrained": "somebody/elsewhere"}}
    assert Composed.depth(unknown) is None


def test_what_training_holds_is_counted_exactly() -> None:
    found, averaged = (counted(settings(f"stage.ema_decay={decay}")) for decay in ("null", 0.99))
    model, _ = probe.parts_on_meta(settings())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    connector = sum(parameter.nbytes for parameter in model.connector.parameters())
    held = sum(parameter.nbytes for parameter in model.parameters()) + buffers + 3 * connector
    assert (found.held_gb, averaged.held_gb) == pytest.approx((held / 1e9, (held + connector) / 1e9), rel=1e-9)
    assert averaged.forward_gb == pytest.approx(found.forward_gb, rel=1e-3)


def of(**changes: Any) -> Measured:
    values = {"rows": 1.0, "batch_seconds": 1.0, "optimizer_seconds": 0.5, "steps": 3}
    memory = {
        "held_gb": 2.5,
        "positions": 100,
        "forward_gb": 1.0,
        "backward_gb": 0.5,
        "update_gb": 0.25,
        "peak_gb": 5.0,
    }
    return Measured(**{**values, **memory, **changes})


def test_one_probe_is_the_prediction() -> None:
    found = predict([of()], depth=None, held_gb=2.5, accumulate_grad_batches=3)
    assert (found.activations_gb, found.peak_memory_gb, found.step_seconds) == (1.0, 5.0, 3 * 1.0 + 0.5)


def test_two_probes_are_a_line_and_part_of_a_batch_is_multiplied() -> None:
    first = of(depth=2, rows=0.25, forward_gb=0.5, backward_gb=0.25)
    second = of(depth=4, rows=0.25, forward_gb=0.75, backward_gb=0.625, batch_seconds=1.5, optimizer_seconds=0.75)
    found = predict([first, second], depth=10, held_gb=9.5, accumulate_grad_batches=2)
    activations = (
        0.25 + 4 * 0.375
    ) / 0.25  # of the backward pass, which in the copies needs less than the forward pass
    assert found.activations_gb == pytest.approx(activations)
    libraries = 5.0 - (2.5 + 0.75)  # in the second probe's process
    assert found.peak_memory_gb == pytest.approx(libraries + 9.5 + activations)
    assert found.step_seconds == pytest.approx(2 * (1.0 + 4 * 0.5) / 0.25 + (0.5 + 4 * 0.25))


def test_the_update_can_need_more_than_a_batch() -> None:
    found = predict([of(update_gb=1.5)], depth=None, held_gb=2.5, accumulate_grad_batches=1)
    assert (found.activations_gb, found.peak_memory_gb) == (1.5, 5.0)


def test_timed_steps_do_not_change_what_was_counted() -> None:
    counted_only, timed = counted(settings()), counted(settings(), num_timed=2)
    assert (timed.steps, counted_only.steps) == (2, 0)
    assert (timed.forward_gb, timed.update_gb) == (counted_only.forward_gb, counted_only.update_gb)
    assert timed.forward_gb > timed.update_gb > 0


def test_a_model_of_the_meta_device_gets_memory_and_stays_tied() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"table": nn.Embedding(5, 300), "head": nn.Linear(300, 5), "norm": nn.BatchNorm1d(5)})
    model["head"].weight = model["table"].weight
    model["table"].weight.requires_grad_(False)
    fill(model)
    assert model["head"].weight is model["table"].weight
    assert not model["table"].weight.requires_grad
    assert model["head"].bias.requires_grad
    assert 0.01 < float(model["table"].weight.std()) < 0.04
    assert model["norm"].running_var.tolist() == [1.0] * 5
    assert int(model["norm"].num_batches_tracked) == 0


def test_a_plan_beside_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The probe runs in a process of its own, as for a user."""
    file, arguments = tmp_path / "plan.json", [*programs.QUICK, "data.batch_size=2"]
    assert programs.train(*arguments, "plan=true", f"plan.json={file}", f"run_dir={tmp_path / 'run'}") == 0
    plan = json.loads(file.read_text())
    assert list(plan["memory_gb"]) == ["weights", "gradients", "optimizer_states", "activations", "total"]
    assert plan["memory_gb"]["total"] == pytest.approx(sum(list(plan["memory_gb"].values())[:-1]))
    assert plan["peak_memory_gb"] > plan["memory_gb"]["total"]  # the libraries alone take more
    assert plan["fit_seconds"] == pytest.approx(2 * plan["step_seconds"])
    (measured,) = plan["probe"]["measured"]
    assert (measured["weights"], measured["depth"], measured["rows"]) == ("own", None, 1.0)
    assert plan["settings"]["data"]["batch_size"] == 2
    printed = capfd.readouterr().out
    assert "steps here, the model with its own weights" in printed
    assert list(tmp_path.iterdir()) == [file]

    changed = [*arguments, "data.batch_size=3", "trainer.max_steps=1"]
    assert programs.train(*changed, f"plan.against={file}", f"run_dir={tmp_path / 'run'}") == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["plan/peak_memory_gb"] == plan["peak_memory_gb"]
    assert metrics["plan/step_seconds"] == plan["step_seconds"]
    printed = capfd.readouterr().out
    assert "The plan was made with other options: data.batch_size=2, now 3\n" in printed
    table = printed[printed.index("Plan and run") :]
    difference = plan["step_seconds"] / metrics["perf/step_seconds"] - 1
    (row,) = [line for line in table.splitlines() if "seconds per step" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")][-1] == f"{difference:+.0%}"


@pytest.mark.parametrize("content", [None, "{}", "[1]", "no json", '{"peak_memory_gb": 1.0, "step_seconds": 1.0}'])
def test_a_file_without_a_prediction(tmp_path: Path, capfd: pytest.CaptureFixture[str], content: str | None) -> None:
    file = tmp_path / "plan.json"
    if content is not None:
        file.write_text(content)
    assert programs.train(*programs.QUICK, f"plan.against={file}", f"run_dir={tmp_path / 'run'}") == 2
    said = f"plan.against={file} holds no prediction; write one with plan=true plan.json={file}"
    assert said in capfd.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("asked", ["plan=true", "plan.json=p.json", "plan.memory_gb=24"])
def test_a_plan_is_compared_with_a_run_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str], asked: str) -> None:
    assert programs.train(*programs.QUICK, asked, "plan.against=f.json", f"run_dir={tmp_path / 'run'}") == 2
    assert capfd.readouterr().err == (
        "Error: plan.against=f.json compares a run with its plan, but plan=true, plan.json and plan.memory_gb start no "
        "run; leave out plan.against, or leave out the others\n"
    )


def test_a_recipe_needs_a_plan_of_each_stage(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["experiment=shapes_align_instruct", *programs.TINY, f"run_dir={tmp_path / 'run'}"]
    assert programs.train(*arguments, f"plan.against={tmp_path / 'plan.json'}") == 2
    assert f"plan.against={tmp_path / 'plan-1-align.json'} holds no prediction" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("held_gb", "layers", "expected"),
    [
        (1.9, 32, [{"rows": 1.0, "num_timed": 8}]),
        (2.1, 32, [{"rows": 1.0, "num_timed": 8, "depth": 2}, {"rows": 1.0, "num_timed": 8, "depth": 4}]),
        (2.1, 2, [{"rows": 1.0, "num_timed": 8}]),
        (2.1, 4, [{"rows": 1.0, "num_timed": 8, "depth": 1}, {"rows": 1.0, "num_timed": 8, "depth": 2}]),
        (2.1, None, [{"rows": 1.0, "num_timed": 8}]),
    ],
)
def test_a_large_model_is_probed_as_two_shallow_copies(
    monkeypatch: pytest.MonkeyPatch, held_gb: float, layers: int | None, expected: list[dict[str, Any]]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(probe, "free_memory", lambda: 10e9)
    monkeypatch.setattr(
        probe,
        "run_apart",
        lambda requests, _: asked.extend(requests) or [of(rows=requests[0]["rows"], depth=requests[0].get("depth"))],
    )
    cfg = settings()
    probe.probe(
        cfg,
        held_gb=lambda depth: held_gb if depth is None else 1.0,
        num_parameters=10**6,
        tokens_per_batch=100,
        depth=layers,
    )
    assert asked == expected


def test_a_step_that_takes_long_is_probed_on_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        probe,
        "run_apart",
        lambda requests, _: asked.extend(requests) or [of(rows=requests[0]["rows"], depth=requests[0].get("depth"))],
    )
    cfg = settings("data.batch_size=8")
    found = probe.probe(cfg, held_gb=lambda _: 1.0, num_parameters=10**9, tokens_per_batch=500, depth=12)
    assert asked == [{"rows": 2 / 8, "num_timed": 8}]  # 10¹² operations are 2 rows: 6 · 10⁹ · 125
    assert found.step_seconds == 4 * 1.0 + 0.5


@pytest.mark.parametrize(("depth", "least"), [(None, 7.1), (12, 5.2)])
def test_a_model_too_large_for_a_probe(monkeypatch: pytest.MonkeyPatch, depth: int | None, least: float) -> None:
    def held_gb(blocks: int | None) -> float:
        return {None: 7.1, 4: 6.2, 2: 5.2}[blocks]

    monkeypatch.setattr(probe, "free_memory", lambda: 10e9)
    with pytest.raises(RuntimeError, match=f"the smallest copy of the model needs {least} GB, and of memory 10.0 GB"):
        probe.probe(settings(), held_gb=held_gb, num_parameters=10**9, tokens_per_batch=500, depth=depth)
