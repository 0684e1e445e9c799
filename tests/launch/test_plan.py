"""`plan=true`: the sizes of a run equal those of the model that it would train, and nothing is read or downloaded."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

from tests.helpers import programs
from tests.helpers.encoders import PUBLISHED
from vlm import build, config
from vlm.launch import probe
from vlm.launch.entry import CONF
from vlm.launch.plan import build_meta, describe, memory_gb
from vlm.llms.bytes import byte_tokenizer
from vlm.training import run

TINY = ["llm=tiny", "encoder=tiny", "trainer=cpu", "plan.probe=false", "run_dir=x"]
CONNECTORS = sorted(path.stem for path in (Path(CONF) / "connector").glob("*.yaml"))
# Dv = D = 64 and an 8×8 grid: two matrices with biases, the norm, a position for each of the 64 visual tokens.
CONNECTOR = 2 * (64 * 64 + 64) + 2 * 64 + 64 * 64
# Per block 2 norms, 3·64 + 64 columns of attention and a perceptron of width 256; a class token, positions, patches.
ENCODER = 2 * (2 * 128 + 64 * 192 + 192 + 64 * 64 + 64 + 2 * 64 * 256 + 256 + 64) + 64 + 65 * 64 + 3 * 8 * 8 * 64 + 64
WHOLE = ENCODER + (28 * 28 - 8 * 8) * 64 + 2 * 64  # its positions at 224 pixels, and the last norm, which nothing reads
LINEAR = 2 * (64 * (64 + 2 * 32 + 64) + 3 * 64 * 128)  # q, k and v of half as many heads, o; gate, up, down
LLM = 320 * 64 + LINEAR + 5 * 64  # the table, which is also the output matrix, counts once; five norms


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a plan opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def settings(*overrides: str, weights: str = "meta") -> dict[str, Any]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        composed = config.plain(compose("train", [*TINY, *overrides]))
    for part in ("encoder", "llm"):
        composed[part]["weights"] = weights
    return composed


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., int]:
    """train.py with these arguments; its exit code."""
    return partial(programs.train, *TINY[:-1], f"run_dir={tmp_path / 'run'}")


@pytest.mark.parametrize("order", [("plan=true", "plan.json={}"), ("plan.json={}", "plan=true"), ("plan.json={}",)])
def test_a_plan_is_printed_and_written_and_leaves_no_run(
    train: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str], order: tuple[str, ...]
) -> None:
    file = tmp_path / "plan.json"
    assert train("trainer.precision=32-true", *(argument.format(file) for argument in order)) == 0
    plan = json.loads(file.read_text())
    assert plan["parts"] == {
        "encoder": {"total": WHOLE, "loaded": ENCODER, "trainable": 0},
        "connector": {"total": CONNECTOR, "trainable": CONNECTOR},
        "llm": {"total": LLM, "trainable": 0},
    }
    assert plan["visual_tokens_per_image"] == 64
    assert plan["tokens_per_sample"] > 64
    assert plan["precision"] == "32-true"
    assert set(plan["memory_gb"]) == {"weights", "gradients", "optimizer_states", "total"}
    printed = capfd.readouterr().out
    for words in (
        "Trainable parameters",
        f"{LLM:,}",
        "Plan at precision 32-true",
        "mean of 16 samples, with a byte tokenizer",
    ):
        assert words in printed
    assert row(printed, "encoder: loaded and run") == [f"{ENCODER:,}", f"of {WHOLE:,} parameters"]
    assert row(printed, "visual tokens per image") == ["64", ""]
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_without_a_probe_nothing_runs(train: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "run_apart", lambda *_: pytest.fail("a probe was started"))
    assert train("plan=true") == 0


def test_where_a_probe_cannot_run_the_sizes_are_shown(
    train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("its process was killed by signal 9")

    monkeypatch.setattr(probe, "run_apart", fail)
    assert train("plan=true", f"plan.json={tmp_path / 'plan.json'}", "plan.probe=true") == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["probe"] == {"error": "its process was killed by signal 9"}
    assert "activations" not in plan["memory_gb"]
    printed = capfd.readouterr().out
    assert "Neither activations nor seconds were measured: its process was killed by signal 9\n" in printed
    assert row(printed, "memory: total")[1] == "without activations"


def row(printed: str, quantity: str) -> list[str]:
    (line,) = [line for line in printed.splitlines() if quantity in line]
    return [cell.strip() for cell in line.strip("│").split("│")[1:]]


def test_a_plan_without_data(train: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train("plan=true", "plan.probe=true", f"plan.json={tmp_path / 'plan.json'}", "data=captions") == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["tokens_per_sample"] is None
    assert plan["parts"]["connector"]["total"] == CONNECTOR
    printed = capfd.readouterr().out
    assert "unknown" in printed
    assert "Neither activations nor seconds were measured: there are no data to take a step with" in printed


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("plan=perhaps", "plan.show='perhaps' must be true or false"),
        ("plan.jsn=x", "there is no option plan.jsn; did you mean json?"),
    ],
)
def test_a_slip(train: Callable[..., int], capfd: pytest.CaptureFixture[str], override: str, said: str) -> None:
    assert train(override) == 2
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(("precision", "frozen", "trained"), [("32-true", 4, 4), ("bf16-mixed", 2, 4)])
def test_memory_at_a_precision(precision: str, frozen: int, trained: int) -> None:
    memory = describe(*planned(f"trainer.precision={precision}"))[0]["memory_gb"]
    expected = {
        "weights": (ENCODER + LLM) * frozen + CONNECTOR * trained,
        "gradients": CONNECTOR * trained,
        "optimizer_states": 2 * CONNECTOR * trained,
        "total": (ENCODER + LLM) * frozen + 4 * CONNECTOR * trained,
    }
    assert memory == pytest.approx({name: size / 1e9 for name, size in expected.items()}, rel=1e-12)


def test_an_average_is_one_more_copy_of_what_trains() -> None:
    plain, averaged = (describe(*planned(f"stage.ema_decay={decay}"))[0]["memory_gb"] for decay in ("null", 0.999))
    copy = 4 * CONNECTOR / 1e9
    assert averaged == pytest.approx({**plain, "average": copy, "total": plain["total"] + copy}, rel=1e-12)


def planned(*overrides: str) -> tuple[dict[str, Any], Any]:
    cfg = settings(*overrides)
    return cfg, build_meta(cfg)[0]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("changes", [["stage=instruct"], ["stage=full", "stage.encoder={last_n: 1}"]], ids=str)
def test_the_plan_is_of_the_model_that_trains(changes: list[str], precision: str) -> None:
    overrides = [*changes, f"trainer.precision={precision}"]
    real = settings(*overrides, weights="random")
    model, _ = build.build_model(real)
    build.build_module(real, model, build.build_objective(real))
    _, meta = planned(*overrides)
    assert run.count_parameters(meta) == run.count_parameters(model)
    assert memory_gb(meta, quantization="none") == memory_gb(model, quantization="none")
    assert [(n, p.shape, p.dtype) for n, p in meta.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in model.named_parameters()
    ]


@pytest.mark.parametrize(("quantization", "bits"), [("int8", 8), ("nf4", 4 + 8 / 64 + 32 / 64 / 256)])
def test_quantized_weights_count_in_their_bits_and_an_adapter_in_full(quantization: str, bits: float) -> None:
    _, model = planned("stage=instruct", "trainer.precision=bf16-mixed")
    plain, quantized = (memory_gb(model, quantization=kind) for kind in ("none", quantization))
    saved = LINEAR * (2 - bits / 8) / 1e9
    assert quantized == pytest.approx({**plain, "weights": plain["weights"] - saved, "total": plain["total"] - saved})


def test_an_adapter_of_an_earlier_stage_is_counted(tmp_path: Path) -> None:
    lora = {"r": 2, "alpha": 4, "dropout": 0.0, "target_modules": ["q_proj"]}
    (tmp_path / "artifact").mkdir()
    earlier = Path(__file__).parents[1] / "earlier_runs" / "2026_11_25" / "instruct" / "artifact" / "manifest.json"
    manifest = {**json.loads(earlier.read_text()), "lora": lora}
    (tmp_path / "artifact" / "manifest.json").write_text(json.dumps(manifest))
    cfg, model = planned(f"ckpt={tmp_path}")
    assert describe(cfg, model)[0]["parts"]["llm"] == {"total": LLM + 2 * 2 * (64 + 64), "trainable": 0}


@pytest.mark.parametrize(("size", "visual"), [(64, 64), (32, 16)])
def test_tokens_per_sample_are_those_of_the_rows(tmp_path: Path, size: int, visual: int) -> None:
    captions = ["a red square", "a circle", "two grey dots and a line"]
    for index, caption in enumerate(captions):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{index}.png")
        with open(tmp_path / "captions.jsonl", "a") as file:
            file.write(json.dumps({"image": f"{index}.png", "caption": caption}) + "\n")
    names = {"annotations": tmp_path / "captions.jsonl", "val_annotations": tmp_path / "captions.jsonl"}
    paths = [f"data.{key}={value}" for key, value in {**names, "images": tmp_path}.items()]
    report, remark = describe(*planned("data=captions", *paths, "data.prompt=What?", f"encoder.image_size={size}"))
    marks = 1 + 2 * 2  # begin of text; begin and end of each turn
    written = marks + len("user\n" + "What?" + "\n" + "assistant\n" + "\n")
    assert report["visual_tokens_per_image"] == visual
    assert report["tokens_per_sample"] == pytest.approx(visual + written + sum(map(len, captions)) / 3)
    assert remark == "mean of 3 samples, with a byte tokenizer"


@pytest.mark.parametrize("loader", [[], ["data.batching=tokens", "data.batch_tokens=1024"]], ids=str)
def test_steps_are_those_of_the_data(loader: list[str]) -> None:
    """Where batches hold tokens too, whose limit is below the length of the rows that a plan reads."""
    report, _ = describe(*planned("data.num_train=40", "data.batch_size=8", "data.epochs=2", *loader))
    tokens = report["tokens_per_sample"]
    assert report["steps"] == (math.ceil(80 * tokens / 1024) if loader else 10)
    assert tokens > 64


def test_the_llms_own_tokenizer_counts_where_it_is_local(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["assistant"])  # 9 bytes of every row
    tokenizer.save_pretrained(tmp_path)
    (other, _), (own, remark) = (describe(*planned(f"llm.pretrained={name}")) for name in ("null", tmp_path))
    assert own["tokens_per_sample"] == other["tokens_per_sample"] - 8
    assert remark == "mean of 16 samples, with the LLM's own tokenizer"


@pytest.mark.parametrize("connector", CONNECTORS)
def test_every_connector_can_be_planned(connector: str) -> None:
    """Those of encoders and LLMs on the meta device are tested with them."""
    _, model = planned(f"connector={connector}", "trainer.precision=bf16-mixed")
    assert {parameter.device for parameter in model.parameters()} == {torch.device("meta")}
    assert run.count_parameters(model)["connector"]["trainable"] > 0


# Of google/gemma-3-270m, whose output matrix is its table, and of meta-llama/Meta-Llama-3-8B-Instruct, where it is not.
@pytest.mark.parametrize(("llm", "total"), [("gemma3_270m", 268_098_176), ("llama3_8b", 8_030_261_248)])
def test_the_llm_has_its_published_size(llm: str, total: int) -> None:
    _, model = planned(f"llm={llm}")
    assert run.count_parameters(model)["llm"] == {"total": total, "trainable": 0}


@pytest.mark.parametrize("encoder", ["clip_vit_l14_336", "efficientnet_lite0"])
def test_the_encoder_has_its_published_size_and_the_memory_of_what_runs(encoder: str) -> None:
    cfg, model = planned(f"encoder={encoder}", "trainer.precision=bf16-mixed", "preflight.samples=1")
    report, _ = describe(cfg, model)
    loaded = sum(parameter.numel() for parameter in model.encoder.parameters())
    assert report["parts"]["encoder"] == {"total": PUBLISHED[encoder][0], "loaded": loaded, "trainable": 0}
    assert loaded < PUBLISHED[encoder][0]
    connector = sum(parameter.numel() for parameter in model.connector.parameters())
    assert report["memory_gb"]["weights"] == pytest.approx((2 * (loaded + LLM) + 4 * connector) / 1e9)


def test_a_plan_with_tiles_tells_the_most_tokens_of_an_image(
    train: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    grids = "encoder.tiles.grids=[[1,1],[1,3],[2,2]]"  # a picture and 2×2 tiles; a grid of one is the picture alone
    assert train("plan=true", f"plan.json={tmp_path / 'plan.json'}", grids, "encoder.image_size=32") == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert (plan["visual_tokens_per_image"], plan["visual_tokens_per_tile"]) == (5 * 16, 16)
    assert row(capfd.readouterr().out, "visual tokens per image") == ["80", "at most: 5 tiles of 16"]
    assert plan["tokens_per_sample"] > 80
