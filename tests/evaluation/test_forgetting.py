"""What an LLM forgets: nothing where it is frozen; else measured by hand, with a gate; texts replayed against it."""

from __future__ import annotations

import csv
import json
import shutil
import tomllib
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.cross_attention import attending
from tests.helpers.parts import (
    IMAGE,
    LORA,
    SPEC,
    loader,
    make_batch,
    make_module,
    make_trainer,
    pictures,
    tiny_llm,
    tiny_model,
)
from tests.helpers.programs import QUICK, ROOT, assert_same_run, read, train
from tests.helpers.sources import Numbered, mixture, numbered
from tests.helpers.text import byte_tokenizer, encoder
from vlm.data.filter import Filtered
from vlm.data.replay import REPLAY, with_replay
from vlm.evaluation.forgetting import TEXTS, text_batches, text_loss
from vlm.models.composed import Composed
from vlm.schema import Batch, Sample
from vlm.text.templates import TEMPLATES
from vlm.training import artifact

CPU = torch.device("cpu")
TEXT = (([11, 12, 13], [21, 22]), ([14], [23, 24, 25]))


def conversations(file: Path) -> list[tuple[str, str]]:
    return [tuple(message["content"] for message in record["messages"]) for record in read(file)]  # type: ignore[misc]


def alone(model: Composed, batch: Batch) -> Tensor:
    """What the LLM itself says to a text."""
    with torch.no_grad():
        return model.llm(model.llm.embed(batch.input_ids), batch.attention_mask, batch.position_ids, batch.logits_mask)


# --- A frozen LLM


