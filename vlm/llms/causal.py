"""Decoder-only language models of Transformers (`AutoModelForCausalLM`).

Axes: B rows, T tokens per row, D width, V vocabulary, M number of positions in `logits_mask`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from vlm.llms import attention
from vlm.llms.base import LanguageModel
from vlm.llms.cache import BufferedCache


class CausalLM(LanguageModel):
    """A causal LLM."""

    auto_class: ClassVar[Any] = AutoModelForCausalLM
    fusions: ClassVar[tuple[str, ...]] = ("tokens", "layers")
    selects_tokens: ClassVar[bool] = True

    def layers(self) -> list[nn.Module]:
        depth = self.model.config.get_text_config().num_hidden_layers
        lists = (m for m in self.model.get_decoder().modules() if isinstance(m, nn.ModuleList))
        return list(next(layers for layers in lists if len(layers) == depth))

    def auto_attention(self) -> None:
        """On a machine without GPU use attention in blocks, if it keeps the samples of a row apart in this model."""
        if torch.accelerator.is_available() or not self.model._supports_attention_backend:
            return
        attention.register()
        self.model.set_attn_implementation(attention.NAME)
        if self.model.get_input_embeddings().weight.is_meta:
            return
        try:
            separate = self._separates_samples()
        except (TypeError, ValueError):  # the model does not pass `sample_starts` on, or its layers need more than it
            separate = False
        if not separate:
            self.model.set_attn_implementation("sdpa")

    @property
    def joins_rows(self) -> bool:
        return self.attention == attention.NAME

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
        options: dict[str, Any] = {"attention_mask": mask, "position_ids": position_ids}
        if self.joins_rows and mask is None and len(embeds) == 1:
            # A mask of four axes passes through Transformers unchanged: none of T x T is made.
            options["attention_mask"] = embeds.new_ones(1, 1, 1, 1, dtype=torch.bool)
            options["sample_starts"] = (position_ids[0] == 0).nonzero()[:, 0]
        with self.select_logits(logits_mask), self.recomputing(torch.is_grad_enabled()):
            return self.model(inputs_embeds=embeds, use_cache=False, **options).logits  # M V

    @torch.no_grad()
    def generate(self, embeds: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"], **options: Any) -> Int[Tensor, "b s"]:
        chosen = self.generation == "checkpoint" or {"use_cache", "cache_implementation"} & options.keys()
        if self.attention == attention.NAME and self.can_continue and not chosen:
            options.setdefault("past_key_values", BufferedCache(config=self.model.config))
        return super().generate(embeds, mask, **options)  # B S

    @property
    def can_continue(self) -> bool:
        return bool(self.model._supports_default_dynamic_cache())

    @torch.no_grad()
    def continued(
        self,
        prefix: Float[Tensor, "1 p d"],
        embeds: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "b t"],
        logits_mask: Bool[Tensor, "b t"],
    ) -> Float[Tensor, "m v"]:
        """Logits at `logits_mask` of right-padded rows that all follow `prefix`, which is computed once.

        Axes: P tokens of the prefix, of which no logits are computed.
        """
        cache = DynamicCache(config=self.model.config)
        num, where = prefix.shape[1], self.adapted.where
        positions = torch.arange(num + embeds.shape[1], device=embeds.device)[None]  # 1 P+T
        with self.recomputing(False):
            with self.select_logits(mask.new_zeros(1, num)):
                self.adapted.where = None if where is None else where[:1, :num]
                self.model(inputs_embeds=prefix, position_ids=positions[:, :num], past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(len(embeds))
            self.adapted.where = where
            whole = torch.cat([mask.new_ones(len(mask), num), mask], dim=1)  # B P+T
            options = {"attention_mask": whole, "position_ids": positions[:, num:].expand(len(embeds), -1)}
            with self.select_logits(logits_mask):
                return self.model(inputs_embeds=embeds, past_key_values=cache, use_cache=True, **options).logits  # M V

    def check_packing(self) -> None:
        """Raise ValueError unless samples in one row are independent of each other; not every model supports it."""
        if not self._separates_samples():
            name = self.model.config.model_type
            raise ValueError(f"llm {name} attends across samples of one row; set data.packing=false")

    @torch.no_grad()
    def _separates_samples(self) -> bool:
        """Whether the logits of the second sample of a row are the same after two different first samples."""
        device = self.model.get_input_embeddings().weight.device
        position_ids = torch.tensor([[0, 1, 2, 0, 1, 2]], device=device)
        second = torch.arange(6, device=device)[None] > 2
        one, other = (
            self(self.embed(torch.tensor([[*first, 8, 9, 10]], device=device)), None, position_ids, second)
            for first in ((5, 6, 7), (11, 12, 13))
        )
        return torch.allclose(one, other, atol=1e-3 * float(one.abs().max()))
