"""A step is the mean over its tokens however they came; a loss that is not finite stops it; validation by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.parts import (
    HALVES,
    IMAGE,
    IMAGES,
    ROWS,
    SPEC,
    WHOLE,
    loader,
    make_batch,
    make_module,
    make_trainer,
    mean_loss,
    pictures,
    tiny_llm,
    tiny_model,
)
from vlm.callbacks.save import Save
from vlm.evaluation.visual_gain import compared, num_with_images, select, swapped
from vlm.loggers.metrics_file import MetricsFile
from vlm.module import NotFinite
from vlm.objectives.base import Objective
from vlm.objectives.language_modeling import CHUNK, LanguageModeling, SummedCrossEntropy
from vlm.schema import Batch
from vlm.training import artifact


def fit(folder: Path, batches: list[Batch], **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and metrics after the steps of a real Trainer."""
    module = make_module(states={"llm": "lora"})
    trainer = make_trainer(folder, **options)
    trainer.fit(module, loader(batches))
    parameters = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    return parameters, dict(trainer.callback_metrics)


def test_accumulated_batches_are_one_big_batch(tmp_path: Path) -> None:
    """3 and 9 supervised tokens: the mean of the two means would be another gradient."""
    assert [len(half.targets) for half in HALVES] == [3, 9]
    steps = {"max_steps": 2, "gradient_clip_val": 0.5}
    once, once_metrics = fit(tmp_path, [WHOLE, WHOLE], **steps)
    twice, twice_metrics = fit(tmp_path, [*HALVES, *HALVES], accumulate_grad_batches=2, **steps)
    start = {name: p for name, p in make_module(states={"llm": "lora"}).named_parameters() if p.requires_grad}
    for name, parameter in once.items():
        torch.testing.assert_close(twice[name], parameter, rtol=0, atol=1e-6, msg=name)
    moved = {name: (parameter - start[name]).abs().max().item() for name, parameter in once.items()}
    assert all(1e-4 < distance < 1e-2 for name, distance in moved.items() if "lora_A" not in name)
    assert twice_metrics["train/grad_norm"].item() == pytest.approx(once_metrics["train/grad_norm"].item(), rel=1e-4)


def test_the_gradients_of_a_step_are_freed_before_the_next_forward_pass(tmp_path: Path) -> None:
    module = make_module(states={"llm": "lora"})
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    held = []
    module.model.register_forward_pre_hook(lambda *_: held.append(sum(p.grad is not None for p in trained)))
    make_trainer(tmp_path, accumulate_grad_batches=2, max_steps=2).fit(module, loader([*HALVES, *HALVES]))
    assert held == [0, len(trained), 0, len(trained)]


def test_logged_loss_is_the_mean_over_tokens(tmp_path: Path) -> None:
    model = tiny_model()
    first, second = (mean_loss(model, half) for half in HALVES)
    assert abs(first - second) > 0.05
    _, metrics = fit(tmp_path, list(HALVES), accumulate_grad_batches=2)
    assert metrics["train/loss"].item() == pytest.approx((3 * first + 9 * second) / 12, abs=1e-5)
    assert metrics["train/lm_loss"] == metrics["train/loss"]
    assert metrics["train/tokens"] == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy_in_chunks_is_that_of_pytorch(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Seven rows, three at a time; a gradient in bfloat16 is the float32 one, rounded once."""
    monkeypatch.setitem(CHUNK, "cpu", 3 * 11)
    torch.manual_seed(0)
    logits, targets = (5 * torch.randn(7, 11)).to(dtype).requires_grad_(), torch.randint(11, (7,))
    reference = logits.detach().float().requires_grad_()
    expected = F.cross_entropy(reference, targets, reduction="sum")
    (2 * expected).backward()
    loss, _ = SummedCrossEntropy.apply(logits, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    (2 * loss).backward(retain_graph=True)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(logits.grad.float(), reference.grad, rtol=tolerance, atol=1e-6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradient_norm_is_that_of_the_mean(tmp_path: Path) -> None:
    module = make_module()
    loss = LanguageModeling()(module.model, WHOLE).sums["lm_loss"] / 12
    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in module.parameters() if p.grad is not None))
    module.zero_grad()
    trainer = make_trainer(tmp_path, accumulate_grad_batches=2)
    trainer.fit(module, loader([*HALVES]))
    assert trainer.callback_metrics["train/grad_norm"].item() == pytest.approx(norm, rel=1e-4)


class Scaled(LanguageModeling):
    """With a parameter of its own, whose gradient is the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, model: Any, batch: Batch) -> Any:
        output = super().forward(model, batch)
        return replace(output, sums={name: self.scale * value for name, value in output.sums.items()})


