"""Decoder-only language models of Transformers (`AutoModelForCausalLM`).

Axes: B rows, T tokens per row, D width, V vocabulary, M number of positions in `logits_mask`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from vlm.llms.base import LanguageModel


class CausalLM(LanguageModel):
    """A causal LLM."""

    auto_class: ClassVar[Any] = AutoModelForCausalLM
    fusions: ClassVar[tuple[str, ...]] = ("tokens", "layers")

    def layers(self) -> list[nn.Module]:
        depth = self.model.config.get_text_config().num_hidden_layers
        lists = (m for m in self.model.get_decoder().modules() if isinstance(m, nn.ModuleList))
        return list(next(layers for layers in lists if len(layers) == depth))

    def forward(
        self,
        embeds: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "b t"] | None,
        position_ids: Int[Tensor, "b t"],
        logits_mask: Bool[Tensor, "b t"],
    ) -> Float[Tensor, "m v"]:
        """Logits at the positions of `logits_mask`, row by row.

        Without `mask` a row may hold several samples: each starts where `position_ids` restart, and tokens attend only
        within their sample. `check_packing` tests this.
        """
        with self.select_logits(logits_mask), self.recomputing(torch.is_grad_enabled()):
            return self.model(
                inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, use_cache=False
            ).logits  # M V

    @torch.no_grad()
    def check_packing(self) -> None:
        """Raise ValueError unless samples in one row are independent of each other; not every model supports it."""
        device = self.model.get_input_embeddings().weight.device
        ids = torch.tensor(
            [[5, 6, 7, 8, 9, 10], [11, 12, 13, 8, 9, 10]], device=device
        )  # only the first sample differs
        position_ids = torch.tensor([[0, 1, 2, 0, 1, 2]], device=device).expand(2, -1)
        logits_mask = (position_ids >= 0) & (torch.arange(6, device=device) > 2)
        one, other = self(self.embed(ids), None, position_ids, logits_mask).view(2, 3, -1)
        if not torch.allclose(one, other, atol=1e-3 * float(one.abs().max())):
            name = self.model.config.model_type
            raise ValueError(f"llm {name} attends across samples of one row; set data.packing=false")
