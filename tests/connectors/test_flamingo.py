"""Flamingo as published: where its blocks are, what a run trains and saves, and few-shot questions to it.

That it computes as published: tests/exchange/test_from_open_flamingo.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.connectors import connect
from tests.helpers.parts import IMAGE, make_batch, tiny_encoder, tiny_llm
from tests.helpers.programs import QUICK, evaluate, train, weights
from vlm.models.composed import Composed

SMALL: dict[str, Any] = {"num_queries": 3, "depth": 1, "num_heads": 2, "head_dim": 8}
TOKENS = 'llm.added_tokens=["<|endofchunk|>","<image>"]'
OPTIONS = ["connector=flamingo", "connector.image_token='<image>'", "llm.chat_template=flamingo", TOKENS]
OPTIONS += ["connector.num_queries=3", "connector.depth=1", "stage.llm={only: [added_tokens]}", "stage.lr.llm=1.0e-3"]
OPTIONS += ["data=names", "data.image_size=32", "data.num_shots=2"]


def model(*, every: int = 1) -> Composed:
    encoder, llm = tiny_encoder(), tiny_llm(num_hidden_layers=4)
    torch.manual_seed(3)
    connector = connect("flamingo", encoder, llm, **SMALL, every=every)
    return Composed(encoder=encoder, connector=connector, llm=llm)


@pytest.mark.parametrize(("every", "places"), [(1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2]), (4, [3])])
def test_a_block_stands_before_the_last_of_every_n_layers(every: int, places: list[int]) -> None:
    made = model(every=every)
    assert [i for i, layer in enumerate(made.llm.layers()) if layer._forward_pre_hooks] == places
    assert len(made.connector.blocks) == len(places)


def test_closed_gates_give_the_bare_llm_and_learn_first() -> None:
    made = model()
    batch = make_batch(([11, IMAGE, 12], [21]), ([15, 16], [23]), num_tokens=0)
    bare = made.llm(made.llm.embed(batch.input_ids), batch.attention_mask, batch.position_ids, batch.logits_mask)
    assert torch.equal(made(batch), bare)
    made(batch).square().sum().backward()
    learning = {name for name, p in made.connector.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {f"blocks.{n}.{gate}" for n in range(4) for gate in ("attention_gate", "ff_gate")}
    for name, parameter in made.connector.named_parameters():
        if name.endswith("_gate"):
            nn.init.constant_(parameter, 0.5)
    opened = made(batch)
    assert (opened - bare).abs().amax(1).min() > 1e-3, "the feed-forward layer changes a text without an image too"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("flamingo") / "run"
    assert train(*QUICK, *OPTIONS, f"run_dir={run}") == 0
    return run


def test_a_run_trains_the_connector_and_two_tokens(run_dir: Path) -> None:
    found = weights(run_dir)
    assert {name for name in found if name.startswith("llm.")} == {"llm.added_tokens.input", "llm.added_tokens.output"}
    assert {name.partition(".")[0] for name in found} == {"connector", "llm"}
    assert found["connector.blocks.0.attention_gate"].shape == (1,)
    assert found["connector.blocks.0.attention_gate"].any()


@pytest.mark.parametrize(
    "options",
    [
        ["benchmark.num_shots=4", "benchmark.shots=random"],
        ["benchmark.num_shots=4", "benchmark.shots=nearest", "benchmark.shuffled_answers=true"],
        ["benchmark.num_shots=2", "benchmark.shots_without_images=true"],
        [],
    ],
)
def test_few_shots(run_dir: Path, tmp_path: Path, options: list[str]) -> None:
    asked = ["benchmark=names", "benchmark.names.image_size=32", "benchmark.names.num_questions=4", "trainer=cpu"]
    asked += ["benchmark.names.num_tasks=2", "benchmark.max_new_tokens=2"]
    shown = ["+benchmark.names.demonstrations.num_questions=16"] if options else []
    more = [f"+{option}" for option in options]
    assert evaluate(f"ckpt={run_dir}", f"out={tmp_path}", *asked, *more, *shown) == 0
    found = json.loads((tmp_path / "names" / "results.json").read_text())
    assert found["n"] == 4
    assert found["shuffled_answers"] is ("benchmark.shuffled_answers=true" in options)
    assert found["shots_without_images"] is ("benchmark.shots_without_images=true" in options)
    assert found["num_shots"] == (int(options[0][-1]) if options else 0)