def test_gradient_norm_of_each_trained_part(tmp_path: Path) -> None:
    module = make_module(states={"encoder": {"last_n": 1}}, objective=Scaled())
    trainer = make_trainer(tmp_path, accumulate_grad_batches=2)
    trainer.fit(module, loader([*HALVES]))
    norms = {name: value.item() for name, value in trainer.callback_metrics.items() if "grad_norm/" in name}
    assert norms.keys() == {f"train/grad_norm/{part}" for part in ("encoder", "connector", "objective")}
    total = math.sqrt(sum(norm**2 for norm in norms.values()))
    assert trainer.callback_metrics["train/grad_norm"].item() == pytest.approx(total, rel=1e-6)
    model = tiny_model()
    loss = LanguageModeling()(model, WHOLE).sums["lm_loss"] / 12
    expected = {"objective": loss.item()}
    loss.backward()
    for part, module in (("encoder", model.encoder.blocks()[-1]), ("connector", model.connector)):
        expected[part] = math.sqrt(sum(p.grad.square().sum().item() for p in module.parameters()))
    assert norms == {f"train/grad_norm/{part}": pytest.approx(norm, rel=1e-4) for part, norm in expected.items()}


def test_a_part_without_a_gradient_in_a_step_has_a_norm_of_0(tmp_path: Path) -> None:
    """A logger would otherwise repeat the norm of the step before."""
    trainer = make_trainer(tmp_path, max_steps=2)
    text = make_batch(([11], [21]), ([12], [22, 23]))
    trainer.fit(make_module(states={"llm": "lora"}), loader([WHOLE, text]))
    metrics = trainer.callback_metrics
    assert metrics["train/grad_norm/connector"] == 0
    assert metrics["train/grad_norm/llm"] == metrics["train/grad_norm"] > 0


def test_the_learning_rates_of_a_logged_step(tmp_path: Path) -> None:
    """Those of the step itself; of 10 steps, 5 are warm-up, then half a cosine goes down to 0.1 of the peak."""
    rates = {"encoder": 1e-3, "connector": {"layers": 2e-3, "rest": 4e-3}, "llm": 1e-3}
    module = make_module(states={"encoder": {"last_n": 1}}, lr=rates, warmup_ratio=0.5, min_lr_ratio=0.1)
    trainer = make_trainer(tmp_path, max_steps=10, log_every_n_steps=4, logger=MetricsFile(run_dir=tmp_path))
    trainer.fit(module, loader([WHOLE] * 10))
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], {name: lr for name, lr in line.items() if name.startswith("lr/")}) for line in logged]
    peaks = {"lr/encoder": 1e-3, "lr/connector/layers": 2e-3, "lr/connector/rest": 4e-3}
    factors = {4: 4 / 5, 8: 0.1 + 0.9 * (1 + math.cos(math.pi * 2 / 5)) / 2}
    assert found == [
        (step, {name: pytest.approx(peak * factor) for name, peak in peaks.items()}) for step, factor in factors.items()
    ]


class NaNFrom(Objective):
    """The loss, or only its gradient, is NaN from the call of that number on, counted from 1."""

    def __init__(self, call: int, *, gradient: bool = False) -> None:
        super().__init__()
        self.call, self.gradient, self.calls = call, gradient, 0

    def forward(self, model: Any, batch: Batch) -> Any:
        self.calls += 1
        output = LanguageModeling()(model, batch)
        if self.calls < self.call:
            return output
        loss = output.sums["lm_loss"]
        if self.gradient:
            loss.register_hook(lambda gradient: gradient * math.nan)
        else:
            loss = loss * math.nan
        return replace(output, sums={"lm_loss": loss})