@pytest.mark.parametrize("fusion", ["tokens", "layers"])
def test_a_frozen_llm_forgets_nothing(tmp_path: Path, fusion: str) -> None:
    """Its logits on text after four steps are those before, bit for bit, also in the whole model; a LoRA's are not."""
    places = {"num_tokens": 0} if fusion == "layers" else {}
    text = make_batch(*TEXT)
    seen = make_batch(([11, IMAGE, 12], [21]), ([13, IMAGE], [22, 23]), images=pictures(2), **places)

    def logits(states: dict[str, str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        model = attending(gate=0.0) if fusion == "layers" else tiny_model()
        assert model.connector.fusion == fusion
        module = make_module(model, states=states, warmup_ratio=0.0)
        with torch.no_grad():
            before, told_before = (alone(model, text), model(text)), model(seen)
        make_trainer(tmp_path, max_steps=4).fit(module, loader([seen] * 4))
        with torch.no_grad():
            assert (model(seen) - told_before).abs().max() > 1e-4
            return *before, alone(model, text), model(text)

    before, through_before, after, through_after = logits({"llm": "frozen"})
    assert torch.equal(through_before, before)
    assert torch.equal(after, before)
    assert torch.equal(through_after, before)
    before, _, after, _ = logits({"llm": "lora"})
    assert (after - before).abs().max() > 1e-4


# --- The figure


def test_the_loss_by_hand(tmp_path: Path) -> None:
    """Two texts of unlike length, each alone without padding; the run's own cut and `train_on` change nothing."""
    file = tmp_path / "two.jsonl"
    turns = [("Hi", "A longer answer."), ("Where is the star?", "左上")]
    records = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in turns
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    llm = tiny_llm()
    texts = encoder(byte_tokenizer(), "chatml")
    total, num = 0.0, 0
    for question, answer in turns:
        messages: Any = [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for role, text in (("user", question), ("assistant", answer))
        ]
        row = texts.encode(Sample("x", [], messages))
        with torch.no_grad():
            logits = llm.model(torch.tensor([row.input_ids])).logits[0]
        losses = F.cross_entropy(logits[:-1], torch.tensor(row.labels[1:]), reduction="none")
        total, num = total + losses.sum().item(), num + sum(label >= 0 for label in row.labels)
        assert sum(label >= 0 for label in row.labels) == len(answer.encode()) + 1  # and the end of the turn
    for subject in (texts, encoder(byte_tokenizer(), "chatml", max_length=20, train_on="all")):
        assert text_loss(tiny_model(llm=llm), text_batches(subject, SPEC, file=file), device=CPU) == pytest.approx(
            total / num, abs=1e-5
        )
        assert subject.max_length in (4096, 20)  # it stays the run's own


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_without_its_adapter_the_llm_is_the_untouched_one(use_dora: bool) -> None:
    batches = [make_batch(*TEXT), make_batch(([15, 16], [26]))]
    untouched = text_loss(tiny_model(llm=tiny_llm()), batches, device=CPU)
    llm = tiny_llm()
    llm.add_lora(**LORA, use_dora=use_dora)
    assert text_loss(tiny_model(llm=llm), batches, device=CPU) == pytest.approx(
        untouched, abs=1e-6 if use_dora else 0.0
    )
    trains = {name: name.endswith("q_proj.lora_B.default.weight") for name, _ in llm.named_parameters()}
    for name, parameter in llm.named_parameters():
        parameter.requires_grad_(trains[name])
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.5)
    learned = text_loss(tiny_model(llm=llm), batches, device=CPU)
    assert abs(learned - untouched) > 1e-3
    with llm.without_adapter():
        assert text_loss(tiny_model(llm=llm), batches, device=CPU) == pytest.approx(untouched, abs=1e-6)
    assert text_loss(tiny_model(llm=llm), batches, device=CPU) == learned
    assert {name: parameter.requires_grad for name, parameter in llm.named_parameters()} == trains


# --- The texts


def test_what_is_measured_is_not_what_is_replayed() -> None:
    measured, replayed = conversations(TEXTS), conversations(REPLAY)
    assert (len(measured), len(replayed)) == (48, 68)
    for texts, num in ((measured, 24), (replayed, 34)):
        assert sum(question.isascii() for question, _ in texts) == num
    pieces = [text for texts in (measured, replayed) for pair in texts for text in pair]
    assert [text for text, times in Counter(pieces).items() if times > 1] == []


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_every_template_takes_the_texts(template: str, merging: Any) -> None:
    subject = encoder(merging, template)
    batches = text_batches(subject, SPEC) + text_batches(subject, SPEC, file=REPLAY)
    rows = [row for batch in batches for row in batch.samples]
    assert len(rows) == 48 + 68
    assert max(batch.input_ids.shape[1] for batch in batches) < 400
    for batch in batches:
        assert not batch.num_images.any()
        assert batch.targets.shape[0] == int(batch.logits_mask.sum())


def test_an_installed_package_has_the_texts() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    shipped = {ROOT / name.replace(".", "/") / file for name, files in packages.items() for file in files}
    assert shipped - {ROOT / "*" / "*.yaml"} == {*ROOT.glob("vlm/**/*.jsonl")} == {TEXTS, REPLAY}


# --- A run


OPTIONS = [
    *QUICK,
    "stage=instruct",
    "data.text_replay=0.25",
    "data.num_train=30",
    "trainer.max_steps=4",
    "callbacks.save.every_n_steps=2",
    "logger=csv",
]


def texts_of(run: Path) -> list[dict[str, float]]:
    lines = [{k: v for k, v in line.items() if k.startswith("text/")} for line in read(run / "metrics.jsonl")]
    return [line for line in lines if line]


@pytest.mark.slow
def test_a_run_resumed_with_replay_measures_from_the_same_base(tmp_path: Path) -> None:
    """The last layer trains, so that the base is gone after the first step; the newest checkpoint is lost."""
    run, again = tmp_path / "whole", tmp_path / "again"
    assert train(*OPTIONS, "stage.llm={last_n: 1}", "stage.lr.llm=0.01", f"run_dir={run}") == 0
    first, second = texts_of(run)
    assert first.keys() == {"text/loss", "text/loss_base", "text/forgetting"}
    assert first["text/loss_base"] == second["text/loss_base"]
    for figures in (first, second):
        difference = figures["text/loss"] - figures["text/loss_base"]
        assert figures["text/forgetting"] == pytest.approx(difference, abs=1e-5)
        assert abs(difference) > 1e-3
    assert first["text/loss"] != second["text/loss"]
    final = json.loads((run / "metrics.json").read_text())
    assert {name: final[name] for name in second} == second
    rows = csv.DictReader((run / "csv" / "metrics.csv").read_text().splitlines())
    assert {float(row["text/loss"]) for row in rows if row["text/loss"]} == {first["text/loss"], second["text/loss"]}
    losses = [line for line in read(run / "metrics.jsonl") if "train/loss" in line]
    assert any("train/loss/replay" in line for line in losses)
    shutil.copytree(run, again)
    (again / "checkpoints" / "last.ckpt").write_bytes(b"")
    assert train(f"resume={again}") == 0
    assert_same_run(again, run)


def test_a_run_that_forgets_too_much_stops(tmp_path: Path, told: Any) -> None:
    run = tmp_path / "run"
    assert train(*OPTIONS, "evaluators.forgetting.max=-1.0", "stage.lr.llm=0.01", f"run_dir={run}") == 2
    (figures,) = texts_of(run)
    assert told() == (
        f"Error: text/forgetting is {figures['text/forgetting']:.3f} nats per token at step 2, above "
        "evaluators.forgetting.max=-1.0; the artifact of this step is saved; lower stage.lr.llm or raise "
        "data.text_replay"
    )
    with artifact.safe_open(run / "artifact" / "weights.safetensors", framework="pt") as file:
        assert file.metadata()["step"] == "2"
    assert not (run / "metrics.json").exists()


# --- Replay


def epochs(source: Any, num: int) -> list[list[Sample]]:
    return [[source[int(index)] for index in source.order(epoch, seed=0)] for epoch in range(num)]


def test_the_share_of_replay_is_exact() -> None:
    source = with_replay(Numbered("train", 90), ratio=0.1, annotations=None)
    for samples in epochs(source, 3):
        kinds = Counter(sample.meta["source"] for sample in samples)
        assert kinds == {"data": 90, "replay": 10}
        assert len({sample.id for sample in samples if sample.meta["source"] == "data"}) == 90, (
            "the source once through"
        )
    replayed = [sample.id for samples in epochs(source, 7) for sample in samples if sample.meta["source"] == "replay"]
    assert len(set(replayed)) == 68
    assert Counter(replayed).most_common(1)[0][1] == 2, "none comes again before all have come"


def test_replay_comes_into_training_alone() -> None:
    """Batches of text alone among them; validation is that of the run without."""
    data = numbered(text_replay=0.5, batch_size=2)
    batches = list(islice(data.train_dataloader(), 12))
    assert sum(id.startswith("replay/") for batch in batches for id in batch.ids) == 12
    assert any(batch.pixel_values.shape[0] == 0 for batch in batches)
    assert batches[0].sources == ("data", "replay")
    assert [batch.ids for batch in data.val_dataloader()] == [
        batch.ids for batch in numbered(batch_size=2).val_dataloader()
    ]


def test_replay_leaves_the_account_of_what_was_left_out_as_it_was() -> None:
    inner = mixture(weights={"a": 1, "b": 1}, num_samples=20)
    inner.left_out = {"symbols of a": 3}
    assert with_replay(inner, ratio=0.2, annotations=None).left_out == {"symbols of a": 3}


def test_replay_beside_a_mixture_keeps_the_names_of_its_sources() -> None:
    """Also where a filter makes the epochs of the mixture unlike in length."""
    inner = mixture(weights={"a": 1, "b": 1}, num_samples=20)
    source = with_replay(inner, ratio=0.2, annotations=None)
    assert source.names == ["a", "b", "replay"]
    readable = [index for index in source.order(0, seed=0) if int(index) % 7 != 6 and not 30 <= int(index) < 40]
    assert {source[int(index)].meta["source"] for index in readable} == {"a", "replay"}
    filtered = Filtered(inner, split="train", left_out=range(5, 20))
    lengths = [len(filtered.order(epoch, seed=0)) for epoch in range(9)]
    assert len(set(lengths)) > 1
    source = with_replay(filtered, ratio=0.2, annotations=None)
    drawn = [int(index) for epoch in range(6) for index in source.order(epoch, seed=0)]
    assert [index for index in drawn if index < len(filtered)] == [
        index for epoch in range(9) for index in filtered.order(epoch, seed=0)
    ][: sum(index < len(filtered) for index in drawn)]


@pytest.mark.parametrize(
    ("ratio", "lines", "said"),
    [
        (1.0, None, r"data\.text_replay=1\.0 must be in \(0, 1\); set data\.text_replay=0\.1"),
        (-0.1, None, r"data\.text_replay=-0\.1 must be in"),
        (0.1, None, r"there is no file '.*own\.jsonl'; set data\.replay_annotations= to the annotation file"),
        (0.1, '{"image": "a.jpg", "messages": []}', r"own\.jsonl must hold conversations without images: 1 of"),
    ],
)
def test_what_cannot_be_replayed(tmp_path: Path, ratio: float, lines: str | None, said: str) -> None:
    file = tmp_path / "own.jsonl"
    if lines is not None:
        file.write_text(lines)
    with pytest.raises(ValueError, match=said):
        with_replay(Numbered("train"), ratio=ratio, annotations=str(file))
