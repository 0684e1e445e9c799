"""Batches: padding, places of images, bad samples, workers, prompts."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from itertools import chain, islice
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.helpers.sources import K, Numbered, numbered, pixels
from tests.helpers.text import byte_tokenizer
from vlm.data.batching import EvenBatches
from vlm.data.datamodule import VLMDataModule
from vlm.data.reading import Reading, current
from vlm.evaluation.visual_gain import VisualGain
from vlm.schema import IGNORE, Batch, Sample, VisualSpec


def epoch(data: VLMDataModule, num: int = 1) -> list[Batch]:
    """The training batches, three of four samples, of an epoch or several."""
    return list(islice(data.train_dataloader(), 3 * num))


def equal(a: Batch, b: Batch) -> bool:
    tensors = [f.name for f in fields(Batch) if isinstance(getattr(a, f.name), Tensor)]
    return a.ids == b.ids and all(torch.equal(getattr(a, n), getattr(b, n)) for n in tensors)


@pytest.mark.parametrize(("num", "size"), [(9, 4), (5, 4), (8, 4), (2, 4), (3, 2), (33, 32)])
def test_even_batches(num: int, size: int) -> None:
    batches = list(EvenBatches(range(num), batch_size=size))
    lengths = [len(batch) for batch in batches]
    assert list(chain(*batches)) == [[index] for index in range(num)]
    assert len(batches) == len(EvenBatches(range(num), batch_size=size)) == -(-num // size)
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) <= size


def test_training_rows_are_padded_on_the_right() -> None:
    batch = next(iter(numbered().val_dataloader()))
    lengths = batch.attention_mask.sum(1)
    assert batch.ids == ["val/0", "val/1", "val/2", "val/3"]
    longest = batch.input_ids.shape[1]
    for row, length in enumerate(lengths):
        assert batch.attention_mask[row].tolist() == [True] * length + [False] * (longest - length)
        assert batch.position_ids[row, :length].tolist() == list(range(length))
        assert (batch.labels[row, length:] == IGNORE).all()
    assert batch.image_mask.sum(1).tolist() == [K * n for n in (0, 1, 2, 0)]
    assert batch.num_images.tolist() == [0, 1, 2, 0]
    # Every answer is its letters and the end of turn, and nothing else is supervised.
    x = byte_tokenizer().convert_tokens_to_ids("x")
    assert [(row == x).sum().item() for row in batch.labels] == [1, 2, 3, 4]
    assert (batch.labels != IGNORE).sum(1).tolist() == [2, 3, 4, 5]
    assert (batch.labels[batch.image_mask] == IGNORE).all()
    assert len(batch.targets) == batch.logits_mask.sum() == 14


def test_images_lie_in_the_order_of_rows_and_placeholders() -> None:
    batch = next(iter(numbered().val_dataloader()))
    assert batch.pixel_values.shape == (3, 3, 4, 4)
    assert batch.pixel_values[:, :2, 0, 0].tolist() == [[1, 0], [2, 0], [2, 1]]  # (sample, image)
    assert all(not sample.images for sample in batch.samples)


def test_images_before_counts_the_images_that_have_started() -> None:
    batch = next(iter(numbered().val_dataloader()))
    assert not batch.images_before[0].any()
    row, mask = batch.images_before[2], batch.image_mask[2]
    places = mask.nonzero().flatten().tolist()
    assert row[places].tolist() == [1] * K + [2] * K
    assert (row[: places[0]] == 0).all()
    length = batch.attention_mask[2].sum()
    assert (row[places[-1] : length] == 2).all()


def test_a_batch_without_images() -> None:
    data = numbered()
    (batch,) = data.prompts([0, 3], 4)
    assert batch.pixel_values.shape == (0, 3, 4, 4)
    assert batch.num_images.tolist() == [0, 0]


def test_prompts_end_before_the_answer_and_hold_no_label() -> None:
    data = numbered()
    (batch,) = data.prompts([2, 7], 4)  # two images and one
    assert (batch.labels == IGNORE).all()
    lengths = batch.attention_mask.sum(1).tolist()
    assert lengths[0] - lengths[1] == K
    for row, length in enumerate(lengths):
        start = batch.input_ids.shape[1] - length
        assert batch.attention_mask[row].tolist() == [False] * start + [True] * length
        assert batch.position_ids[row, start:].tolist() == list(range(length))
        words = batch.input_ids[row, start:][~batch.image_mask[row, start:]]
        assert byte_tokenizer().decode(words) == "<bos><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_validation_is_spread_over_the_split() -> None:
    data = numbered(num_val_samples=4)
    assert data.val_indices(4) == [0, 3, 6, 9]
    assert data.val_indices(None) == list(range(12)) == data.val_indices(99)
    assert [b.ids for b in data.val_dataloader()] == [["val/0", "val/3", "val/6", "val/9"]]
    assert [len(b.ids) for b in numbered(num_val_samples=9).val_dataloader()] == [3, 3, 3]


def test_training_order_is_of_the_seed() -> None:
    orders = [[b.ids for b in epoch(numbered(seed=seed))] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(chain(*orders[0])) == sorted(f"train/{i}" for i in range(12))


def test_workers_give_the_same_batches() -> None:
    alone, together = epoch(numbered()), epoch(numbered(num_workers=2))
    assert all(equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_samples_are_named_and_replaced(tmp_path: Path, num_workers: int) -> None:
    data = numbered(tmp_path, bad=(3, 4), max_bad_ratio=0.2, num_workers=num_workers)
    batches = epoch(data, 2)
    for part in (batches[:3], batches[3:]):  # a second epoch names none again
        ids = sorted((name for batch in part for name in batch.ids), key=lambda name: int(name.split("/")[1]))
        assert ids == [f"train/{i}" for i in (0, 1, 2, 5, 6, 7, 8, 9, 10, 10, 11, 11)]  # strides of 7
    lines = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    named = {line.pop("index"): line for line in lines}
    assert named == {
        i: {"split": "train", "kind": "other_defect", "error": f"sample 'train/{i}' is broken; mend it"} for i in (3, 4)
    }
    if num_workers == 0:
        assert len(lines) == 2


def test_a_run_that_goes_on_knows_the_bad_samples_it_has_named(tmp_path: Path) -> None:
    epoch(numbered(tmp_path, bad=(3, 4), max_bad_ratio=0.2))
    file = tmp_path / "bad_samples.jsonl"
    named = file.read_text()
    file.write_text(named + '{"split": "val", "index": 5, "kind": "too_long"}\n{"spl')
    epoch(numbered(tmp_path, bad=(3, 4), max_bad_ratio=0.2))
    assert file.read_text().startswith(named)
    assert file.read_text().count("\n") == 3  # none is named twice
    with pytest.raises(ValueError, match=r"sample 'train/5' is broken; mend it \(3 bad samples of 12, 2 allowed: rep"):
        epoch(numbered(tmp_path, bad=(5,), max_bad_ratio=0.2))


def test_rows_that_were_left_out_or_cut_are_counted(tmp_path: Path) -> None:
    longest = len(numbered().text.encode(Sample("a", [], Numbered("train")[11].messages)).input_ids)
    for too_long, kind in (("drop", "too_long"), ("truncate_text", "truncated")):
        data = numbered(max_length=longest - 1, max_bad_ratio=0.1, too_long=too_long)
        data.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
        assert data.counts() == {}
        epoch(data, 2)
        assert data.counts() == {f"train/num_{kind}": 1}
        list(data.val_dataloader())
        assert data.counts() == {f"train/num_{kind}": 1, f"val/num_{kind}": 1}


@pytest.mark.parametrize(
    ("options", "allowed"), [({"on_bad_sample": "raise", "max_bad_ratio": 0.5}, 0), ({"max_bad_ratio": 0.1}, 1)]
)
def test_too_many_bad_samples_stop_the_run(tmp_path: Path, options: dict, allowed: int) -> None:
    data = numbered(tmp_path, bad=(3, 4, 5), **options)
    message = rf"sample 'train/\d' is broken; mend it \({allowed + 1} bad samples? of 12, {allowed} allowed: repair"
    with pytest.raises(ValueError, match=message):
        epoch(data)


@pytest.mark.parametrize(("share", "allowed"), [(0.0, 0), (0.01, 1), (0.25, 3)])
def test_one_bad_sample_of_a_few_is_allowed(share: float, allowed: int) -> None:
    data = numbered(max_bad_ratio=share, bad=tuple(range(allowed)))
    assert len(epoch(data)) == 3
    with pytest.raises(ValueError, match=rf"of 12, {allowed} allowed: repair them"):
        epoch(numbered(max_bad_ratio=share, bad=tuple(range(allowed + 1))))


def test_no_share_is_named_that_leaves_no_sample() -> None:
    with pytest.raises(ValueError, match=r"\(2 bad samples of 2, 1 allowed: repair them\)$"):
        epoch(numbered(bad=(0, 1), size=2, batch_size=1))


def test_a_split_of_bad_samples_ends(tmp_path: Path) -> None:
    data = numbered(bad=tuple(range(12)), max_bad_ratio=1.0)
    data.splits["val"].bad = tuple(range(12))
    message = r"none of the 12 samples of {} can be used; repair the data, for example: sample '{}/\d+' is broken"
    with pytest.raises(ValueError, match=message.format("train", "train")):
        epoch(data)
    with pytest.raises(ValueError, match=message.format("val", "val")):
        list(data.val_dataloader())
    with pytest.raises(ValueError, match=message.format("val", "val")):
        list(data.prompts([0, 3], 2))


def test_limits_hold_where_sources_are_made_and_read(tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []

    class Reads(Numbered):
        def __init__(self, split: str) -> None:
            seen.append(("made", current().max_files))
            super().__init__(split)

        def __getitem__(self, index: int) -> Sample:
            seen.append(("read", current().max_files))
            return super().__getitem__(index)

    data = VLMDataModule(source=Reads, reading={"max_files": 7, "max_characters": 8})
    spec = VisualSpec(num_tokens=K, image_size=(4, 4), transform=pixels)
    data.connect(spec=spec, tokenizer=byte_tokenizer(), chat_template="chatml")
    with pytest.raises(ValueError, match=r"sample 'val/\d+' has \d+ characters, more than the limit of 8"):
        list(data.val_dataloader())
    assert set(seen) == {("made", 7), ("read", 7)}
    assert current() == Reading()


def test_a_row_that_is_too_long_is_a_bad_sample(tmp_path: Path) -> None:
    whole = len(numbered().text.encode(Sample("a", [], Numbered("train")[11].messages)).input_ids)
    data = numbered(tmp_path, max_length=whole - 1, max_bad_ratio=0.1)
    assert "train/11" not in [name for b in epoch(data) for name in b.ids]
    error = json.loads((tmp_path / "bad_samples.jsonl").read_text())["error"]
    assert "'train/11'" in error
    assert f"{whole}" in error
    assert f"{whole - 1}" in error


def test_a_split_needs_two_samples() -> None:
    with pytest.raises(ValueError, match="the train split has 1 sample and needs at least 2; give more data, or set"):
        numbered(size=1)


def test_the_comparison_is_that_of_the_batches_of_all_ranks() -> None:
    """Four pictures, the first two alike and the last two, which two ranks do not see together."""

    class Pairs(Numbered):
        def __getitem__(self, index: int) -> Sample:
            picture = Image.new("RGB", (8, 8), (index // 2, 0, 0))
            return replace(super().__getitem__(1), images=[picture])

    data = VLMDataModule(source=lambda split: Pairs(split, 4))
    spec = VisualSpec(num_tokens=K, image_size=(4, 4), transform=pixels)
    data.connect(spec=spec, tokenizer=byte_tokenizer(), chat_template="chatml")
    assert VisualGain().missing(data, num_ranks=1) == {}
    said = VisualGain().missing(data, num_ranks=2)
    assert said.keys() == {"val/visual_gain"}
    assert said["val/visual_gain"].startswith("no validation batch has two different")


def test_an_image_in_the_system_prompt_is_refused() -> None:
    """It would be learned as a word; with a backslash it is meant as one."""

    def data(prompt: str) -> VLMDataModule:
        return VLMDataModule(source=lambda split: Numbered(split, 4), system_prompt=prompt)

    with pytest.raises(ValueError, match=r"system_prompt='Look at <image>' has <image>, but a system prompt has no"):
        data("Look at <image>")
    assert data(r"Write \<image> for a picture").system_prompt == "Write <image> for a picture"


def test_rows_of_prompts_are_what_answers_are_generated_from() -> None:
    """The form that an objective may ask for: left-padded, up to the last answer, nothing supervised."""
    whole, data = numbered(), numbered()
    data.connect(spec=whole.spec, tokenizer=byte_tokenizer(), chat_template="chatml", form="prompt")
    rows = next(iter(data.val_dataloader()))
    assert equal(rows, next(iter(whole.prompts([0, 1, 2, 3], 4))))
    assert len(rows.targets) == 0
    assert rows.attention_mask[:, -1].all()
    assert rows.samples[3].messages[-1]["role"] == "assistant", "a reward is computed from the reference"