@pytest.mark.parametrize(
    ("gradient", "text"),
    [
        (False, r"lm_loss is nan at step 2, samples sample/0, sample/1, sample/2, sample/3; the weights of step 1"),
        (True, r"the gradient norm is nan at step 2, samples sample/0, sample/1, sample/2, sample/3;"),
    ],
    ids=["loss", "gradient"],
)
def test_what_is_not_finite_stops_before_the_update(tmp_path: Path, gradient: bool, text: str) -> None:
    good, _ = fit(tmp_path / "good", list(HALVES), accumulate_grad_batches=2)  # one good step

    call = 3 if gradient else 4
    module = make_module(states={"llm": "lora"}, objective=NaNFrom(call, gradient=gradient), warmup_ratio=0.0)
    save = Save(run_dir=tmp_path, manifest={}, inherited=[], every_n_steps=100)
    trainer = make_trainer(tmp_path, accumulate_grad_batches=2, max_steps=5, callbacks=[save])
    with pytest.raises(NotFinite, match=text):
        trainer.fit(module, loader([*HALVES, *HALVES, *HALVES]))
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert all(torch.equal(parameter, good[name]) for name, parameter in trained.items())
    manifest = json.loads((tmp_path / "artifact" / "manifest.json").read_text())
    assert {f"model.{name}" for name in manifest["tensors"]} == trained.keys()
    with artifact.safe_open(tmp_path / "artifact" / "weights.safetensors", framework="pt") as file:
        assert file.metadata()["step"] == "1"
        assert all(torch.equal(file.get_tensor(n), good[f"model.{n}"]) for n in manifest["tensors"])
    assert not (tmp_path / "checkpoints").exists(), "in the middle of a step there is nothing to resume"


def test_the_best_artifact_does_not_stand_for_the_last(tmp_path: Path) -> None:
    """NaN in the third step, after a validation whose artifact is kept as the best: both are of step 2."""
    (tmp_path / "config.yaml").write_text("seed: 0")
    module = make_module(objective=NaNFrom(3 + 2 * 3), warmup_ratio=0.0)  # each validation calls it three times
    save = Save(run_dir=tmp_path, manifest={}, inherited=[], every_n_steps=100, best="val/loss")
    every = {"val_check_interval": 1, "check_val_every_n_epoch": None}
    with pytest.raises(NotFinite, match="at step 3"):
        make_trainer(tmp_path, max_steps=5, callbacks=[save], **every).fit(module, loader([WHOLE] * 5), loader([WHOLE]))
    for folder in (tmp_path, tmp_path / "best"):
        with artifact.safe_open(folder / "artifact" / "weights.safetensors", framework="pt") as file:
            assert file.metadata()["step"] == "2"


def text_of(images: list[Tensor], per_row: list[int], layouts: Any = None) -> Batch:
    return make_batch(*(([11] + [IMAGE] * num, [21]) for num in per_row), images=images, layouts=layouts)


def sources(batch: Batch, pixels: Tensor) -> list[int]:
    """Of each place, whose pixels it has now."""
    return [[int(torch.equal(new, old)) for old in batch.pixel_values].index(1) for new in pixels]


@pytest.mark.parametrize(
    ("per_row", "looks"),
    [
        ([1, 1], [0, 1]),
        ([1, 1, 1, 1], [0, 1, 2, 3]),
        ([2, 2], [0, 1, 2, 3]),
        ([2, 1, 0, 1], [0, 1, 2, 3]),
        ([3, 3], [0, 1, 2, 3, 4, 5]),
        ([1, 1, 1, 1], [0, 0, 1, 1]),
        ([1, 1, 1, 1], [0, 1, 0, 1]),
        ([1, 1, 1, 1, 1], [0, 0, 1, 2, 1]),
    ],
)
def test_shuffled_gives_every_row_another_picture(per_row: list[int], looks: list[int]) -> None:
    palette = pictures(6)
    batch = text_of([palette[look] for look in looks], per_row)
    exchanged, rows = swapped(batch)
    pixels = exchanged.pixel_values
    assert rows == [row for row, num in enumerate(per_row) if num]
    owner = [row for row, num in enumerate(per_row) for _ in range(num)]
    for place, came_from in enumerate(sources(batch, pixels)):
        assert looks[came_from] != looks[place]
        if len(set(looks)) == len(looks):
            assert owner[came_from] != owner[place]
    key = lambda pixels: sorted(image.sum().item() for image in pixels)  # noqa: E731
    assert key(pixels) == key(batch.pixel_values), "the same pictures, each as often"
    parts, _ = compared(batch)
    assert parts.keys() == {"correct", "shuffled", "blank"}
    assert torch.equal(parts["shuffled"].pixel_values, pixels)
    assert not parts["blank"].pixel_values.any()


