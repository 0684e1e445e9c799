"""Models that no single device holds: a slice of every parameter on each (FSDP, Zhao et al., arXiv 2304.11277)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor


class FullyShard(ModelParallelStrategy):
    """Slices all parameters, frozen ones too, and their gradients and optimiser states evenly over all processes.

    The blocks of the encoder and the layers of the LLM are put together one at a time, when the computation comes to
    them. What is left (the connector, embeddings, the output matrix) is put together by the model's forward pass and
    sliced again by the backward pass, or the next one, so that all of the model can be used between the two. The
    arithmetic is that of DDP. It is PyTorch's FSDP2, which also runs on CPUs.

    A checkpoint is one file of whole tensors, as with every other strategy.
    """

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def shard(self, model: Any) -> None:
        """Slice a model of encoder, connector and LLM, unless that is done."""
        if isinstance(model, FSDPModule):
            return
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        for unit in (*model.encoder.blocks(), *model.llm.layers()):
            for part in unit if isinstance(unit, nn.ModuleList) else (unit,):  # encoders side by side
                fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for method in ("generate", "without_images"):
            register_fsdp_forward_method(model, method)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What trains; Lightning's own would also put the frozen tensors together, for a checkpoint without them."""
        assert self.lightning_module is not None
        self.lightning_module.model.reshard()  # type: ignore[operator,union-attr]  # the optimiser knows slices alone
        trained = [name for name, p in self.lightning_module.named_parameters() if p.requires_grad]
        return gather(self.lightning_module, trained)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Lightning's own, with the weights left in, at which the module looks."""
        path = Path(self.broadcast(checkpoint_path))
        weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
        return {**super().load_checkpoint(path, weights_only), "state_dict": weights}


def gather(module: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Whole parameters on the CPU for rank 0, none for the others; all ranks must call this at the same time."""
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    gathered = {}
    for name in names:
        parameter = module.get_parameter(name)
        with _whole(parameter):
            tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if first:
                gathered[name] = tensor.detach().cpu().contiguous()
    return gathered


def _whole(parameter: nn.Parameter) -> Any:
    """Within it a parameter that DeepSpeed's ZeRO 3 has sliced is put together."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


def check_strategy(trainer: Mapping[str, Any], *, quantization: str, ema_decay: float | None) -> None:
    """Raise ValueError for a strategy that cannot train this, or would not save it whole."""
    strategy = trainer.get("strategy", "auto")
    if isinstance(strategy, str):
        if strategy.startswith(("fsdp", "deepspeed")):
            raise ValueError(
                f"trainer.strategy={strategy} slices the model in a way of Lightning's that is not saved whole; "
                "choose trainer=fsdp, deepspeed_zero2 or deepspeed_zero3"
            )
        return
    target = str(strategy.get("_target_"))
    if target.endswith((".FSDPStrategy", ".ModelParallelStrategy")):
        raise ValueError(f"trainer.strategy._target_={target} does not save the model whole; choose trainer=fsdp")
    if not target.endswith((".FullyShard", ".DeepSpeedStrategy")):
        return
    if quantization != "none":
        raise ValueError(
            f"llm.quantization={quantization} makes weights that cannot be sliced; set it to none or use trainer=ddp"
        )
    if ema_decay is not None:
        raise ValueError(
            f"stage.ema_decay={ema_decay} averages whole tensors, and this trainer slices them; set it to null or use "
            "trainer=ddp"
        )
    batches = trainer.get("accumulate_grad_batches", 1)
    if target.endswith(".DeepSpeedStrategy") and batches != 1:
        raise ValueError(
            f"trainer.accumulate_grad_batches={batches}, but DeepSpeed would give every batch the same weight however "
            "many tokens it has; set it to 1 with a larger data.batch_size, or choose trainer=fsdp"
        )


def keeps_checkpoints(trainer: Mapping[str, Any]) -> bool:
    """Whether a run with this strategy can be resumed; DeepSpeed's checkpoints are folders of its own."""
    strategy = trainer.get("strategy")
    return not (isinstance(strategy, Mapping) and str(strategy["_target_"]).endswith(".DeepSpeedStrategy"))


def check_resumes(trainer: Mapping[str, Any]) -> None:
    """Raise ValueError for a strategy with which a run keeps no checkpoints."""
    if not keeps_checkpoints(trainer):
        raise ValueError(
            "with DeepSpeed a run saves its artefact but no checkpoint to resume from; start a new run with ckpt=, or "
            "choose trainer=fsdp from the start"
        )
