"""Adapters that act on some tokens of a row only, so that a text without images is that of the untouched LLM.

Phi-4-Multimodal (arXiv 2503.01743) uses its vision adapter where there is an image; InternLM-XComposer2 (Partial LoRA,
arXiv 2401.16420) adapts the visual tokens alone.
"""

from __future__ import annotations

from typing import Any, Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlm.schema import Batch

Tokens = Literal["all", "after_image", "visual"]


class AdaptedTokens:
    """Has the LoRA layers that it is attached to act on the tokens of `where` only.

    Attributes:
        tokens: `all`, `after_image` (an image and all tokens after the first one) or `visual` (the visual tokens).
        where: the tokens of the rows that are computed next; None is all. A token that is generated is as the last one.
    """

    def __init__(self, tokens: Tokens = "all") -> None:
        self.tokens = tokens
        self.where: Bool[Tensor, "b t"] | None = None

    def attach(self, layer: Any) -> None:
        """Attach to a LoRA layer of PEFT. Raises ValueError for an embedding, whose adapter is not a module."""
        if len(layer.lora_embedding_A):
            raise ValueError(
                f"stage.lora.tokens={self.tokens} cannot adapt an embedding; leave it out of stage.lora.target_modules"
            )
        for down in layer.lora_A.values():
            down.register_forward_hook(self._mask)

    def of(self, batch: Batch) -> Bool[Tensor, "b t"] | None:
        """The tokens of a batch that the adapter acts on; None is all."""
        if self.tokens == "all":
            return None
        return batch.image_mask if self.tokens == "visual" else batch.images_before > batch.images_hidden

    def _mask(self, module: nn.Module, arguments: Any, low: Float[Tensor, "*b t r"]) -> Float[Tensor, "*b t r"]:
        if self.where is None:
            return low
        if low.ndim != 3:
            raise ValueError(
                f"stage.lora.tokens={self.tokens} needs layers that see whole rows, and this llm's experts do not; "
                "set stage.lora.tokens=all"
            )
        rows = self.where.repeat_interleave(len(low) // len(self.where), 0)  # of each beam
        return low * rows[:, -low.shape[1] :, None]