def test_rows_that_keep_their_picture_are_left_out() -> None:
    """Three captions of one picture and another picture: one swap each way is all that there is."""
    palette = pictures(2)
    batch = text_of([palette[look] for look in (0, 0, 0, 1)], [1, 1, 1, 1])
    exchanged, rows = swapped(batch)
    pixels = exchanged.pixel_values
    assert sum(torch.equal(new, old) for new, old in zip(pixels, batch.pixel_values, strict=True)) == 2
    assert len(rows) == 2
    assert 3 in rows
    parts, _ = compared(batch)
    assert parts["correct"].ids == [f"sample/{row}" for row in rows]
    for one, other in zip(parts["correct"].pixel_values, parts["shuffled"].pixel_values, strict=True):
        assert not torch.equal(one, other)


NEXT = (1, 3, 3, 3, 3)  # a thumbnail and four rows of three tiles
TILED: list[tuple[list[list[tuple[int, ...]]], list[list[int]], list[int]]] = [
    # layouts of the rows' images; each row's places in the end; the rows that can be compared
    ([[NEXT], [(1,)]], [[*range(13)], [13]], []),
    ([[NEXT], [(1,)], [(1,)]], [[*range(13)], [14], [13]], [1, 2]),
    ([[NEXT], [(1,)], [NEXT], [(1,)]], [[*range(14, 27)], [27], [*range(13)], [13]], [0, 1, 2, 3]),
    ([[(1, 2, 2)], [(1, 4)], [(1, 2, 2)]], [[*range(10, 15)], [*range(5, 10)], [*range(5)]], [0, 2]),
    ([[(1, 2), (1,)], [(1,), (1, 2)]], [[5, 6, 7, 4], [3, 0, 1, 2]], [0, 1]),
    ([[(1, 2), (1,)], [(1, 2)]], [[4, 5, 6, 3], [0, 1, 2]], [1]),
]


@pytest.mark.parametrize(("layouts", "places", "rows"), TILED, ids=str)
def test_tiled_images_are_swapped_whole_between_places_of_one_layout(layouts: Any, places: Any, rows: Any) -> None:
    """Of a row of 13 tiles beside one of 1 tile nothing can be swapped; a row counts once all of its images are."""
    per_row = [sum(map(sum, images)) for images in layouts]
    batch = text_of(pictures(sum(per_row)), per_row, layouts)
    exchanged, found = swapped(batch)
    pixels = exchanged.pixel_values
    assert found == rows
    assert sources(batch, pixels) == [place for row in places for place in row]
    parts, _ = compared(batch)
    for name in ("correct", "shuffled") if rows else ():
        kept = [place for row in rows for place in (places[row] if name == "shuffled" else own(per_row, row))]
        assert torch.equal(parts[name].pixel_values, batch.pixel_values[kept])
        assert parts[name].num_images.tolist() == [per_row[row] for row in rows]
        assert parts[name].layouts == [layouts[row] for row in rows]


def own(per_row: list[int], row: int) -> range:
    return range(sum(per_row[:row]), sum(per_row[: row + 1]))


@pytest.mark.parametrize(
    ("per_row", "looks"),
    [([1], [0]), ([0, 1], [0]), ([2], [0, 1]), ([1, 1, 1], [0, 0, 0]), ([0, 0], [])],
    ids=["one", "one and a text", "one row", "one picture", "none"],
)
def test_nothing_is_compared_where_there_is_no_other_picture(per_row: list[int], looks: list[int]) -> None:
    palette = pictures(2)
    assert compared(text_of([palette[look] for look in looks], per_row)) == ({}, [])


def test_selected_rows_have_their_images_and_samples() -> None:
    mixed = make_batch(([10], [20, 21]), *ROWS[:2], ([17, 18], [33]), images=IMAGES[:2])
    rows = select(mixed, [1, 2])
    assert rows.ids == [sample.id for sample in rows.samples] == ["sample/1", "sample/2"]
    assert rows.targets.tolist() == [21, 22, 23]
    assert rows.num_images.tolist() == [1, 1]
    assert rows.sample_index.unique().tolist() == [0, 1]
    assert torch.equal(rows.sample_index >= 0, rows.attention_mask)
    last = select(mixed, [3])
    assert last.sample_index.unique().tolist() == [-1, 0]
    assert torch.equal(last.sample_index >= 0, last.attention_mask)
    assert (last.ids, last.targets.tolist(), len(last.pixel_values)) == (["sample/3"], [33], 0)
    assert num_with_images(mixed) == 2


