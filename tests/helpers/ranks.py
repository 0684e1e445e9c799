"""What tests/launch/test_devices.py asks of two real processes, which call the same functions as its one process does.

`python -m tests.helpers.ranks <folder>` is one rank of two (gloo, CPU); its environment says which.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.helpers.cross_attention import attending
from tests.helpers.parts import (
    IMAGE,
    make_batch,
    make_module,
    make_trainer,
    pictures,
    tiny_llm,
    tiny_model,
)
from tests.helpers.programs import QUICK, train
from vlm.callbacks.ema import EMA
from vlm.callbacks.save import Save
from vlm.models.composed import Composed
from vlm.module import NotFinite
from vlm.objectives.base import Objective
from vlm.objectives.language_modeling import LanguageModeling
from vlm.schema import Batch, LossOutput
from vlm.training.sharding import FullyShard, gather

PICTURED = [([11, IMAGE, 12], [21]), ([13, IMAGE], [22, 23]), ([IMAGE, 14], [24, 25, 26]), ([15, IMAGE], [27])]
TEXT = [([31, 32], [41, 42, 43, 44, 45]), ([33], [46]), ([34, 35, 36], [47, 48]), ([37], [49])]
MIXED = [TEXT[0], PICTURED[1], PICTURED[2], TEXT[3]]
STEPS = ([*PICTURED, *MIXED], [*PICTURED, *TEXT], [*TEXT, *MIXED], [*TEXT, *TEXT])  # a half is what one rank has
RUN = [*QUICK, "data.num_val_samples=8", "data.batch_size=2", "trainer.max_steps=4", "trainer.val_check_interval=2"]
RUN += ["stage=instruct", "stage.lora.dropout=0.0", "stage.encoder={last_n:1}", "stage.lr.encoder=1e-3"]
RUN += ["callbacks.save.every_n_steps=2", "trainer.precision=32-true"]
DROPOUT = "stage.lora.dropout=0.5"


def part_of(rows: list[Any], start: int, stop: int, num_tokens: int) -> Batch:
    """Some of a step's rows, each with the picture that it has in the whole."""
    before = sum(prompt.count(IMAGE) for prompt, _ in rows[:start])
    some = rows[start:stop]
    images = pictures(8)[before : before + sum(prompt.count(IMAGE) for prompt, _ in some)]
    return make_batch(*some, images=images, num_tokens=num_tokens, first_id=start)


def tokens() -> tuple[Composed, Any]:
    """Everything trains, in a way of its own."""
    return tiny_model(llm=tiny_llm(num_hidden_layers=2)), {"encoder": {"last_n": 1}, "llm": "lora"}


def layers() -> tuple[Composed, Any]:
    """Cross-attention with open gates into layers that are recomputed; the tied embeddings of Gemma are trained."""
    llm = tiny_llm("gemma3_text", tie_word_embeddings=True, head_dim=8)
    llm.gradient_checkpointing = True
    llm.model.activation_checkpointing_enable({"use_reentrant": False})
    return attending(gate=0.5, llm=llm), {"llm": "full"}


class TwoLosses(Objective):
    """The loss over the tokens, and one over the images, of another number, that a parameter of its own scales."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5]))

    def forward(self, model: Any, batch: Batch) -> LossOutput:
        output = LanguageModeling()(model, batch)
        embeds = model.connector(model.encoder(batch.pixel_values)).float().square().mean((1, 2)).sum()
        sums = {**output.sums, "size_loss": (self.scale * embeds).sum()}
        return LossOutput(sums=sums, counts={**output.counts, "size_loss": len(batch.pixel_values)})


class NaNOn(Objective):
    """The loss is NaN on one rank from its third call on."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.calls = rank, 0

    def forward(self, model: Any, batch: Batch) -> LossOutput:
        self.calls += 1
        output = LanguageModeling()(model, batch)
        bad = self.calls > 2 and int(os.environ["LOCAL_RANK"]) == self.rank
        return replace(output, sums={"lm_loss": output.sums["lm_loss"] * float("nan")}) if bad else output


