"""Fully sharded data parallel training (FSDP, Zhao et al., arXiv 2304.11277)."""

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
    """PyTorch's FSDP2: shards parameters (also frozen ones), gradients and optimizer states over all processes.

    The blocks of the parts are gathered one at a time. All other parameters are gathered in the forward pass and
    resharded in the backward pass or in the next forward pass; in between, the whole model can be used. The result
    equals DDP's. It also runs on CPUs. A checkpoint is one file of full tensors, as with other strategies.
    """

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def shard(self, model: Any, objective: nn.Module) -> None:
        """Shard a model block by block, and the objective, unless this is done already.

        Raises ValueError if a parameter of the objective is a scalar.
        """
        if isinstance(model, FSDPModule):
            return
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        for block in (block for part in model.parts for block in model.blocks(part)):
            for module in block if isinstance(block, nn.ModuleList) else (block,):  # of joined encoders
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for method in model.root_methods:
            register_fsdp_forward_method(model, method)
        own = dict(objective.named_parameters())
        if scalar := next((name for name, parameter in own.items() if parameter.ndim == 0), None):
            raise ValueError(
                f"parameter {scalar} of the objective {type(objective).__name__} is a scalar, which "
                "trainer=fsdp cannot shard; make it a vector of length 1, or use trainer=ddp"
            )
        if own:
            fully_shard(objective, mesh=mesh)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The trainable tensors; Lightning's method would also gather the frozen ones."""
        assert self.lightning_module is not None
        self.lightning_module.model.reshard()  # type: ignore[operator,union-attr]  # the optimizer holds shards
        trained = [name for name, p in self.lightning_module.named_parameters() if p.requires_grad]
        return gather(self.lightning_module, trained)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """As Lightning's, with the state dict kept, because `VLMModule.on_load_checkpoint` reads it."""
        path = Path(self.broadcast(checkpoint_path))
        weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
        return {**super().load_checkpoint(path, weights_only), "state_dict": weights}


def gather(module: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Full parameters on the CPU on rank 0, empty on other ranks; all ranks must call this together."""
    rank_zero = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    gathered = {}
    for name in names:
        parameter = module.get_parameter(name)
        tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if rank_zero:
            gathered[name] = tensor.detach().cpu().contiguous()
    return gathered


def check_strategy(trainer: Mapping[str, Any], *, quantization: str, ema_decay: float | None) -> None:
    """Raise ValueError for a strategy that cannot train this model or does not save it in full."""
    strategy = trainer.get("strategy", "auto")
    if isinstance(strategy, str):
        if strategy.startswith(("fsdp", "deepspeed")):
            raise ValueError(
                f"trainer.strategy={strategy} shards the model and does not save it in full; choose trainer=fsdp"
            )
        if strategy.endswith(("_spawn", "_fork", "_notebook")):
            raise ValueError(
                f"trainer.strategy={strategy} starts processes without the command line, which they "
                "need; choose trainer=ddp"
            )
        return
    target = str(strategy.get("_target_"))
    if target.endswith((".FSDPStrategy", ".ModelParallelStrategy", ".DeepSpeedStrategy")):
        raise ValueError(f"trainer.strategy._target_={target} does not save the model in full; choose trainer=fsdp")
    if not target.endswith(".FullyShard"):
        return
    if quantization != "none":
        raise ValueError(
            f"llm.quantization={quantization} makes weights that cannot be sharded; set it to none or use trainer=ddp"
        )
    if ema_decay is not None:
        raise ValueError(
            f"stage.ema_decay={ema_decay} averages full tensors, but this trainer shards them; set it to null or use "
            "trainer=ddp"
        )
