"""Stored features: those of the encoder rounded once, whoever has encoded the image, and whatever was killed."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.parts import IMAGES, ROWS, make_batch, pictures, tiny_encoder, tiny_model
from vlm.data.collate import image_key
from vlm.evaluation.visual_gain import compared
from vlm.objectives.language_modeling import LanguageModeling
from vlm.schema import Batch
from vlm.training.feature_store import HEADER, KEY, FeatureStore

ENCODER = tiny_encoder().requires_grad_(False).eval()
PIXELS = torch.stack(pictures(6))
KEYS = [image_key(image) for image in PIXELS]
ROUNDED = torch.cat([ENCODER(image[None]) for image in PIXELS]).bfloat16().float()


def store_in(folder: Path) -> FeatureStore:
    return FeatureStore(folder=folder, encoder=ENCODER)


def ask(store: FeatureStore, *numbers: int) -> Tensor:
    return store(PIXELS[list(numbers)], [KEYS[number] for number in numbers])


def in_process(work: Callable[[], Any]) -> int:
    """Do the work in a process of its own; its exit code."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def test_features_are_rounded_before_their_first_use(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    for _ in range(2):
        assert torch.equal(ask(store, 0, 1, 2), ROUNDED[:3])
    assert (store.num_encoded, len(store)) == (3, 3)
    assert not torch.equal(ENCODER(PIXELS[:3]), ROUNDED[:3])


def test_only_missing_images_are_encoded_and_each_once(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    ask(store, 0, 2)
    assert torch.equal(ask(store, 3, 0, 3, 1, 2, 0), ROUNDED[[3, 0, 3, 1, 2, 0]])
    assert store.num_encoded == 4


def test_a_batch_without_images(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    assert store(PIXELS[:0], []).shape == (0, *ROUNDED.shape[1:])
    assert store.num_encoded == 0


def test_another_process_finds_what_was_flushed(tmp_path: Path) -> None:
    first, second = store_in(tmp_path), store_in(tmp_path)
    ask(first, 0, 1)
    first.flush()
    ask(first, 2)
    assert torch.equal(ask(second, 1, 0), ROUNDED[[1, 0]])
    assert second.num_encoded == 0
    ask(second, 2)
    assert second.num_encoded == 1, "its features have no key yet"
    third = store_in(tmp_path)
    assert (len(third), KEYS[0] in third, KEYS[2] in third) == (2, True, False)


def test_processes_that_write_at_the_same_time(tmp_path: Path) -> None:
    """Each encodes four of six images, some of them the same, one by one."""

    def work(start: int) -> None:
        torch.set_num_threads(1)
        store = store_in(tmp_path)
        store.max_unflushed = 0
        for number in range(start, start + 4):
            assert torch.equal(ask(store, number), ROUNDED[[number]])

    processes = [multiprocessing.get_context("fork").Process(target=work, args=(start,)) for start in (0, 1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    store = store_in(tmp_path)
    assert torch.equal(ask(store, *range(6)), ROUNDED)
    assert store.num_encoded == 0


def test_a_killed_process_leaves_what_it_flushed(tmp_path: Path) -> None:
    def work() -> None:
        torch.set_num_threads(1)
        store = store_in(tmp_path)
        ask(store, 0, 1)
        store.flush()
        ask(store, 2)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_process(work) == -signal.SIGKILL
    store = store_in(tmp_path)
    assert len(store) == 2
    assert torch.equal(ask(store, 0, 1, 2), ROUNDED[:3])
    assert store.num_encoded == 1


@pytest.mark.parametrize(
    ("end", "left", "num_encoded"),
    [
        (".features", 5, 1),  # half of the last of three: the disk was full, or the machine crashed
        (".features", 0, 3),
        (".keys", HEADER + 2 * KEY + 7, 1),  # half a key
        (".keys", HEADER - 7, 3),  # half a header
        (".keys", 0, 3),
    ],
)
def test_a_truncated_file(tmp_path: Path, end: str, left: int, num_encoded: int) -> None:
    store = store_in(tmp_path)
    ask(store, 0, 1, 2)
    store.flush()
    (file,) = tmp_path.glob(f"*{end}")
    os.truncate(file, left if end == ".keys" else left * store.image_bytes // 2)
    later = store_in(tmp_path)
    assert torch.equal(ask(later, 0, 1, 2), ROUNDED[:3])
    assert later.num_encoded == num_encoded
    later.flush()
    assert ask(last := store_in(tmp_path), 0, 1, 2).shape == ROUNDED[:3].shape
    assert last.num_encoded == 0


def test_removed_files_are_encoded_again(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    ask(store, 0, 1)
    for file in tmp_path.iterdir():
        file.unlink()
    assert torch.equal(ask(store, 0, 1), ROUNDED[:2])
    assert store.num_encoded == 4


def test_a_full_disk_stores_nothing_more(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The run goes on, with the same features."""
    store, before = store_in(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    ask(store, 0)
    store.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (store.image_bytes, before[1]))
    try:
        for _ in range(2):
            assert torch.equal(ask(store, 0, 1), ROUNDED[:2])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    store.flush()
    assert store.num_encoded == 3
    assert "The feature cache cannot be written (File too large)" in " ".join(capfd.readouterr().out.split())
    assert len(store_in(tmp_path)) == 1


def with_keys(batch: Batch) -> Batch:
    return replace(batch, image_keys=tuple(map(image_key, batch.pixel_values)))


def loss_and_gradients(model: Any, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    output = LanguageModeling()(model, batch)
    output.sums["lm_loss"].backward()
    gradients = {name: p.grad.clone() for name, p in model.connector.named_parameters() if p.grad is not None}
    return {"loss": output.sums["lm_loss"].detach(), **gradients}


def test_loss_and_gradients_are_those_of_the_encoder_up_to_rounding(tmp_path: Path) -> None:
    model = tiny_model()
    model.encoder.requires_grad_(False).eval()
    batch = with_keys(make_batch(*ROWS, images=IMAGES))
    plain = loss_and_gradients(model, batch)
    model.feature_cache = lambda pixel_values, keys: model.encoder(pixel_values).bfloat16().float()
    rounded = loss_and_gradients(model, batch)
    model.feature_cache = FeatureStore(folder=tmp_path, encoder=model.encoder)
    for _ in range(2):  # first encoded, then read
        cached = loss_and_gradients(model, batch)
        assert cached.keys() == plain.keys()
        assert len(cached) == 8
        for name in cached:
            torch.testing.assert_close(cached[name], rounded[name], rtol=1e-5, atol=1e-6)
            assert (cached[name] - plain[name]).norm() < 0.01 * plain[name].norm(), name
    assert model.feature_cache.num_encoded == 4
    assert cached["loss"] != plain["loss"]


def test_swapped_and_blank_images_have_their_own_features(tmp_path: Path) -> None:
    """The loss without an image is not that with the cached one."""
    model = tiny_model()
    model.encoder.requires_grad_(False).eval()
    parts, _ = compared(with_keys(make_batch(*ROWS, images=IMAGES)))
    plain = {name: loss_and_gradients(model, batch)["loss"] for name, batch in parts.items()}
    model.feature_cache = FeatureStore(folder=tmp_path, encoder=model.encoder)
    for name, batch in parts.items():
        assert batch.image_keys == tuple(map(image_key, batch.pixel_values))
        torch.testing.assert_close(loss_and_gradients(model, batch)["loss"], plain[name], rtol=1e-3, atol=0)
    assert model.feature_cache.num_encoded == 4 + 1
    assert len({round(float(loss), 3) for loss in plain.values()}) == 3
