"""Models that no single device holds: a slice of every parameter on each (FSDP, Zhao et al., arXiv 2304.11277)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor


class FullyShard(ModelParallelStrategy):
    """Slices all parameters, frozen ones too, and their gradients and optimizer states evenly over all processes.

    The blocks of the encoder and the layers of the LLM are put together one at a time, when the computation comes to
    them. What is left (the connector, embeddings, the output matrix) is put together by the model's forward pass and
    sliced again by the backward pass, or the next one, so that all of the model can be used between the two. The
    arithmetic is that of DDP. It is PyTorch's FSDP2, which also runs on CPUs.

    A checkpoint is one file of whole tensors, as with every other strategy.
    """

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def shard(self, model: Any, objective: nn.Module) -> None:
        """Shard a model block by block, and the objective's own parameters, unless that is done.

        Raises ValueError for a parameter without an axis to slice.
        """
        if isinstance(model, FSDPModule):
            return
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        for block in (block for part in model.parts for block in model.blocks(part)):
            for module in block if isinstance(block, nn.ModuleList) else (block,):  # encoders side by side
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for method in model.root_methods:
            register_fsdp_forward_method(model, method)
        own = dict(objective.named_parameters())
        if scalar := next((name for name, parameter in own.items() if parameter.ndim == 0), None):
            raise ValueError(
                f"parameter {scalar} of the objective {type(objective).__name__} is a single number, which "
                "trainer=fsdp cannot slice; make it a vector of one, or use trainer=ddp"
            )
        if own:
            fully_shard(objective, mesh=mesh)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What trains; Lightning's own would also put the frozen tensors together, for a checkpoint without them."""
        assert self.lightning_module is not None
        self.lightning_module.model.reshard()  # type: ignore[operator,union-attr]  # the optimizer knows slices alone
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
        tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if first:
            gathered[name] = tensor.detach().cpu().contiguous()
    return gathered


def check_strategy(trainer: Mapping[str, Any], *, quantization: str, ema_decay: float | None) -> None:
    """Raise ValueError for a strategy that cannot train this, or would not save it whole."""
    strategy = trainer.get("strategy", "auto")
    if isinstance(strategy, str):
        if strategy.startswith(("fsdp", "deepspeed")):
            raise ValueError(
                f"trainer.strategy={strategy} slices the model in a way of Lightning's that is not saved whole; "
                "choose trainer=fsdp"
            )
        if strategy.endswith(("_spawn", "_fork", "_notebook")):
            raise ValueError(
                f"trainer.strategy={strategy} starts processes without the command line they need; choose trainer=ddp"
            )
        return
    target = str(strategy.get("_target_"))
    if target.endswith((".FSDPStrategy", ".ModelParallelStrategy", ".DeepSpeedStrategy")):
        raise ValueError(f"trainer.strategy._target_={target} does not save the model whole; choose trainer=fsdp")
    if not target.endswith(".FullyShard"):
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
