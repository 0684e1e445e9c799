"""The moving average of what trains: by hand, validated, saved in the artifact, resumed bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.parts import HALVES, WHOLE, loader, make_module, make_trainer, mean_loss, tiny_model
from vlm.callbacks.ema import EMA
from vlm.callbacks.save import Save
from vlm.module import NotFinite
from vlm.objectives.base import Objective
from vlm.objectives.language_modeling import LanguageModeling

DECAY = 0.3


class Trace(pl.Callback):
    """The weights after each optimizer step, as training has them, and the losses of the model that was validated."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.validated: list[float] = []
        self.started: list[bool] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step > len(self.weights):
            self.weights.append(weights_of(module))

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        if self.weights:
            now = weights_of(module)
            self.started.append(all(torch.equal(now[name], self.weights[-1][name]) for name in now))

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.validated.append(float(trainer.callback_metrics["val/loss"]))


def weights_of(module: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def averages(start: dict[str, Tensor], steps: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """d·average + (1 - d)·weights, with d = 2/11, 3/12, then DECAY."""
    average = start
    for step, weights in enumerate(steps, 1):
        d = min(DECAY, (1 + step) / (10 + step))
        average = {name: d * average[name] + (1 - d) * weights[name] for name in weights}
    return average


class StopAfter(pl.Callback):
    """Ends a fit after a step, as a signal does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def run(folder: Path, module: Any, *, steps: int, stop: int = 100, ckpt: Path | None = None, **options: Any) -> Trace:
    """A fit of `steps` steps, each of the same two batches and followed by a validation."""
    trace = Trace()
    save = Save(run_dir=folder, manifest={}, inherited=[], every_n_steps=100)
    callbacks = [trace, StopAfter(stop), EMA(ema_decay=DECAY), save]
    every = {"accumulate_grad_batches": 2, "val_check_interval": 2, "check_val_every_n_epoch": None}
    trainer = make_trainer(folder, max_steps=steps, callbacks=callbacks, **every, **options)
    trainer.fit(module, loader([*HALVES] * 8), loader([WHOLE]), ckpt_path=ckpt, weights_only=True)
    return trace


def artifact_of(folder: Path) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in load_file(folder / "artifact" / "weights.safetensors").items()}


def checkpoint_of(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_the_average_is_validated_saved_and_left_in_the_model(tmp_path: Path) -> None:
    module = make_module(states={"llm": "lora"})
    start = weights_of(module)
    trace = run(tmp_path, module, steps=4)
    expected = averages(start, trace.weights)
    moved = max((expected[name] - trace.weights[-1][name]).abs().max().item() for name in expected)
    assert moved > 1e-4, "or the test could not tell the two apart"
    torch.testing.assert_close(weights_of(module), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(artifact_of(tmp_path), expected, rtol=0, atol=1e-6)
    assert trace.started == [True] * 6, "training goes on with its own weights, also after a validation"

    checkpoint = checkpoint_of(tmp_path)
    torch.testing.assert_close(checkpoint["state_dict"], trace.weights[-1], rtol=0, atol=0)
    kept = checkpoint["callbacks"]["EMA"]["averages"]
    assert kept.keys() == start.keys(), "nothing that is frozen is averaged"
    torch.testing.assert_close(kept, artifact_of(tmp_path), rtol=0, atol=0)
    assert trace.validated[-1] == pytest.approx(mean_loss(module.model, WHOLE), abs=1e-5)


def test_a_run_that_goes_on_is_the_run_that_was_never_interrupted(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", make_module(), steps=6)
    cut = run(tmp_path / "cut", make_module(), steps=6, stop=3)
    assert checkpoint_of(tmp_path / "cut")["global_step"] == 3
    checkpoint = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    rest = run(tmp_path / "cut", make_module(tiny_model(seed=9)), steps=6, ckpt=checkpoint)
    assert cut.validated + rest.validated == whole.validated
    torch.testing.assert_close(artifact_of(tmp_path / "cut"), artifact_of(tmp_path / "whole"), rtol=0, atol=0)


class Breaks(Objective):
    """The objective, whose fourth call raises: the second of the first validation."""

    calls = 0

    def forward(self, model: Any, batch: Any) -> Any:
        self.calls += 1
        if self.calls == 4:
            raise NotFinite("here")
        return LanguageModeling()(model, batch)


def test_a_validation_that_breaks_off_gives_the_weights_back(tmp_path: Path) -> None:
    module = make_module(objective=Breaks())
    start = weights_of(module)
    with pytest.raises(NotFinite, match="here"):
        run(tmp_path, module, steps=4)
    saved, now = artifact_of(tmp_path), weights_of(module)
    torch.testing.assert_close(saved, averages(start, [now]), rtol=0, atol=1e-6)
    assert not any(torch.equal(saved[name], weight) for name, weight in now.items())


def test_bfloat16_weights_have_a_float32_average(tmp_path: Path) -> None:
    """Steps of 0.1 % of a weight are lost in bfloat16's 8 bits, and so would be the average's."""
    module = make_module()
    module.model.bfloat16()
    run(tmp_path, module, steps=2)
    kept = checkpoint_of(tmp_path)["callbacks"]["EMA"]["averages"]
    assert {str(tensor.dtype) for tensor in kept.values()} == {"torch.float32"}
    assert {str(tensor.dtype) for tensor in artifact_of(tmp_path).values()} == {"torch.bfloat16"}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in kept.values())


@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
def test_a_share_that_is_none_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"stage.ema_decay={decay} must be in \(0, 1\)"):
        EMA(ema_decay=decay)
