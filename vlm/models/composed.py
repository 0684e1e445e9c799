"""Encoder, connector and LLM in a row: the picture enters the LLM as visual tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlm.models.base import Model
from vlm.schema import Batch


class Composed(Model):
    """A vision-language model made of three parts.

    pixels [N,3,H,W] ── encoder ──► features [N,P,Dv] ── connector ──► visual [N,K,D]
                                                                           │
    input_ids [B,T] ── llm.embed ──► embeds [B,T,D] ◄── placeholders ──────┘  fusion "tokens"
                                          │          or decoder layers ◄───┘  fusion "layers"
                                          ▼
                                         llm ──► logits [M,V] at the positions before supervised tokens
    """

    parts = {  # noqa: RUF012
        "encoder": ("frozen", "full", "last_n"),
        "connector": ("frozen", "full"),
        "llm": ("frozen", "full", "lora", "last_n"),
    }
    pretrained = ("encoder", "llm")
    layer_decay_part = "encoder"
    root_methods = ("generate", "without_images")

    encoder: Any
    connector: Any
    llm: Any

    def __init__(self, *, encoder: nn.Module, connector: nn.Module, llm: nn.Module) -> None:
        super().__init__()
        self.encoder, self.connector, self.llm = encoder, connector, llm
        if connector.fusion == "layers":
            self.connector.attach(self.llm.layers())
        self.check_parts()

    def blocks(self, part: str) -> list[nn.Module]:
        if part == "encoder":
            return list(self.encoder.blocks())
        return list(self.llm.layers()) if part == "llm" else []

    def forward(self, batch: Batch) -> Float[Tensor, "m v"]:
        visual = self.connector(self.encoder(batch.pixels))  # N K D
        embeds = self.llm.embed(batch.input_ids)  # B T D
        if self.connector.fusion == "tokens":
            embeds = place(visual, embeds, batch)  # B T D
            return self.llm(embeds, batch.llm_mask, batch.positions, batch.keep)  # M V
        with self.connector.looking_at(visual, batch):
            return self.llm(embeds, batch.llm_mask, batch.positions, batch.keep)  # M V

    def without_images(self, batch: Batch) -> Float[Tensor, "m v"]:
        """Logits of the bare LLM, for rows of text alone."""
        return self.llm(self.llm.embed(batch.input_ids), batch.llm_mask, batch.positions, batch.keep)  # M V

    def text_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that answer text alone."""
        return self.llm.parameters()

    def without_adapter(self) -> AbstractContextManager[None]:
        """Within it text is answered as before an adapter was added."""
        return self.llm.without_adapter()

    @torch.no_grad()
    def diagnostics(self, batch: Batch) -> dict[str, float]:
        """Root mean square of the visual tokens and of the LLM's embeddings.

        Visual tokens that are far louder or softer than words are learned slowly.
        """
        visual = self.connector(self.encoder(batch.pixels))  # N K D
        if len(visual) == 0:
            return {}
        rms = visual.float().square().mean().sqrt()
        return {"visual_rms": float(rms), "embed_rms": self.llm.embed_rms}

    @torch.no_grad()
    def generate(self, batch: Batch, *, stop_ids: list[int], **options: Any) -> Int[Tensor, "b s"]:
        """Ids of the answers to a batch of left-padded prompts."""
        visual = self.connector(self.encoder(batch.pixels))  # N K D
        embeds = self.llm.embed(batch.input_ids)  # B T D
        if self.connector.fusion == "tokens":
            embeds = place(visual, embeds, batch)  # B T D
            return self.llm.generate(embeds, batch.attention_mask, stop_ids=stop_ids, **options)  # B S
        with self.connector.looking_at(visual, batch):
            return self.llm.generate(embeds, batch.attention_mask, stop_ids=stop_ids, **options)  # B S


def place(visual: Float[Tensor, "n k d"], embeds: Float[Tensor, "b t d"], batch: Batch) -> Float[Tensor, "b t d"]:
    """The embeddings with the visual tokens, in order, where the placeholders are.

    Raises ValueError if there are not as many placeholders as visual tokens.
    """
    placeholders, tokens = int(batch.image_mask.sum()), visual.shape[0] * visual.shape[1]
    if placeholders != tokens:
        raise ValueError(
            f"the batch has {placeholders} image placeholders but {visual.shape[0]} images of {visual.shape[1]} visual "
            f"tokens = {tokens}; tell the data the connector's num_tokens (samples {', '.join(batch.ids[:4])})"
        )
    return embeds.masked_scatter(batch.image_mask[..., None], visual.to(embeds.dtype))