def test_a_row_that_nothing_can_be_swapped_with_counts_in_the_loss_alone(tmp_path: Path) -> None:
    """13 tiles beside two single images: the gain is that of the two, and the row is counted."""
    model = tiny_model()
    prompts = [([11, *[IMAGE] * num], [answer]) for num, answer in ((13, 21), (1, 22), (1, 23))]
    batch = make_batch(*prompts, layouts=[[NEXT], [(1,)], [(1,)]])
    pair = make_batch(*prompts[1:], images=list(batch.pixel_values[13:]))
    swap = replace(pair, pixel_values=pair.pixel_values.flip(0))
    metrics = make_trainer(tmp_path).validate(make_module(model), loader([batch]), verbose=False)[0]
    assert metrics["val/num_not_compared"] == 1
    assert metrics["val/loss"] == pytest.approx(mean_loss(model, batch), abs=1e-5)
    gain = mean_loss(model, swap) - mean_loss(model, pair)
    assert abs(gain) > 1e-3
    assert metrics["val/visual_gain"] == pytest.approx(gain, abs=1e-5)


def test_validation_by_hand(tmp_path: Path) -> None:
    """Two batches of unlike size, one with a row of text, which counts in the loss and not in the gain."""
    model = tiny_model()
    mixed = make_batch(*ROWS[:2], ([17, 18], [33, 34, 35, 36]), images=IMAGES[:2])
    other = HALVES[1]
    pictured = HALVES[0]  # the rows of `mixed` that have a picture
    swapped = [replace(batch, pixel_values=batch.pixel_values.flip(0)) for batch in (pictured, other)]
    blanked = [replace(batch, pixel_values=torch.zeros_like(batch.pixel_values)) for batch in (pictured, other)]
    loss = (7 * mean_loss(model, mixed) + 9 * mean_loss(model, other)) / 16

    def mean(batches: list[Batch]) -> float:
        return (3 * mean_loss(model, batches[0]) + 9 * mean_loss(model, batches[1])) / 12

    metrics = make_trainer(tmp_path).validate(make_module(model), loader([mixed, other]), verbose=False)[0]
    correct = mean([pictured, other])
    assert abs(mean(swapped) - correct) > 1e-3
    assert abs(loss - correct) > 1e-3
    assert metrics["val/loss"] == pytest.approx(loss, abs=1e-5)
    assert metrics["val/loss_shuffled"] == pytest.approx(mean(swapped), abs=1e-5)
    assert metrics["val/loss_blank"] == pytest.approx(mean(blanked), abs=1e-5)
    assert metrics["val/visual_gain"] == pytest.approx(mean(swapped) - correct, abs=1e-5)


def test_rows_of_text_do_not_move_the_gain(tmp_path: Path) -> None:
    model = tiny_model()
    text = make_batch(([17, 18], [33, 34, 35, 36]), ([19], [37]))
    alone = make_trainer(tmp_path).validate(make_module(model), loader([WHOLE]), verbose=False)[0]
    mixed = make_trainer(tmp_path).validate(make_module(model), loader([WHOLE, text]), verbose=False)[0]
    assert mixed["val/visual_gain"] == alone["val/visual_gain"]
    assert alone["val/visual_gain"] == pytest.approx(alone["val/loss_shuffled"] - alone["val/loss"], abs=1e-6)
    assert mixed["val/loss"] != alone["val/loss"]


@pytest.mark.parametrize("rows", [[ROWS[0]], [([17, 18], [33, 34]), ([19], [35])]], ids=["one picture", "text"])
def test_validation_without_two_pictures_has_its_loss_alone(rows: Any, tmp_path: Path) -> None:
    batch = make_batch(*rows)
    found = make_trainer(tmp_path).validate(make_module(model := tiny_model()), loader([batch]), verbose=False)[0]
    assert found.pop("val/loss") == pytest.approx(mean_loss(model, batch), abs=1e-5)
    of_images = {"val/num_not_compared", "val/visual_rms", "val/embed_rms"} if num_with_images(batch) else set()
    assert found.keys() == {"val/lm_loss", "step", *of_images}
    assert found.get("val/num_not_compared", 0) == num_with_images(batch)


