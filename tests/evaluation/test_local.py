"""A model of this project answers a benchmark: the same as in validation, each image encoded once a batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.benchmarks import Squares, write_images
from tests.helpers.programs import QUICK, ROOT, evaluate, read, train
from vlm import build, config
from vlm.data.collate import collate
from vlm.evaluation.benchmarks.shapes import Shapes
from vlm.evaluation.local import Local, Rows
from vlm.evaluation.prompts import Prompts
from vlm.evaluation.respondent import Answer
from vlm.training import artifact


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = ["data=shapes", "data.task=instruct", "data.image_size=32", "data.num_val=8"]
    options += [f"run_dir={folder}"]
    assert train(*QUICK, *options) == 0
    return folder


@pytest.fixture(scope="module")
def local(run_dir: Path) -> Local:
    settings, _ = config.read_config(run_dir, with_data=True)
    settings |= {"logger": {}, "callbacks": {}, "trainer": {**settings["trainer"], "precision": "32-true"}}
    model, manifest = build.build_model(settings)
    artifact.load(run_dir, model=model, manifest=manifest, run_id=config.run_id(run_dir))
    trainer = build.build_trainer(settings, run_dir)
    reader = build.build_reader(settings, model)
    return Local(trainer=trainer, model=model, reader=reader, batch_size=3, num_workers=0)


def answers(local: Local, benchmark: Any, indices: list[int], answered: Any = ()) -> dict[int, Answer]:
    found: list[Answer] = []
    local.respond(Prompts(benchmark=benchmark), indices, answered, found.append)
    assert len({answer.index for answer in found}) == len(found)
    return {answer.index: answer for answer in found}


def test_prompts_are_those_of_the_validation(local: Local, run_dir: Path) -> None:
    """Token for token and pixel for pixel."""
    settings, _ = config.read_config(run_dir, with_data=True)
    data = build.connect_data(build.build_data(settings, None), settings, local.model)
    keys = [[(index, -1)] for index in range(8)]
    rows = Rows(prompts=Prompts(benchmark=Shapes(image_size=32, num_scenes=8)), reader=local.reader, batches=keys)
    expected = list(data.prompts(range(8), 1))
    assert len(expected) == 8
    for batch, work in zip(expected, rows, strict=False):
        assert work.batch is not None
        assert work.batch.ids == batch.ids
        assert work.batch.input_ids.tolist() == batch.input_ids.tolist()
        assert torch.equal(work.batch.pixel_values, batch.pixel_values)


def test_only_what_is_not_answered_is_asked(local: Local) -> None:
    assert answers(local, Squares(), [0, 1, 2, 3]).keys() == {0, 1, 2, 3}
    assert answers(local, Squares(), [0, 1, 2, 3], answered={0, 3}).keys() == {1, 2}


def test_an_image_is_encoded_once_for_all_rows_of_a_batch(local: Local) -> None:
    squares = Squares(method="rank")
    encoded: list[int] = []
    hook = local.model.encoder.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    try:
        answers(local, squares, [0, 1, 2, 3])
    finally:
        hook.remove()
    # Of 11 rows: each of three questions with three choices fills a batch of three, and the other question has one.
    assert encoded == [1, 1, 1, 1]


def test_log_likelihoods_are_those_of_the_loss(local: Local) -> None:
    """Of each choice alone in a batch, by the cross-entropy of the whole conversation."""
    squares = Squares(method="rank")
    (found,) = answers(local, squares, [1]).values()
    reader = local.reader
    (asked,) = Prompts(benchmark=squares).samples([1])
    for choice, (nats, tokens) in zip(squares.questions[1].choices, found.log_likelihoods, strict=True):
        turn = {"role": "assistant", "content": [{"type": "text", "text": choice}]}
        sample = type(asked)(id=asked.id, images=asked.images, messages=[*asked.messages, turn])
        batch = collate([reader.row(sample, reader.text.encode(sample))], spec=reader.spec, pad_id=reader.text.pad_id)
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(local.model(batch).float(), batch.targets, reduction="sum")
        assert nats == pytest.approx(-float(loss), abs=1e-3)
        assert tokens == len(batch.targets) == len(choice) + 1  # bytes, and the end of the turn
    best = max(zip(found.log_likelihoods, squares.questions[1].choices, strict=True), key=lambda e: e[0][0] / e[0][1])
    assert found.prediction == best[1]


def test_what_the_choices_of_a_question_share_is_computed_once(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    squares = Squares(method="rank")
    shapes: list[tuple[int, ...]] = []
    continued = local.model.llm.continued

    def noting(prefix: Tensor, embeds: Tensor, *others: Tensor) -> Tensor:
        shapes.append((*prefix.shape[:2], *embeds.shape[:2]))
        return continued(prefix, embeds, *others)

    monkeypatch.setattr(local.model.llm, "continued", noting)
    found = answers(local, squares, [0, 3])
    assert [rows for _, _, rows, _ in shapes] == [3, 2]  # red, green, blue; yes, no
    assert all(1 < row < prefix for _, prefix, _, row in shapes)
    monkeypatch.setattr(type(local.model.llm), "can_continue", False)
    for index, answer in answers(local, squares, [0, 3]).items():
        for one, other in zip(answer.log_likelihoods, found[index].log_likelihoods, strict=True):
            assert one == pytest.approx(other, abs=1e-3)
    assert len(shapes) == 2


def test_rows_about_different_images_share_nothing(local: Local) -> None:
    squares, spec = Squares(method="rank"), local.reader.spec
    keys = [[(0, 0), (0, 1)], [(0, 0), (1, 0)], [(0, 0)], [(0, 0), (3, 0)]]
    rows = Rows(prompts=Prompts(benchmark=squares), reader=local.reader, batches=keys)
    choices, images, single, questions = (work.batch.num_shared_tokens for work in rows if work.batch)
    assert images == single == 0
    first = rows[0].batch
    assert first is not None
    answer = int(first.logits_mask[0].nonzero()[0])  # where the first token of the answer is predicted
    assert spec.num_tokens < choices == answer  # the prompt, but for its last token
    assert spec.num_tokens <= questions < choices  # two questions about an image


def test_a_question_that_cannot_be_asked_is_named_and_the_others_are_asked(local: Local) -> None:
    found = answers(local, Squares(missing=True), [0, 1, 2, 3])
    assert found[1].error == "image 'b.png' is missing; restore it"
    assert [found[index].error for index in (0, 2, 3)] == ["", "", ""]


def test_equal_images_have_equal_vectors(local: Local) -> None:
    vectors = local.embed(Squares())
    assert torch.equal(vectors[0], vectors[3])
    assert not torch.equal(vectors[0], vectors[1])

    def mean(pixels: Tensor) -> Tensor:
        return local.model.encoder(pixels).mean(1)

    pixels = local.reader.spec.transform(Squares().image("b.png"))[None]
    torch.testing.assert_close(vectors[1:2], mean(pixels).detach().float())


def test_eval_runs_a_benchmark_with_shots(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [f"ckpt={run_dir}", "trainer=cpu", "benchmark=shapes", "num_samples=4", "max_new_tokens=4"]
    command += ["benchmark.shapes.image_size=32", "benchmark.num_shots=1", "benchmark.shots=nearest"]
    command += ["benchmark.shapes.demonstrations.num_scenes=12", f"out={tmp_path / 'out'}", "batch_size=2"]
    assert evaluate(*command) == 0
    assert "shapes: 4 answers in 4 groups" in capsys.readouterr().out
    (record, *_) = read(tmp_path / "out" / "shapes" / "samples.jsonl")
    assert record["id"] == "shapes/0/val/0"
    assert evaluate(*command, f"against={tmp_path / 'out'}") == 0
    assert "difference" in capsys.readouterr().out


def test_eval_asks_benchmarks_of_published_files(run_dir: Path, tmp_path: Path) -> None:
    images = [f"COCO_val2014_{number:012d}.jpg" for number in (1, 2)]
    write_images(tmp_path, *images)
    asked = [
        {"question_id": number, "image": image, "text": "Is there a cat in the image?", "label": label}
        for number, (image, label) in enumerate(zip(images, ("yes", "no"), strict=True))
    ]
    (tmp_path / "coco_pope_random.json").write_text("\n".join(map(json.dumps, asked)))
    captions = [{"image": image, "captions": ["A cat.", "A small cat."]} for image in images]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    command = [f"ckpt={run_dir}", "trainer=cpu", "benchmark=[pope,caption]", "max_new_tokens=3"]
    command += [f"benchmark.pope.annotations={tmp_path}", f"benchmark.pope.images={tmp_path}"]
    command += ["benchmark.pope.categories=[random]", f"benchmark.caption.annotations={tmp_path / 'captions.json'}"]
    command += [f"benchmark.caption.images={tmp_path}", f"out={tmp_path / 'out'}"]
    assert evaluate(*command) == 0
    (record, _) = read(tmp_path / "out" / "pope" / "samples.jsonl")
    assert record["id"] == "random/0"
    assert record["prompt"].startswith("<image>\nIs there a cat in the image?\nAnswer")
    metrics = {
        name: json.loads((tmp_path / "out" / name / "results.json").read_text())["metrics"].keys()
        for name in ("pope", "caption")
    }
    assert metrics == {
        "pope": {"accuracy", "precision", "recall", "f1", "yes_ratio"},
        "caption": {"cider_d", "bleu_4", "rouge_l"},
    }


@pytest.mark.slow
def test_two_processes_write_the_results_of_one(run_dir: Path, tmp_path: Path) -> None:
    """Each answers every second group of questions; rank 0 cannot write results before it has the answers of both."""
    command = [sys.executable, str(ROOT / "eval.py"), f"ckpt={run_dir}", "benchmark=[shapes,text]", "num_samples=9"]
    command += ["benchmark.shapes.image_size=32", "max_new_tokens=4", "batch_size=2", "trainer=ddp"]
    command += ["trainer.accelerator=cpu", "trainer.precision=32-true"]
    for num in (1, 2):
        options = [f"trainer.devices={num}", f"out={tmp_path / str(num)}"]
        done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert f"MEMBER: {num}/{num}" in done.stderr
    for name in ("shapes", "text"):
        one, two = (tmp_path / num / name for num in "12")
        assert len(read(two / "samples.jsonl")) == 9
        results = [json.loads((folder / "results.json").read_text()) for folder in (one, two)]
        assert results[0].pop("options_given") != results[1].pop("options_given")
        if name == "text":  # other rows in a batch change the last digits of a likelihood
            values = [each.pop("metrics")["nats_per_token"]["value"] for each in results]
            assert values[0] == pytest.approx(values[1], rel=1e-5)
        else:
            assert read(one / "samples.jsonl") == read(two / "samples.jsonl")
        assert results[0] == results[1]
