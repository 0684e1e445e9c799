"""The LightningModule: a step calls the objective, validation calls the evaluators."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Annotated, Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlm.evaluation.base import Context, Evaluator, Means, total
from vlm.ranges import Number, Range, Ratio, RatioAboveZero, RatioBelowOne
from vlm.schema import Batch, LossOutput, is_loss
from vlm.training.optim import Rate, Schedule, learning_rates, make_schedule, parameter_groups
from vlm.training.sharding import FullyShard


class TrainingStopped(ValueError):
    """Raised on every rank after the same step; the weights can be saved."""


class NotFinite(TrainingStopped):
    """The loss or a gradient became NaN or infinite; the weights are those of the step before."""


class VLMModule(pl.LightningModule):
    """Trains a model on an objective and measures it with named evaluators.

    The gradient of an optimizer step is that of the mean over all its supervised tokens, whatever the number of rows,
    accumulated batches and ranks. Without accumulation the losses are divided by their counts before the backward pass.
    With accumulation the counts of later batches are not known then, so the gradients are divided before the update.

    Attributes:
        figures: metrics of the last optimizer step; Lightning's callback_metrics also hold those of earlier steps.
        totals: metrics of the whole run, added by callbacks.
        stopped_by: the signal that stopped the run, or None.
        budget_is_spent: whether the run ended at `sweep.budget`.
        weights_to_save: context in which the model holds the weights to save, such as a moving average.
    """

    def __init__(
        self,
        *,
        model: Any,
        objective: Any,
        evaluators: Mapping[str, Evaluator] | None = None,
        lr: dict[str, Rate],
        layer_decay: RatioAboveZero | None = None,
        weight_decay: Annotated[Number, Range(0, 100)] = 0.0,
        schedule: Schedule = "cosine",
        warmup_ratio: RatioBelowOne = 0.03,
        min_lr_ratio: Ratio = 0.05,
        betas: tuple[RatioBelowOne, RatioBelowOne] = (0.9, 0.999),
    ) -> None:
        super().__init__()
        self.model, self.objective, self.evaluators = model, objective, dict(evaluators or {})
        self.strict_loading = (
            False  # a checkpoint holds the trainable parameters; `on_load_checkpoint` checks their names
        )
        self.lr, self.layer_decay, self.weight_decay, self.betas = lr, layer_decay, weight_decay, betas
        self.schedule, self.warmup_ratio, self.min_lr_ratio = schedule, warmup_ratio, min_lr_ratio
        self._sums: dict[str, Tensor | int] = {}
        self._counts: dict[str, int] = {}
        self._ids: list[str] = []
        self.figures: dict[str, Any] = {}
        self.totals: dict[str, float] = {}
        self.stopped_by: int | None = None
        self.budget_is_spent = False
        self.weights_to_save: Callable[[], AbstractContextManager[None]] = nullcontext
        self.validated_step = -1  # optimizer step of the last validation
        self.train()

    def train(self, mode: bool = True) -> VLMModule:
        """Set the mode; frozen modules stay in evaluation mode, without dropout."""
        super().train(mode)
        for module in self.modules():
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()
        return self

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, FullyShard):
            self.trainer.strategy.shard(self.model, self.objective)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """For the optimizer. Raises ValueError for a trainable parameter that has no learning rate."""
        return parameter_groups(
            self.model,
            lr=self.lr,
            weight_decay=self.weight_decay,
            layer_decay=self.layer_decay,
            objective=self.objective,
        )

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameter_groups(), betas=self.betas)
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = round(steps * self.warmup_ratio)
        schedule = make_schedule(optimizer, kind=self.schedule, warmup=warmup, steps=steps, min_ratio=self.min_lr_ratio)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        if self.global_rank:  # otherwise dropout would be the same on all ranks
            torch.manual_seed(torch.initial_seed() + self.global_rank)
        for evaluator in self.evaluators.values():
            evaluator.before_training(self.context)

    def on_train_batch_start(self, batch: Batch, batch_index: int) -> None:
        """Free the gradients of the last step; Lightning does so between the forward and the backward pass."""
        if batch_index % self.trainer.accumulate_grad_batches == 0:
            self.zero_grad()

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        output = self.objective(self.model, batch)
        self._ids += batch.ids
        for name, value in output.sums.items():
            self._add(name, value.detach(), output.counts[name])
        positions, tokens = batch.attention_mask.numel(), int(batch.attention_mask.sum())
        self._add("padding_ratio", positions - tokens, positions)
        self._add("supervised_ratio", len(batch.targets), tokens)
        return self._total(output)

    def _total(self, output: LossOutput) -> Tensor:
        """The value to minimize: the sum of the mean losses, or of the summed losses with gradient accumulation.

        Raises ValueError if accumulated losses have different counts.
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
                    f"the objective averages {means}, which gradient accumulation cannot normalize separately; set "
                    "trainer.accumulate_grad_batches=1 with a larger data.batch_size"
                )
        return torch.stack([output.sums[name] for name in losses]).sum()

    def _add(self, name: str, value: Tensor | int, count: int) -> None:
        """Add to the sums of the current optimizer step."""
        self._sums[name] = self._sums.get(name, 0) + value
        self._counts[name] = self._counts.get(name, 0) + count

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        names = list(self._sums)
        sums = self._over_ranks([value for name in names for value in (self._sums[name], self._counts[name])])
        totals = dict(zip(names, zip(sums[::2], sums[1::2], strict=True), strict=True))
        for name, (value, _) in totals.items():
            if not math.isfinite(value):
                self._stop(f"{name} is {value}")
        tokens = max(count for name, (_, count) in totals.items() if is_loss(name))
        gradients = self._gradients()
        if (batches := self.trainer.accumulate_grad_batches) > 1:
            for gradient in chain.from_iterable(gradients.values()):
                # Lightning has divided by the batches, DDP or FSDP by the ranks.
                gradient.mul_(batches * self.trainer.world_size / tokens)
        norms = {part: _norm(of_part) for part, of_part in gradients.items()}
        norm = torch.linalg.vector_norm(torch.stack([*norms.values()]))
        if not torch.isfinite(norm) and self.trainer.precision != "16-mixed":  # its scaler skips the step
            self._stop(f"the gradient norm is {norm.item()}")
        means = {name: total / count for name, (total, count) in totals.items() if count}
        loss = sum(value for name, value in means.items() if is_loss(name))
        self.figures = {f"train/{name}": value for name, value in means.items()}
        self.figures |= {"train/loss": loss, "train/tokens": tokens, "train/grad_norm": norm}
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.figures |= {f"train/grad_norm/{part}": value for part, value in norms.items()}
            self.figures |= {f"lr/{name}": lr for name, lr in learning_rates(optimizer.param_groups).items()}
        # Sources without a sample in this step; otherwise loggers would repeat the loss of an earlier step.
        absent = {f"train/{name}": float("nan") for name in totals.keys() - means.keys()}
        self.log_dict({**absent, **self.figures, "step": self.global_step + 1})  # loggers use it as the step
        self._sums, self._counts, self._ids = {}, {}, []

    def _gradients(self) -> dict[str, list[Tensor]]:
        """The gradients of each trained part; parts without a gradient in this step have an empty list."""
        parts = {part: getattr(self.model, part) for part in self.model.parts} | {"objective": self.objective}
        trained = {part: [p for p in module.parameters() if p.requires_grad] for part, module in parts.items()}
        return {part: [p.grad for p in each if p.grad is not None] for part, each in trained.items() if each}

    def on_validation_epoch_start(self) -> None:
        self._means = Means()
        for evaluator in self._due("validation").values():
            evaluator.start()

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        output = self.objective(self.model, batch)
        self._means.add_losses("loss:", output)
        for name in (name for name in output.sums if not is_loss(name)):
            self._means.add(name, output.sums[name].item(), output.counts[name])
        if batch_index == 0:
            for name, value in self.model.diagnostics(batch).items():
                self.log(f"val/{name}", value, batch_size=1)
        for evaluator in self._due("validation").values():
            evaluator.update(self.context, batch, output)

    def on_validation_epoch_end(self) -> None:
        means = self._means.over_ranks(self.context)
        metrics = {f"val/{name.removeprefix('loss:')}": mean for name, mean in means.items()}
        metrics["val/loss"] = total(means, "loss:")
        for evaluator in self._due("validation").values():
            metrics |= evaluator.finish(self.context)
        self.log_dict({**metrics, "step": self.global_step})
        self.validated_step = self.global_step

    def on_validation_end(self) -> None:
        """Raise TrainingStopped if an evaluator has a reason to stop; callbacks and loggers have run before."""
        if self.trainer.state.fn == "fit":
            for evaluator in self._due("validation").values():
                if (reason := evaluator.reason_to_stop(self.global_step)) is not None:
                    raise TrainingStopped(reason)

    def _due(self, at: str) -> dict[str, Evaluator]:
        return {name: evaluator for name, evaluator in self.evaluators.items() if evaluator.at == at}

    def evaluate_at_end(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics of the evaluators with `at="end"`, and the samples of all; every rank must call this."""
        metrics: dict[str, float] = {}
        samples: list[dict[str, Any]] = []
        self.model.to(self.trainer.strategy.root_device).eval()  # Lightning has moved it to the CPU
        with self.trainer.precision_plugin.forward_context():
            for evaluator in self.evaluators.values():
                if evaluator.at == "end":
                    metrics |= evaluator.finish(self.context)
                samples += evaluator.samples
        return metrics, samples

    @property
    def context(self) -> Context:
        """The context of the evaluators."""
        strategy = self.trainer.strategy
        return Context(
            model=self.model,
            objective=self.objective,
            data=self.trainer.datamodule,  # type: ignore[attr-defined]
            device=strategy.root_device,
            sum_over_ranks=self._over_ranks,
            from_rank_zero=strategy.broadcast,
            autocast=self.trainer.precision_plugin.forward_context,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the frozen tensors, which the base models have; add the metrics of the last step."""
        checkpoint["evaluators"] = {name: evaluator.state_dict() for name, evaluator in self.evaluators.items()}
        checkpoint["figures"] = {name: float(value) for name, value in self.figures.items()}
        trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trainable}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise ValueError unless the checkpoint holds exactly the trainable parameters."""
        trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        if differing := sorted(trainable ^ set(checkpoint["state_dict"])):
            raise ValueError(
                f"the checkpoint does not fit this run: {len(differing)} tensors differ, first {differing[0]!r}"
            )
        self.figures = checkpoint.get("figures", {})  # missing in earlier versions
        earlier = checkpoint["callbacks"].get("Forgetting")  # a callback in earlier versions
        states = checkpoint.get("evaluators", {"forgetting": earlier} if earlier else {})
        for name in self.evaluators.keys() & states.keys():
            self.evaluators[name].load_state_dict(states[name])

    def _over_ranks(self, values: Sequence[Tensor | int | float]) -> list[float]:
        """The sum of each value over all ranks."""
        if not values:
            return []
        if self.trainer.world_size == 1 and not any(isinstance(value, Tensor) for value in values):
            return [float(value) for value in values]
        dtype = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no float64
        stacked = torch.stack([torch.as_tensor(value, dtype=dtype).to(self.device) for value in values])
        return self.trainer.strategy.reduce(stacked, reduce_op="sum").tolist()

    def _stop(self, what: str) -> None:
        """Raise NotFinite on all ranks, with the samples of all ranks."""
        local = (self._ids, next(_not_finite(self.model), None))
        of_ranks = [local] * self.trainer.world_size
        if len(of_ranks) > 1:
            torch.distributed.all_gather_object(of_ranks, local)
        step = self.global_step + 1
        if name := next((name for _, name in of_ranks if name), None):
            part = name.partition(".")[0]
            raise NotFinite(
                f"{what} at step {step}, because the loaded weights {name} hold NaN or infinity; set "
                f"{part}.pretrained to other weights, or give another ckpt="
            )
        ids = ", ".join(name for names, _ in of_ranks for name in names)
        raise NotFinite(
            f"{what} at step {step}, samples {ids}; the weights of step {self.global_step} are kept; lower stage.lr "
            "or check these samples"
        )


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _not_finite(model: nn.Module) -> Iterator[str]:
    """Names of weights with NaN or infinity in this rank's shards."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        values = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if not values.is_floating_point():
            continue
        finite = torch.isfinite(values) if isinstance(tensor, nn.Parameter) else ~torch.isnan(values)
        if not finite.all():  # buffers may be masks with infinity
            yield name
