"""The LightningModule: steps call the objective, validation asks whether the model looks at the image."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from vlm.evaluation.looking import CONDITIONS, with_images
from vlm.optim import Rate, Schedule, make_schedule, parameter_groups
from vlm.schema import Batch, LossOutput


class NotFinite(ValueError):
    """The loss or a gradient became NaN or infinite; the weights are those of the last good step."""


class VLMModule(pl.LightningModule):
    """Trains a model on an objective.

    The gradient of an optimiser step is that of the mean over all its supervised tokens, whatever the number of rows,
    accumulated batches and ranks they came in: a step adds up sums, and they are divided once, before the update.
    """

    def __init__(
        self,
        *,
        model: Any,
        objective: Any,
        lr: dict[str, Rate],
        layer_decay: float | None = None,
        weight_decay: float = 0.0,
        schedule: Schedule = "cosine",
        warmup_share: float = 0.03,
        lr_floor: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.lr, self.layer_decay, self.weight_decay, self.betas = lr, layer_decay, weight_decay, betas
        self.schedule, self.warmup_share, self.lr_floor = schedule, warmup_share, lr_floor
        self._sums: dict[str, Tensor | int] = {}
        self._counts: dict[str, int] = {}
        self._ids: list[str] = []
        self.validated_step = -1  # the optimiser steps behind the validation figures

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.model, lr=self.lr, weight_decay=self.weight_decay, layer_decay=self.layer_decay)
        optimizer = torch.optim.AdamW(groups, betas=self.betas)
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = round(steps * self.warmup_share)
        schedule = make_schedule(optimizer, kind=self.schedule, warmup=warmup, steps=steps, floor=self.lr_floor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        output = self.objective(self.model, batch)
        self._ids += batch.ids
        for name, value in output.sums.items():
            if not torch.isfinite(value):
                self._stop(f"{name} is {value.item()}")
            self._add(name, value.detach(), output.counts[name])
        places, tokens = batch.attention_mask.numel(), int(batch.attention_mask.sum())
        self._add("padding_share", places - tokens, places)
        self._add("supervised_share", len(batch.targets), tokens)
        return sum(value for name, value in output.sums.items() if name.endswith("_loss"))

    def _add(self, name: str, value: Tensor | int, count: int) -> None:
        """Add to the sums of the optimiser step in progress."""
        self._sums[name] = self._sums.get(name, 0) + value
        self._counts[name] = self._counts.get(name, 0) + count

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Lightning divided the sums by the accumulated batches, and DDP by the ranks.
        names = list(self._sums)
        values = [torch.as_tensor(v, dtype=torch.float64) for n in names for v in (self._sums[n], self._counts[n])]
        totals = self.all_reduce(torch.stack([v.to(self.device) for v in values])).view(-1, 2).tolist()
        tokens = totals[0][1]
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size / tokens
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        if not torch.isfinite(norm) and self.trainer.precision != "16-mixed":  # whose scaler skips such a step
            self._stop(f"the gradient norm is {norm.item()}")
        means = {name: total / count for name, (total, count) in zip(names, totals, strict=True) if count}
        loss = sum(value for name, value in means.items() if name.endswith("_loss"))
        self.log_dict({f"train/{name}": value for name, value in means.items()} | {"train/loss": loss})
        self.log_dict({"train/grad_norm": norm, "train/tokens": tokens})
        self._sums, self._counts, self._ids = {}, {}, []

    def on_validation_epoch_start(self) -> None:
        zero = torch.zeros(2, dtype=torch.float64)
        self._seen: dict[str, Tensor] = dict.fromkeys(("loss", "correct", *CONDITIONS), zero)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """The same rows with their own images, with others' and with blank ones."""
        output = self.objective(self.model, batch)
        self._see("loss", output)
        for name in (name for name in output.sums if name.startswith("loss/")):  # of each source of a mixture
            self._see_one(name, output.sums[name], output.counts[name])
        if batch_index == 0 and len(batch.pixels):  # visual tokens far louder or softer than words learn slowly
            visual = self.model.connector(self.model.encoder(batch.pixels))
            self.log("val/visual_rms", visual.float().square().mean().sqrt(), batch_size=1)
            self.log("val/embed_rms", self.model.llm.embed_rms, batch_size=1)
        pictured = with_images(batch)
        changed = {name: change(pictured) for name, change in CONDITIONS.items()} if pictured is not None else {}
        if changed and None not in changed.values():
            self._see("correct", output if pictured is batch else self.objective(self.model, pictured))
            for name, other in changed.items():
                self._see(name, self.objective(self.model, other))

    def on_validation_epoch_end(self) -> None:
        totals = self.all_reduce(torch.stack(list(self._seen.values())).to(self.device)).tolist()
        means = {name: total / count for name, (total, count) in zip(self._seen, totals, strict=True) if count}
        if "correct" not in means:
            raise ValueError("validation needs at least two different images in a batch to measure the visual gain")
        self.log_dict({f"val/{name}": mean for name, mean in means.items() if name.startswith("loss/")})
        self.log_dict(
            {
                "val/loss": means["loss"],
                "val/loss_shuffled": means["shuffled"],
                "val/loss_blank": means["blank"],
                "val/visual_gain": means["shuffled"] - means["correct"],
            }
        )
        self.validated_step = self.global_step

    def _see(self, name: str, output: LossOutput) -> None:
        """Add an output's losses to the sums of one condition."""
        for loss in (key for key in output.sums if key.endswith("_loss")):
            self._see_one(name, output.sums[loss], output.counts[loss])

    def _see_one(self, name: str, value: Tensor, count: int) -> None:
        pair = torch.tensor([value.item(), count], dtype=torch.float64)
        self._seen[name] = self._seen.get(name, 0) + pair

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen tensors out: they are the base models'."""
        trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trainable}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise ValueError unless the checkpoint holds exactly what trains; what is frozen is loaded already."""
        trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        if odd := sorted(trainable ^ set(checkpoint["state_dict"])):
            raise ValueError(f"the checkpoint does not fit this run: {len(odd)} tensors differ, first {odd[0]!r}")
        self.strict_loading = False

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over all ranks."""
        return self.trainer.strategy.reduce(values, reduce_op="sum")

    def _stop(self, what: str) -> None:
        raise NotFinite(
            f"{what} at step {self.global_step + 1}, samples {', '.join(self._ids)}; the weights of step "
            f"{self.global_step} are kept: lower stage.lr, or look at these samples"
        )