def test_the_schedule_spans_the_steps_of_the_run(tmp_path: Path) -> None:
    """8 optimizer steps, a quarter of them warm-up: the rates at which each step was taken."""
    rates: list[float] = []

    class Rates(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    module = make_module(warmup_ratio=0.25, min_lr_ratio=0.1)
    batches = [*HALVES] * 8
    make_trainer(tmp_path, max_steps=8, accumulate_grad_batches=2, callbacks=[Rates()]).fit(module, loader(batches))
    after = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert rates == pytest.approx([1e-3 * factor for factor in (0.5, 1.0, *after)], rel=1e-6)


def test_a_checkpoint_holds_what_trains_alone(tmp_path: Path) -> None:
    module = make_module(tiny_model(llm=tiny_llm()))
    trainer = make_trainer(tmp_path)
    trainer.fit(module, loader([WHOLE]))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert state.keys() == {name for name, p in module.named_parameters() if p.requires_grad}
    assert {name.split(".")[1] for name in state} == {"connector"}
    assert SPEC.num_tokens == module.model.connector.num_tokens


def mixed(batch: Batch, *names: str) -> Batch:
    """The batch with each of its samples from the source of that name."""
    samples = [replace(sample, meta={"source": name}) for sample, name in zip(batch.samples, names, strict=True)]
    return replace(batch, samples=samples, sources=("books", "signs", "maps"))


def test_the_loss_of_each_source_of_a_mixture(tmp_path: Path) -> None:
    """By hand from the same samples alone; a source with no sample at hand has none (NaN)."""
    model = tiny_model()
    output = LanguageModeling()(model, mixed(WHOLE, "books", "books", "maps", "maps"))
    assert output.counts == {"lm_loss": 12, "loss/books": 3, "loss/signs": 0, "loss/maps": 9}
    batches = [mixed(HALVES[0], "books", "books"), mixed(HALVES[1], "maps", "maps")]
    _, metrics = fit(tmp_path, batches, accumulate_grad_batches=2)
    for source, half in zip(("books", "maps"), HALVES, strict=True):
        assert metrics[f"train/loss/{source}"].item() == pytest.approx(mean_loss(model, half), abs=1e-5)
    assert math.isnan(metrics["train/loss/signs"])
    seen = make_trainer(tmp_path).validate(make_module(), loader(batches), verbose=False)[0]
    assert seen["val/loss/maps"] == pytest.approx(mean_loss(model, HALVES[1]), abs=1e-5)
    assert "val/loss/signs" not in seen


def test_the_loss_of_a_source_is_no_loss_of_the_objective(tmp_path: Path) -> None:
    """Whatever it is called: a source of somebody's own has not passed the mixture's look at its names."""
    batches = [replace(mixed(half, "books", "books"), sources=("books", "maps_loss")) for half in HALVES]
    _, metrics = fit(tmp_path, batches, accumulate_grad_batches=2)
    assert metrics["train/loss"] == metrics["train/lm_loss"] == metrics["train/loss/books"]
    batches = [replace(mixed(half, "a_loss", "a_loss"), sources=("a_loss",)) for half in HALVES]
    _, again = fit(tmp_path, batches, accumulate_grad_batches=2)
    assert again["train/loss"] == metrics["train/loss"]
    assert again["train/loss/a_loss"] == again["train/loss"]
    assert again["train/grad_norm"] == metrics["train/grad_norm"]
    seen = make_trainer(tmp_path).validate(make_module(), loader(batches), verbose=False)[0]
    assert seen["val/loss"] == seen["val/loss/a_loss"]


def test_shares_of_padding_and_of_supervision(tmp_path: Path) -> None:
    """Rows of 7 and 10 tokens, 3 padded: twice, with 6 and 6 tokens supervised."""
    batches = [make_batch(ROWS[row], ROWS[row + 2], images=[IMAGES[row], IMAGES[row + 2]]) for row in (0, 1)]
    assert [batch.attention_mask.sum(1).tolist() for batch in batches] == [[7, 10], [7, 10]]
    _, metrics = fit(tmp_path, batches, accumulate_grad_batches=2)
    assert metrics["train/padding_ratio"].item() == pytest.approx(6 / 40)
    assert metrics["train/supervised_ratio"].item() == pytest.approx(12 / 34)
