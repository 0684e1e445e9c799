"""The LightningModule: steps call the objective, validation asks whether the model looks at the image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlm.evaluation.looking import CONDITIONS, compared, num_with_images
from vlm.optim import Rate, Schedule, make_schedule, parameter_groups
from vlm.ranges import Number, Range, Ratio, RatioAboveZero, RatioBelowOne
from vlm.schema import Batch, LossOutput, is_loss
from vlm.sharding import FullyShard


class Ended(ValueError):
    """What ends a run on all ranks after the same step, with the weights of that step good to save."""


class NotFinite(Ended):
    """The loss or a gradient became NaN or infinite; the weights are those of the last good step.

    All ranks raise it together.
    """


class VLMModule(pl.LightningModule):
    """Trains a model on an objective.

    The gradient of an optimizer step is that of the mean over all its supervised tokens, whatever the number of rows,
    accumulated batches and ranks they came in. Where a step is one batch of each rank, the losses are divided by their
    counts before the backward pass. Where batches are accumulated, the counts of the later ones are not known then: the
    gradients of the sums are divided once, before the update.
    """

    def __init__(
        self,
        *,
        model: Any,
        objective: Any,
        lr: dict[str, Rate],
        layer_decay: RatioAboveZero | None = None,
        weight_decay: Annotated[Number, Range(0, 100)] = 0.0,
        schedule: Schedule = "cosine",
        warmup_share: RatioBelowOne = 0.03,
        lr_floor: Ratio = 0.05,
        betas: tuple[RatioBelowOne, RatioBelowOne] = (0.9, 0.999),
    ) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.strict_loading = False  # a checkpoint holds what trains; `on_load_checkpoint` looks at its names
        self.lr, self.layer_decay, self.weight_decay, self.betas = lr, layer_decay, weight_decay, betas
        self.schedule, self.warmup_share, self.lr_floor = schedule, warmup_share, lr_floor
        self._sums: dict[str, Tensor | int] = {}
        self._counts: dict[str, int] = {}
        self._ids: list[str] = []
        self.figures: dict[str, Any] = {}  # of the last step; Lightning's also hold what earlier ones had
        self.validated_step = -1  # the optimiser steps behind the validation figures
        self.train()

    def train(self, mode: bool = True) -> VLMModule:
        """Training mode for what trains alone: what is frozen drops nothing out."""
        super().train(mode)
        for module in self.modules():
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()
        return self

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, FullyShard):
            self.trainer.strategy.shard(self.model)

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(
            self.model,
            lr=self.lr,
            weight_decay=self.weight_decay,
            layer_decay=self.layer_decay,
            objective=self.objective,
        )
        optimizer = torch.optim.AdamW(groups, betas=self.betas)
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = round(steps * self.warmup_share)
        schedule = make_schedule(optimizer, kind=self.schedule, warmup=warmup, steps=steps, floor=self.lr_floor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        if self.global_rank:  # else dropout would drop the same places on all ranks
            torch.manual_seed(torch.initial_seed() + self.global_rank)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        output = self.objective(self.model, batch)
        self._ids += batch.ids
        for name, value in output.sums.items():
            self._add(name, value.detach(), output.counts[name])
        places, tokens = batch.attention_mask.numel(), int(batch.attention_mask.sum())
        self._add("padding_share", places - tokens, places)
        self._add("supervised_share", len(batch.targets), tokens)
        return self._total(output)

    def _total(self, output: LossOutput) -> Tensor:
        """The number to minimize: the sum of the mean losses, or of their sums where batches are accumulated.

        Raises ValueError where accumulated losses were summed over different counts.
        """
        losses = [name for name in output.sums if is_loss(name)]
        if self.trainer.accumulate_grad_batches == 1:
            counts = self._over_ranks([output.counts[name] for name in losses])
            weights = [self.trainer.world_size / max(1, count) for count in counts]  # DDP and FSDP average the ranks
            return torch.stack([output.sums[name] * w for name, w in zip(losses, weights, strict=True)]).sum()
        if len(losses) > 1:
            counts = self._over_ranks([output.counts[name] for name in losses])
            if len(set(counts)) > 1:
                means = ", ".join(f"{name} over {count:.0f}" for name, count in zip(losses, counts, strict=True))
                raise ValueError(
                    f"the objective averages {means}, which cannot be separated once batches are accumulated; set "
                    "trainer.accumulate_grad_batches=1 with a larger data.batch_size"
                )
        return torch.stack([output.sums[name] for name in losses]).sum()

    def _add(self, name: str, value: Tensor | int, count: int) -> None:
        """Add to the sums of the optimiser step in progress."""
        self._sums[name] = self._sums.get(name, 0) + value
        self._counts[name] = self._counts.get(name, 0) + count

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        names = list(self._sums)
        sums = self._over_ranks([value for name in names for value in (self._sums[name], self._counts[name])])
        totals = dict(zip(names, zip(sums[::2], sums[1::2], strict=True), strict=True))
        for name, (total, _) in totals.items():
            if not math.isfinite(total):
                self._stop(f"{name} is {total}")
        tokens = max(count for name, (_, count) in totals.items() if is_loss(name))
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if (batches := self.trainer.accumulate_grad_batches) > 1:
            for (
                gradient
            ) in gradients:  # of the sums, which Lightning divided by the batches, and DDP or FSDP by the ranks
                gradient.mul_(batches * self.trainer.world_size / tokens)
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not torch.isfinite(norm) and self.trainer.precision != "16-mixed":  # whose scaler skips such a step
            self._stop(f"the gradient norm is {norm.item()}")
        means = {name: total / count for name, (total, count) in totals.items() if count}
        loss = sum(value for name, value in means.items() if is_loss(name))
        self.figures = {f"train/{name}": value for name, value in means.items()}
        self.figures |= {"train/loss": loss, "train/tokens": tokens, "train/grad_norm": norm}
        self.log_dict(self.figures)
        self._sums, self._counts, self._ids = {}, {}, []

    def on_validation_epoch_start(self) -> None:
        self._seen: dict[tuple[str, str], Tensor] = {}  # of a condition, the sum and the count of a loss
        self._not_compared = 0  # rows with images that nothing could take the place of

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """All rows, then those that can be compared with their own images, with others' and with blank ones."""
        output = self.objective(self.model, batch)
        self._see("loss", output)
        for name in (name for name in output.sums if name.startswith("loss/")):  # of each source of a mixture
            self._see_one("source", name, output.sums[name].item(), output.counts[name])
        if batch_index == 0:
            for name, value in self.model.diagnostics(batch).items():
                self.log(f"val/{name}", value, batch_size=1)
        pairs, rows = compared(batch)
        self._not_compared += num_with_images(batch) - len(rows)
        # Where the model is sliced, all ranks must run it equally often, also one that has nothing to compare.
        some, partly = self._over_ranks([bool(rows), 0 < len(rows) < len(batch.num_images)])
        if some:
            for name in CONDITIONS:
                again = name != "correct" or partly
                same = self.objective(self.model, pairs.get(name, batch)) if again else output
                self._see(name, same, counts=bool(rows))

    def on_validation_epoch_end(self) -> None:
        """Log the means; without two images to swap there is no visual gain."""
        *sums, left_out = self._over_ranks(
            [*(value for pair in self._seen.values() for value in pair), self._not_compared]
        )
        means = {key: a / b for key, a, b in zip(self._seen, sums[::2], sums[1::2], strict=True) if b}

        def total(condition: str) -> float:
            return sum(mean for (name, _), mean in means.items() if name == condition)

        figures = {f"val/{name}": mean for (condition, name), mean in means.items() if condition == "source"}
        figures["val/loss"] = total("loss")
        if any(condition == "correct" for condition, _ in means):
            figures |= {f"val/loss_{name}": total(name) for name in ("shuffled", "blank")}
            figures["val/visual_gain"] = total("shuffled") - total("correct")
        if left_out:
            figures["val/num_not_compared"] = left_out
        self.log_dict(figures)
        self.validated_step = self.global_step

    def _see(self, condition: str, output: LossOutput, *, counts: bool = True) -> None:
        """Add an output's losses to the sums of one condition, or nothing to them."""
        for name in (name for name in output.sums if is_loss(name)):
            self._see_one(condition, name, output.sums[name].item() * counts, output.counts[name] * counts)

    def _see_one(self, condition: str, name: str, value: float, count: int) -> None:
        pair = torch.tensor([value, count], dtype=torch.float64)
        self._seen[condition, name] = self._seen.get((condition, name), 0) + pair

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen tensors out: they are the base models'. The last step's figures go with it."""
        checkpoint["figures"] = {name: float(value) for name, value in self.figures.items()}
        trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trainable}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise ValueError unless the checkpoint holds exactly what trains; what is frozen is loaded already."""
        trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        if odd := sorted(trainable ^ set(checkpoint["state_dict"])):
            raise ValueError(f"the checkpoint does not fit this run: {len(odd)} tensors differ, first {odd[0]!r}")
        self.figures = checkpoint.get("figures", {})  # which one of an earlier version has not

    def _over_ranks(self, values: Sequence[Tensor | int | float]) -> list[float]:
        """The sum of each over all ranks."""
        if self.trainer.world_size == 1 and not any(isinstance(value, Tensor) for value in values):
            return [float(value) for value in values]
        exact = torch.float32 if self.device.type == "mps" else torch.float64  # which Apple's GPUs do not know
        ours = torch.stack([torch.as_tensor(value, dtype=exact).to(self.device) for value in values])
        return self.trainer.strategy.reduce(ours, reduce_op="sum").tolist()

    def _stop(self, what: str) -> None:
        """Raise, on all ranks, what all of them have seen."""
        ours = (self._ids, next(_not_finite(self.model), None))
        of_ranks = [ours] * self.trainer.world_size
        if len(of_ranks) > 1:
            torch.distributed.all_gather_object(of_ranks, ours)
        step = self.global_step + 1
        if name := next((name for _, name in of_ranks if name), None):
            part = name.partition(".")[0]
            raise NotFinite(
                f"{what} at step {step}, because the weights {name} hold NaN or infinity since they were loaded; set "
                f"{part}.pretrained to other weights, or give another ckpt="
            )
        ids = ", ".join(name for names, _ in of_ranks for name in names)
        raise NotFinite(
            f"{what} at step {step}, samples {ids}; the weights of step {self.global_step} are kept: lower stage.lr, "
            "or look at these samples"
        )


def _not_finite(model: nn.Module) -> Iterator[str]:
    """The names of weights that hold NaN or infinity, of this rank's slices; no update of a run makes them so."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        values = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if not values.is_floating_point():
            continue
        finite = torch.isfinite(values) if isinstance(tensor, nn.Parameter) else ~torch.isnan(values)
        if not finite.all():  # infinity in a buffer is a mask's
            yield name