class Steps(pl.Callback):
    """The metrics of every step, and the norm of the gradient that the optimizer is given."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        self.clipped = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.on_before_zero_grad(trainer, module, None)
            figures = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("train/")}
            self.seen.append({**figures, "clipped": self.clipped})


def fit(
    folder: Path,
    make: Callable[[], Any],
    strategy: Any = "auto",
    *,
    num_ranks: int = 1,
    accumulate: int = 1,
    ema_decay: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Four steps of eight rows, over so many ranks and batches; then a validation of the same rows."""
    model, states = make()
    module = make_module(model, states=states, warmup_ratio=0.0, **more)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    width = 8 // num_ranks // accumulate
    num_tokens = 0 if model.connector.fusion == "layers" else model.connector.num_tokens
    starts = [rank * 8 // num_ranks + width * number for number in range(accumulate)]
    batches = [part_of(rows, at, at + width, num_tokens) for rows in STEPS for at in starts]
    steps = Steps()
    trainer = make_trainer(
        folder,
        strategy=strategy,
        devices=num_ranks,
        accumulate_grad_batches=accumulate,
        max_steps=len(STEPS),
        gradient_clip_val=0.5,
        callbacks=[steps, EMA(ema_decay=ema_decay)],
        use_distributed_sampler=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    halves = [part_of(rows, 0, 4, num_tokens) for rows in STEPS] + [part_of(rows, 4, 8, num_tokens) for rows in STEPS]
    mine = halves[rank * 8 // num_ranks : (rank + 1) * 8 // num_ranks]  # the second rank has more text, at first alone
    figures = trainer.validate(module, DataLoader(mine, batch_size=None), verbose=False)[0]
    prompts = make_batch(
        ([11, IMAGE], []), ([12, 13, IMAGE], []), side="left", images=pictures(2), num_tokens=num_tokens
    )
    answers = model.eval().generate(prompts, stop_ids=[1], max_new_tokens=4)
    return {"steps": steps.seen, "tensors": gather(module, names), "val": figures, "answers": answers}


def unlike(folder: Path, strategy: Any = "auto", *, num_ranks: int = 1) -> dict[str, Any]:
    """The validation of batches with two pictures on one rank; on the other with one picture twice, and with none."""
    model, states = tokens()
    num_tokens = model.connector.num_tokens
    repeated = make_batch(*PICTURED[:2], images=[pictures(8)[5]] * 2, num_tokens=num_tokens)
    batches = [part_of(PICTURED, start, start + 2, num_tokens) for start in (0, 2)]
    batches += [repeated, part_of(TEXT, 0, 2, num_tokens)]
    rank = int(os.environ.get("LOCAL_RANK", 0))
    mine = batches[rank * 4 // num_ranks : (rank + 1) * 4 // num_ranks]
    trainer = make_trainer(folder, strategy=strategy, devices=num_ranks, use_distributed_sampler=False)
    module = make_module(model, states=states)
    return trainer.validate(module, DataLoader(mine, batch_size=None), verbose=False)[0]


def stopped(folder: Path, strategy: Any) -> str:
    """What this rank says of a NaN on the other one."""
    model, states = tokens()
    module = make_module(model, states=states, objective=NaNOn(1), warmup_ratio=0.0)
    rank = int(os.environ["LOCAL_RANK"])
    batches = [part_of(rows, 4 * rank, 4 * rank + 4, 4) for rows in STEPS]
    save = Save(run_dir=folder, manifest={}, inherited=[])
    trainer = make_trainer(folder, strategy=strategy, devices=2, max_steps=4, callbacks=[save])
    try:
        trainer.fit(module, DataLoader(batches, batch_size=None))
    except NotFinite as error:
        return str(error)
    raise AssertionError("NaN was trained on")


def main(folder: Path) -> None:
    rank, results = int(os.environ["LOCAL_RANK"]), {}
    for name, strategy in (("ddp", lambda: "ddp"), ("fsdp", FullyShard)):
        for make in (tokens, layers):
            results[name, make.__name__] = fit(folder, make, strategy(), num_ranks=2)
        results[name, "losses"] = fit(folder, tokens, strategy(), num_ranks=2, objective=TwoLosses())
        results[name, "unlike"] = unlike(folder, strategy(), num_ranks=2)
        results[name, "stopped"] = stopped(folder / f"stopped_{name}", strategy())
    results["ddp", "average"] = fit(folder, tokens, "ddp", num_ranks=2, ema_decay=0.9)
    results["fsdp", "accumulated"] = fit(folder, tokens, FullyShard(), num_ranks=2, accumulate=2)
    cpus = ["trainer.accelerator=cpu", "trainer.devices=2"]
    for name, options in (("ddp", ["trainer=ddp"]), ("fsdp", ["trainer=fsdp"]), ("dropout", ["trainer=ddp", DROPOUT])):
        assert train(*RUN, *options, *cpus, f"run_dir={folder / name}") == 0
    for name in ("fsdp", "dropout"):
        resumed = folder / f"{name} resumed"
        if rank == 0:
            shutil.copytree(folder / name, resumed)
            (resumed / "checkpoints" / "last.ckpt").write_bytes(b"")  # so that it goes on at step 2
        torch.distributed.barrier()
        assert train(f"resume={resumed}") == 0
    torch.save(results, folder / f"rank_{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
