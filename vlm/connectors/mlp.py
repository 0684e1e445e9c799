"""A perceptron on every patch: LLaVA-1.5's connector (Liu et al., arXiv 2310.03744).

Axes: N images, P patches per image, Dv encoder width, K = P visual tokens, D LLM width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

# E[gelu(z)²] for z ~ N(0, 1), gelu(z) = z·Φ(z). With ψ = Φ - ½, which is odd, it is ¼ + E[z²ψ²]. Stein's lemma
# (E[z·f(z)] = E[f'(z)]) gives E[z²ψ²] = E[ψ²] + 2·E[zψφ]; E[ψ²] = 1/12 as Φ(z) is uniform, and E[zψφ] = 1 / (4π√3).
GELU_SECOND_MOMENT = 1 / 3 + 1 / (2 * math.pi * math.sqrt(3))


class MLP(nn.Module):
    """features [N,P,Dv] -> visual [N,P,D]: `depth` linear layers with GELU between them.

    With `norm` and `position` off it is LLaVA's projector, initialised as PyTorch does; with `norm` the visual tokens
    start with the root mean square of the LLM's input embeddings.

    Parameters at depth 2, hidden width D: Dv·D + D² + 2·D, and 2·Dv for the norm, P·D for the positions.

    Args:
        vision_width, llm_width, grid, output_rms: of the encoder and the LLM; the builder passes them.
        depth: how many linear layers.
        hidden_width: width between them; None is the LLM's.
        norm: layer norm on the features first.
        position: add a learned vector per visual token, zero at the start.
    """

    fusion: ClassVar[str] = "tokens"

    def __init__(
        self,
        *,
        vision_width: int,
        llm_width: int,
        grid: tuple[int, int],
        output_rms: float,
        depth: int = 2,
        hidden_width: int | None = None,
        norm: bool = True,
        position: bool = True,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"connector.depth={depth} leaves no layer; set it to 1 or more")
        self.num_tokens = grid[0] * grid[1]
        hidden = [llm_width if hidden_width is None else hidden_width] * (depth - 1)
        self.norm = nn.LayerNorm(vision_width) if norm else nn.Identity()
        layers = [nn.Linear(*widths) for widths in pairwise([vision_width, *hidden, llm_width])]
        self.layers = nn.ModuleList(layers)
        self.position = nn.Parameter(torch.zeros(self.num_tokens, llm_width)) if position else None
        if norm:  # without it the scale of the features is unknown
            match_scale(layers, output_rms)

    def forward(self, features: Float[Tensor, "n p dv"]) -> Float[Tensor, "n k d"]:
        first, *rest = self.layers
        features = features.to(next(self.parameters()).dtype)  # N P Dv
        visual = first(self.norm(features))  # N P D
        for layer in rest:
            visual = layer(F.gelu(visual))  # N P D
        return visual if self.position is None else visual + self.position  # N K D


def match_scale(layers: Sequence[nn.Linear], output_rms: float) -> None:
    """Draw the weights of linear layers with GELU between them: each gives unit variance, the last one `output_rms`.

    Var[Wx] = fan_in · E[w²] · E[x²] (He et al., arXiv 1502.01852), where E[x²] is 1 after a norm.
    """
    second_moment = 1.0
    for layer in layers:
        rms = output_rms if layer is layers[-1] else 1.0
        nn.init.normal_(layer.weight, std=rms / math.sqrt(layer.in_features * second_moment))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
        second_moment = GELU_SECOND_MOMENT
