"""MLP projector: the connector of LLaVA-1.5 (Liu et al., arXiv 2310.03744).

Axes: N images, P patches per image, Dv encoder width, K = P visual tokens, D LLM width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.ranges import Depth, Width

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class MLP(nn.Module):
    """features [N,P,Dv] -> visual [N,P,D]: `depth` linear layers with an activation between them.

    Without `norm` and `position` it is LLaVA's projector with PyTorch's initialization. With `norm` the visual tokens
    start with the root mean square of the LLM's input embeddings, and the mean of each activation is subtracted:
    otherwise the part that all patches have in common dominates the updates.

    Parameters at depth 2, hidden width D: Dv·D + D² + 2·D, and 2·Dv for the norm, P·D for the position embeddings.

    Args:
        vision_width, llm_width, grid, output_rms: of the encoder and the LLM; the builder passes them.
        depth: number of linear layers.
        hidden_width: width between them; None is the LLM's.
        activation: gelu, relu or silu.
        norm: layer norm on the features first.
        position: add a learned position embedding per visual token, zero at the start.
    """

    fusion: ClassVar[str] = "tokens"

    def __init__(
        self,
        *,
        vision_width: int,
        llm_width: int,
        grid: tuple[int, int],
        output_rms: float,
        depth: Depth = 2,
        hidden_width: Width | None = None,
        activation: Literal["gelu", "relu", "silu"] = "gelu",
        norm: bool = True,
        position: bool = True,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"connector.depth={depth} must be at least 1")
        self.num_tokens = grid[0] * grid[1]
        hidden = [llm_width if hidden_width is None else hidden_width] * (depth - 1)
        self.norm = nn.LayerNorm(vision_width) if norm else nn.Identity()
        layers = [nn.Linear(*widths) for widths in pairwise([vision_width, *hidden, llm_width])]
        self.layers = nn.ModuleList(layers)
        self.position = nn.Parameter(torch.zeros(self.num_tokens, llm_width)) if position else None
        self.activation, self.shift = ACTIVATIONS[activation], 0.0
        if norm:  # without a norm the scale of the features is unknown
            self.shift, variance = moments(self.activation)
            match_scale(layers, output_rms, hidden_variance=variance)

    def forward(self, features: Float[Tensor, "n p dv"]) -> Float[Tensor, "n k d"]:
        first, *rest = self.layers
        features = features.to(next(self.parameters()).dtype)  # N P Dv
        visual = first(self.norm(features))  # N P D
        for layer in rest:
            visual = layer(self.activation(visual) - self.shift)  # N P D
        return visual if self.position is None else visual + self.position  # N K D


def match_scale(layers: Sequence[nn.Linear], output_rms: float, *, hidden_variance: float = 1.0) -> None:
    """Initialize linear layers so that each output has unit variance, the last one `output_rms`².

    Var[Wx] = fan_in · E[w²] · E[x²] (He et al., arXiv 1502.01852), with E[x²] = 1 for the first layer, after a norm,
    and `hidden_variance` for the others.
    """
    for layer in layers:
        rms = output_rms if layer is layers[-1] else 1.0
        variance = 1.0 if layer is layers[0] else hidden_variance
        nn.init.normal_(layer.weight, std=rms / math.sqrt(layer.in_features * variance))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def moments(activation: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Mean and variance of activation(z) for z ~ N(0, 1), integrated from -10 to 10."""
    z = torch.linspace(-10, 10, 20_001, dtype=torch.float64, device="cpu")
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    value = activation(z)
    mean = torch.trapezoid(density * value, z)
    return mean.item(), torch.trapezoid(density * (value - mean).square(), z).item()
