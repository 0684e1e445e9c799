"""`data.feature_cache`: who encodes which image, what a run says about it, and where it is left out."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.encoders import build_encoder
from tests.helpers.parts import tiny_encoder
from tests.helpers.programs import QUICK, assert_same_run, losses, train, until_stopped
from vlm.callbacks import feature_cache
from vlm.callbacks.feature_cache import Estimate, store_folder
from vlm.encoders.timm import TimmEncoder
from vlm.training.feature_store import Costs

# 12 images, read twice; the validation and the answers have 2 of their own, and blank ones.
OPTIONS = [*QUICK, "data.num_train=12", "data.batch_size=4", "trainer.max_steps=6", "trainer.val_check_interval=6"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of images in each call of an encoder."""
    calls: list[int] = []
    forward = TimmEncoder.forward

    def counting(self: TimmEncoder, pixel_values: Tensor) -> Tensor:
        calls.append(len(pixel_values))
        return forward(self, pixel_values)

    monkeypatch.setattr(TimmEncoder, "forward", counting)
    return calls


def said(capfd: pytest.CaptureFixture[str]) -> str:
    (line,) = re.findall(r"^perf: (cache=.*)$", capfd.readouterr().out, re.MULTILINE)
    return str(line)


def test_a_sweep_encodes_each_image_once(tmp_path: Path, cache: Path, encoded: list[int]) -> None:
    """The second job, with another connector, does not run the encoder."""
    sweep = ["connector=linear,mlp", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    assert train("-m", *OPTIONS, *sweep, "data.feature_cache=on") == 0
    assert len(encoded) == 12 + 2 + 1 + 3  # blank image; timed
    jobs = sorted(path.parent for path in (tmp_path / "sweep").rglob("metrics.json"))
    assert [job.name for job in jobs] == ["connector=linear", "connector=mlp"]
    (folder,) = cache.iterdir()
    assert folder.name.startswith("TimmEncoder-")
    assert sum(file.stat().st_size for file in folder.glob("*.features")) == 15 * (16 * 64) * 2  # patches, width, bytes


def test_losses_are_those_of_the_encoder_up_to_rounding(tmp_path: Path) -> None:
    for name in ("on", "off"):
        options = ["trainer.precision=32-true", f"data.feature_cache={name}", f"run_dir={tmp_path / name}"]
        assert train(*OPTIONS, *options) == 0
    on, off = (losses(tmp_path / name) for name in ("on", "off"))
    assert [step for step, _ in on] == [step for step, _ in off]
    for (_, cached), (_, plain) in zip(on, off, strict=True):
        assert cached.keys() == plain.keys()
        for name in (name for name in plain if "loss" in name):
            assert cached[name] == pytest.approx(plain[name], rel=2e-3)
    assert on != off


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second epoch: features are lost, others are there that the run would have made later."""
    options = [*OPTIONS, "data.feature_cache=on", "trainer.max_steps=12", "callbacks.save.every_n_steps=2"]
    options += ["data.num_train=18", "stage=instruct"]
    assert train(*options, f"run_dir={tmp_path / 'whole'}") == 0
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "other"))
    run = tmp_path / "killed"
    assert until_stopped(options, run, signal.SIGKILL, after=3) == -signal.SIGKILL
    assert len(list((tmp_path / "other" / "features").glob("*/*.features"))) == 1
    assert train(f"resume={run}") == 0
    assert len(list((tmp_path / "other" / "features").glob("*/*.features"))) == 2
    assert_same_run(run, tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["stage=vision_tune"], r"cache=off: the encoder is trained \(stage\.encoder\)"),
        (["data.augment={crop:0.5}"], r"cache=off: data\.augment changes an image each time it is read"),
        (["data.feature_cache=auto", "data.num_train=1000"], r"cache=off: the run reads at most one epoch, so no .*"),
        (
            ["data.feature_cache=auto", "data.num_train=4"],
            r"cache=off: it would save -?0 s, less than 60 s \([0-9.]+ MB of features, 0% .*",
        ),
    ],
)
def test_where_features_are_not_cached(
    options: list[str], message: str, tmp_path: Path, cache: Path, encoded: list[int], capfd: Any
) -> None:
    few = ["data.feature_cache=on", "trainer.max_steps=2", "trainer.val_check_interval=2"]
    assert train(*OPTIONS, *few, *options, f"run_dir={tmp_path / 'run'}") == 0
    assert re.fullmatch(message, said(capfd))
    assert max(encoded) == 4, "batches as they are"
    assert [*cache.rglob("*.features")] == []


def test_auto_uses_what_another_run_has_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[int], capfd: Any
) -> None:
    """It reads less than an epoch. A resumed run keeps to it, whatever the estimate says by then."""
    few = ["trainer.max_steps=2", "trainer.val_check_interval=2", "data.feature_cache=auto"]
    assert train(*OPTIONS, "data.feature_cache=on", f"run_dir={tmp_path / 'first'}") == 0
    assert re.search(
        r"^cache=on: .*/TimmEncoder-\w+ \([0-9.]+ MB of features, 0% of them stored; 2 epochs, ", said(capfd)
    )
    monkeypatch.setattr(feature_cache, "MIN_SECONDS", -1)
    encoded.clear()
    assert train(*OPTIONS, *few, f"run_dir={tmp_path / 'second'}") == 0
    assert re.search(r"MB of features, 100% of them stored; 0\.67 epochs, it pays from the start\)$", said(capfd))
    assert len(encoded) == 3  # timed
    monkeypatch.setattr(feature_cache, "MIN_SECONDS", 1e9)
    more = ["trainer.max_steps=4", "resume.allow=[trainer.max_steps]"]
    assert train(f"resume={tmp_path / 'second'}", *more) == 0
    assert said(capfd) == "cache=on: as before this run was resumed"
    assert len(encoded) == 3


def test_each_encoder_has_a_folder_of_its_own() -> None:
    def folder(encoder: Any, precision: str = "32-true", **options: Any) -> Path:
        model: Any = SimpleNamespace(encoder=encoder, feature_part="encoder")
        of_config = {"patch_size": 8}
        manifest = {"parts": {"encoder": {"layer": -1, **options}}, "bases": {"encoder": {"config": of_config}}}
        return store_folder(model, manifest, precision=precision)

    same = folder(tiny_encoder())
    assert folder(tiny_encoder()) == same
    changed = tiny_encoder()
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1e-6
    others = [
        folder(changed),
        folder(tiny_encoder(seed=2)),
        folder(tiny_encoder().bfloat16()),
        folder(build_encoder("convnext_b_224")),
        folder(tiny_encoder(), "bf16-mixed"),
        folder(tiny_encoder(), layer=-2),
        folder(tiny_encoder(), image_size=[32, 32]),
        folder(tiny_encoder(), transform={"resize": "pad"}),
    ]
    assert len({same, *others}) == 1 + len(others)


COSTS = Costs(encode=0.1, store=0.02, load=0.01)


def test_when_caching_pays() -> None:
    """Of 1,000 images read 3 times: 300 s of encoding, or 100 + 20 s of encoding and storing, and 2,000 reads."""
    new = Estimate(epochs=3, num_images=1000, held=0, image_bytes=10**6, costs=COSTS, free=10**12)
    assert new.seconds_saved == pytest.approx(300 - 120 - 20)
    assert new.pays_after == pytest.approx(1 + 0.02 / 0.09)
    assert new.objection() is None
    assert str(new) == "1.00 GB of features, 0% of them stored; 3 epochs, it pays after 1.2 epochs"
    half = Estimate(epochs=3, num_images=1000, held=0.5, image_bytes=10**6, costs=COSTS, num_ranks=2)
    assert half.seconds_saved == pytest.approx((300 - 60 - 25) / 2)
    assert half.pays_after == pytest.approx(0.5 + 0.01 / 0.09)
    part = Estimate(epochs=0.5, num_images=1000, held=0, image_bytes=10**6, costs=COSTS)
    assert part.seconds_saved == pytest.approx(-500 * 0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"free": 4.9e9}, "the features need 1.00 GB, more than 20% of the free 5 GB"),
        ({"epochs": 1}, "it would save -20 s, less than 60 s"),
        ({"costs": Costs(0.01, 0.02, 0.01)}, "it would save -20 s, less than 60 s"),
        ({"num_ranks": 3}, "it would save 53 s, less than 60 s"),
    ],
)
def test_why_auto_leaves_it(changes: dict[str, Any], message: str) -> None:
    known = {"epochs": 3, "num_images": 1000, "held": 0, "image_bytes": 10**6, "costs": COSTS, "free": 10**12}
    assert Estimate(**{**known, **changes}).objection() == message


def test_an_encoder_as_fast_as_the_disk_never_pays() -> None:
    estimate = Estimate(epochs=3, num_images=1000, held=0, image_bytes=10**6, costs=Costs(0.01, 0.02, 0.01))
    assert str(estimate).endswith("it never pays, because reading takes as long as encoding")
