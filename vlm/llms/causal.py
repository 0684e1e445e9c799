"""Any decoder-only language model of Transformers, given embeddings instead of ids and asked only for some logits.

Axes: B rows, T tokens per row, D width, V vocabulary, M kept positions of the batch.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from vlm.llms.base import LanguageModel


class CausalLM(LanguageModel):
    """A causal LLM behind the contract of this project."""

    auto_class: ClassVar[Any] = AutoModelForCausalLM
    fusions: ClassVar[tuple[str, ...]] = ("tokens", "layers")

    def layers(self) -> list[nn.Module]:
        depth = self.model.config.get_text_config().num_hidden_layers
        lists = (m for m in self.model.get_decoder().modules() if isinstance(m, nn.ModuleList))
        return list(next(layers for layers in lists if len(layers) == depth))

    def forward(
        self,
        embeds: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "b t"],
        positions: Int[Tensor, "b t"],
        keep: Bool[Tensor, "b t"],
    ) -> Float[Tensor, "m v"]:
        """Logits at the positions of `keep` alone, row by row."""
        with self.narrowed(keep), self.recomputing(torch.is_grad_enabled()):
            return self.model(
                inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
            ).logits  # M V
