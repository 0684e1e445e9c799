"""What W&B and TensorBoard have of a run, read back from their files: the same scalars, answers and images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.programs import QUICK, read, train
from tests.helpers.wandb_file import config, history, kind, records
from vlm.data.sources.shapes import Shapes
from vlm.loggers.tensorboard import TensorBoard
from vlm.loggers.wandb import Wandb
from vlm.training.dashboards import AnsweredSample

VARIABLES = ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "HOME")  # W&B writes there, and finds keys


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user without a key."""
    folder = tmp_path_factory.mktemp("home")
    wandb.teardown()  # what an earlier test of this process has set up
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
            patch.delenv(name, raising=False)
        for name in VARIABLES:
            patch.setenv(name, str(folder))
        yield folder


def end(logger: Wandb) -> None:
    """End a run, and wait until W&B's process has written its file."""
    logger.experiment.finish()
    wandb.teardown()


@pytest.fixture(scope="module")
def run(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    options = ["logger=[wandb,tensorboard]", "trainer.val_check_interval=1", "callbacks.samples_table.num_samples=3"]
    assert train(*QUICK, "stage=instruct", *options, f"run_dir={folder}") == 0
    wandb.teardown()  # waits until W&B's process has written the file
    return folder


@pytest.fixture(scope="module")
def found(run: Path) -> list[Any]:
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    return records(file)


@pytest.fixture(scope="module")
def events(run: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    return accumulator.Reload()


@pytest.mark.slow
def test_the_run_of_wandb_is_named_after_its_choices(run: Path, found: list[Any]) -> None:
    (of_run,) = kind(found, "run")
    assert of_run.run_id == OmegaConf.load(run / "config.yaml").logger.wandb.id
    assert (of_run.project, of_run.entity, of_run.run_group) == ("vlm", "", "")
    assert of_run.display_name == "instruct tiny-mlp-tiny"
    parts = ["encoder=tiny", "connector=mlp", "llm=tiny"]
    rest = ["objective=language_modeling", "data=shapes"]
    assert list(of_run.tags) == ["stage=instruct", "model=composed", *parts, *rest]
    assert [record.exit_code for record in kind(found, "exit")] == [0]


@pytest.mark.slow
def test_wandb_has_the_config_and_the_parameters_of_each_part(run: Path, found: list[Any]) -> None:
    logged, stored = config(found), OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    assert stored["stage"] == logged["stage"]
    assert logged["choices"] == stored["choices"]
    manifest = json.loads((run / "artifact" / "manifest.json").read_text())
    trained = sum(logged["parameters"][part]["trainable"] for part in ("encoder", "connector", "llm"))
    assert trained == json.loads((run / "metrics.json").read_text())["params/trainable"]
    assert manifest["run"]["connector"] == logged["choices"]["connector"]


@pytest.mark.slow
def test_both_have_the_scalars_of_the_metrics_file(run: Path, found: list[Any], events: EventAccumulator) -> None:
    expected = [(line.pop("step"), line) for line in read(run / "metrics.jsonl")]
    assert [step for step, _ in expected] == [1, 1, 2, 2]
    rates = {"lr/connector", "lr/llm", "train/grad_norm/connector", "train/grad_norm/llm"}
    speed = {f"perf/{name}" for name in ("tokens_per_second", "samples_per_second", "peak_memory_gb")}
    assert rates | speed | {"train/loss", "train/grad_norm"} <= expected[0][1].keys()
    assert {"val/loss", "val/visual_gain", "val/visual_rms", "val/embed_rms"} <= expected[1][1].keys()
    rows = [(row["trainer/global_step"], _scalars(row)) for row in history(found)]
    assert [row for row in rows if row[1]][:-1] == [(step, pytest.approx(line)) for step, line in expected]
    final = {k: v for k, v in json.loads((run / "metrics.json").read_text()).items() if k != "status"}
    assert rows[-1] == (2, pytest.approx(final))
    tags = {name for _, line in expected for name in line} | final.keys()
    assert {*events.Tags()["scalars"]} == tags
    for name in tags:
        values = [(step, line[name]) for step, line in [*expected, (2, final)] if name in line]
        assert [(each.step, each.value) for each in events.Scalars(name)] == [
            (step, pytest.approx(value)) for step, value in values
        ]


@pytest.mark.slow
def test_wandb_has_a_table_of_answers_with_images_at_each_validation(found: list[Any]) -> None:
    tables = [artifact for artifact in kind(found, "artifact") if artifact.type == "run_table"]
    assert [row["trainer/global_step"] for row in history(found) if "val/samples.nrows" in row] == [1, 2]
    assert len(tables) == 2
    source = Shapes(split="val", task="instruct")
    for table in tables:
        files = {entry.path: Path(entry.local_path).read_bytes() for entry in table.manifest.contents}
        content = json.loads(files["val/samples.table.json"])
        assert content["columns"] == ["id", "image 1", "prompt", "prediction", "reference", "score"]
        assert len(content["data"]) == 3
        for index, (name, image, prompt, prediction, reference, score) in zip(
            (0, 85, 170), content["data"], strict=True
        ):
            sample = source[index]
            assert name == sample.id
            pixels = np.asarray(Image.open(BytesIO(files[image["path"]])))
            np.testing.assert_array_equal(pixels, np.asarray(sample.images[0]))
            assert prompt == sample.messages[-2]["content"][-1]["text"]
            assert reference == sample.messages[-1]["content"][0]["text"]
            assert score == (prediction == reference)


@pytest.mark.slow
def test_tensorboard_has_the_answers_and_each_image_once(events: EventAccumulator) -> None:
    source = Shapes(split="val", task="instruct")
    assert sorted(events.Tags()["images"]) == ["samples/1", "samples/2", "samples/3"]
    for number, index in enumerate((0, 85, 170), start=1):
        (image,) = events.Images(f"samples/{number}")
        pixels = np.asarray(Image.open(BytesIO(image.encoded_image_string)))
        np.testing.assert_array_equal(pixels, np.asarray(source[index].images[0]))
    texts = events.Tensors("samples/text_summary")
    assert [text.step for text in texts] == [1, 2]
    first = texts[0].tensor_proto.string_val[0].decode().splitlines()[2]
    assert first.startswith(f"| 1 | {source[0].messages[-2]['content'][-1]['text']} | ")


@pytest.mark.slow
def test_the_artifact_of_the_run_is_in_wandb(run: Path, found: list[Any]) -> None:
    (artifact,) = [artifact for artifact in kind(found, "artifact") if artifact.type == "model"]
    folder = run / "artifact"
    paths = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    assert paths == {name: folder / name for name in ("manifest.json", "weights.safetensors")}
    identity = json.loads((folder / "manifest.json").read_text())["run"]
    assert json.loads(artifact.metadata) == identity


def test_a_run_without_a_key_is_offline_and_says_so_in_one_line(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = Wandb(save_dir=str(tmp_path), id="first")
    logger.log_metrics({"val/loss": 1.5, "epoch": 0, "train/loss/books": float("nan")}, step=3)
    end(logger)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-first.wandb")
    out, err = capfd.readouterr()
    assert (err, out) == (
        "",
        f"W&B has no key, so the run is recorded offline; upload it with: wandb sync {file.parent}\n",
    )
    (row,) = history(records(file))
    assert _scalars(row) == {"val/loss": 1.5}
    assert row["trainer/global_step"] == 3


def test_a_run_that_was_left_open_is_ended_as_failed(home: Path, tmp_path: Path) -> None:
    """It is that of a job of a sweep that has raised; W&B would log the next job to it."""
    first, second = (Wandb(save_dir=str(tmp_path), id=name, offline=True) for name in ("first", "second"))
    first.log_metrics({"val/loss": 1.0}, step=1)
    second.log_metrics({"val/loss": 2.0}, step=1)
    end(second)
    for name, value, code in (("first", 1.0, 1), ("second", 2.0, 0)):
        (file,) = tmp_path.glob(f"wandb/offline-run-*/run-{name}.wandb")
        found = records(file)
        assert [_scalars(row) for row in history(found)] == [{"val/loss": value}]
        assert [record.exit_code for record in kind(found, "exit")] == [code]


def test_a_run_of_an_agent_of_wandb_has_the_agents_id(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("SWEEP_ID", "a_sweep"), ("RUN_ID", "its_run"), ("PROJECT", "its_project")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    end(Wandb(save_dir=str(tmp_path), id="another", offline=True))
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    (of_run,) = kind(records(file), "run")
    assert (of_run.run_id, of_run.sweep_id, of_run.project) == ("its_run", "a_sweep", "its_project")
    assert capfd.readouterr().err == ""


def test_samples_with_several_images_and_with_none(home: Path, tmp_path: Path) -> None:
    images = [Image.new("RGB", (4, 2), color) for color in ("red", "blue")]
    samples = [
        AnsweredSample("two", images, "a | b\nc", "yes", "no", 0.5),
        AnsweredSample("none", [], "text", "yes", "yes", 1.0),
    ]
    logger = Wandb(save_dir=str(tmp_path), id="run", offline=True)
    logger.log_samples(samples, 7)
    end(logger)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    (table,) = kind(records(file), "artifact")
    paths = {entry.path: Path(entry.local_path) for entry in table.manifest.contents}
    content = json.loads(paths["val/samples.table.json"].read_bytes())
    assert content["columns"][:3] == ["id", "image 1", "image 2"]
    (_, *two, prompt, _, _, score), (_, *none, _, _, _, _) = content["data"]
    assert (prompt, score, none) == ("a | b\nc", 0.5, [None, None])
    assert [Image.open(paths[each["path"]]).getpixel((0, 0)) for each in two] == [(255, 0, 0), (0, 0, 255)]

    board = TensorBoard(save_dir=str(tmp_path), name="tensorboard", version="")
    board.log_samples(samples, 7)
    board.finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0, "tensors": 0}).Reload()
    assert {tag: len(events.Images(tag)) for tag in events.Tags()["images"]} == {"samples/1": 2}
    (text,) = events.Tensors("samples/text_summary")
    rows = text.tensor_proto.string_val[0].decode().splitlines()[2:]
    assert rows == [r"| 1 | a \| b c | yes | no | 0.50 |", "| 2 | text | yes | yes | 1.00 |"]


def _scalars(row: dict[str, Any]) -> dict[str, float]:
    """The metrics of a row of the history, without what W&B adds and without tables."""
    return {
        name: value
        for name, value in row.items()
        if "/" in name and name != "trainer/global_step" and not name.startswith("val/samples.")
    }
