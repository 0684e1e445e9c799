"""Encoder-decoder language models of Transformers, used as in BLIP-2 (Li et al., arXiv 2301.12597): the encoder reads
the image and the question, the decoder generates the answer.

Axes: B rows, T tokens per row, D width, V vocabulary, M number of positions in `logits_mask`, S tokens of the longest
answer.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSeq2SeqLM

from vlm.llms.base import LanguageModel


class Seq2SeqLM(LanguageModel):
    """An encoder-decoder LLM with relative positions (T5).

        embeds [B,T,D] ─┬─ up to the first position of `logits_mask` ─────► encoder
                        └─ at its other positions, after a start token ──► decoder ──► logits [M,V]

    `logits_mask` is True where the next token is supervised. So all its positions but the first of a row are answer
    tokens, the decoder's input. Encoder and decoder share their embeddings, and a row has one answer.
    """

    auto_class: ClassVar[Any] = AutoModelForSeq2SeqLM
    fusions: ClassVar[tuple[str, ...]] = ("tokens",)
    max_answers: ClassVar[int | None] = 1

    def layers(self) -> list[nn.Module]:
        return [*self.model.get_encoder().block, *self.model.get_decoder().block]

    def forward(
        self,
        embeds: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "b t"],
        position_ids: Int[Tensor, "b t"],
        logits_mask: Bool[Tensor, "b t"],
    ) -> Float[Tensor, "m v"]:
        """Logits at the positions of `logits_mask`, row by row; `position_ids` and tokens after the answer are ignored.

        Raises ValueError if a row has several answers.
        """
        after = F.pad(logits_mask, (1, -1))  # B T, True one position later
        answers = int((logits_mask & ~after).sum(1).max())
        if answers > 1:
            raise ValueError(
                f"a row has {answers} answers, but an encoder-decoder llm takes 1; "
                "choose data with one answer per sample (of shapes, data.num_questions=1)"
            )
        prompt = mask & (after.cumsum(1) == 0)  # B T
        lengths = logits_mask.sum(1, keepdim=True)  # B 1
        answer = torch.arange(int(lengths.max()), device=lengths.device) < lengths  # B S
        decoder_embeds = embeds.new_zeros(*answer.shape, embeds.shape[2])  # B S D
        decoder_embeds = decoder_embeds.masked_scatter(answer[..., None], embeds[logits_mask])  # B S D
        decoder_embeds = torch.cat([self._start_embeds(len(embeds)), decoder_embeds[:, 1:]], dim=1)  # B S D
        with self.select_logits(answer), self.recomputing(torch.is_grad_enabled()):
            return self.model(
                inputs_embeds=embeds, attention_mask=prompt, decoder_inputs_embeds=decoder_embeds, use_cache=False
            ).logits  # M V

    def check_packing(self) -> None:
        """Raise ValueError: packing is not supported."""
        raise ValueError("an encoder-decoder llm takes one sample per row; set data.packing=false")

    def generate(self, embeds: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"], **options: Any) -> Int[Tensor, "b s"]:
        return super().generate(embeds, mask, **options)[:, 1:]  # B S, without the start token

    def _start_embeds(self, rows: int) -> Float[Tensor, "b 1 d"]:
        """The embedding of the decoder's start token."""
        table = self.model.get_input_embeddings()
        start = torch.full((rows, 1), self.model.config.decoder_start_token_id, device=table.weight.device)
        return table(start)  # B 1 D
