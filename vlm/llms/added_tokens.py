"""Tokens beside the vocabulary of a pretrained LLM, such as Flamingo's end of a chunk: new rows that are trained alone.

Axes: A added tokens, D width, V rows of the LLM's own tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.nn import functional as F


class AddedTokens(nn.Module):
    """Embeddings and output rows of A tokens, which get the ids after those of the tokenizer.

    Hooks on the LLM's embedding and output layer use them, so its tables, names and vocabulary stay as they are: these
    give the ids of the added tokens their own embeddings, and put the logits of these tokens at their ids. The added
    embeddings start at random, the output rows as the mean of the LLM's, so that a new token starts as likely as others
    (Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021).

    Parameters: 2·A·D.

    Args:
        names: of the tokens.
        model: a model of Transformers.
        embed_rms: root mean square of its embeddings.
    """

    def __init__(self, names: Sequence[str], *, model: Any, embed_rms: float) -> None:
        super().__init__()
        self.names = tuple(names)
        self.first_id = 0  # set by `add_to`
        embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
        with embedding.weight.device:
            self.input = nn.Parameter(embed_rms * torch.randn(len(names), embedding.weight.shape[1]))
            self.output = nn.Parameter(output.weight.detach().mean(0, dtype=torch.float32).repeat(len(names), 1))
        embedding.register_forward_pre_hook(self._known_ids)
        embedding.register_forward_hook(self._with_own_rows)
        output.register_forward_hook(self._with_own_logits)

    def add_to(self, tokenizer: Any) -> Any:
        """The tokenizer, which knows the tokens from now on. Raises ValueError if it knows one of them already."""
        vocabulary = tokenizer.get_vocab()
        if known := [name for name in self.names if name in vocabulary]:
            raise ValueError(f"llm.added_tokens has {known[0]!r}, which the llm's tokenizer has already; leave it out")
        tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in self.names])
        self.first_id = tokenizer.convert_tokens_to_ids(self.names[0])
        return tokenizer

    @property
    def end_id(self) -> int:
        """The id after the last one."""
        return self.first_id + len(self.names)

    @contextmanager
    def counted(self, config: Any) -> Iterator[None]:
        """Context in which the vocabulary of a config of Transformers, which `generate` reads, has the added tokens."""
        config = config.get_text_config()
        own = config.vocab_size
        config.vocab_size = max(own, self.end_id)
        try:
            yield
        finally:
            config.vocab_size = own

    def _known_ids(self, embedding: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The ids for the LLM's own table, which has no row for larger ones."""
        self._ids = args[0]
        return (self._ids.clamp(max=embedding.weight.shape[0] - 1), *args[1:])  # type: ignore[index]

    def _with_own_rows(self, _: nn.Module, __: Any, embeds: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        numbers = self._ids - self.first_id
        is_added = (numbers >= 0) & (numbers < len(self.names))
        own = self.input[numbers.clamp(0, len(self.names) - 1)].to(embeds.dtype)
        return torch.where(is_added[..., None], own, embeds)

    def _with_own_logits(self, _: nn.Module, args: tuple[Any, ...], logits: Float[Tensor, "*b v"]) -> Tensor:
        own = F.linear(args[0], self.output.to(args[0].dtype)).to(logits.dtype)  # *b A
        before, after = logits[..., : self.first_id], logits[..., self.end_id :]
        if (missing := self.first_id - before.shape[-1]) > 0:  # a tokenizer may have more tokens than the LLM has rows
            before = F.pad(before, (0, missing), value=-torch.inf)
        return torch.cat([before, own, after], dim=-1)
