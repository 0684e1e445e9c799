"""BERT's tokenizer, which the Q-Former's text path reads (Devlin et al., arXiv 1810.04805)."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from transformers import AutoTokenizer

from vlm.connectors.qformer_weights import TEXT_VOCABULARY
from vlm.hub import download_checkpoint, local_checkpoint

MAX_INSTRUCTION = 128  # tokens, as InstructBLIP


def load_tokenizer(pretrained: str, package: str | None, *, option: str) -> Any:
    """The tokenizer with [DEC], the first token of a text to predict, as its bos token.

    Raises ValueError, which names `option`, if it is not found or is not BERT's.
    """
    folder = local_checkpoint(pretrained, package) or download_checkpoint(pretrained, package, option=option)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "eos_token": tokenizer.sep_token})
    if len(tokenizer) != TEXT_VOCABULARY:
        raise ValueError(
            f"the tokenizer of {option}={pretrained} has {len(tokenizer):,} tokens, but "
            f"{TEXT_VOCABULARY:,} are needed; set {option} to a BERT (uncased)"
        )
    return tokenizer


class Instructions:
    """Token ids of an instruction between [CLS] and [SEP]; of a long one the end is kept, as in InstructBLIP.

    The tokenizer is loaded at the first call, so that sizes can be planned without it.
    """

    def __init__(self, pretrained: str, package: str | None) -> None:
        self.pretrained, self.package = pretrained, package

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.pretrained, self.package, option="connector.tokenizer")

    def __call__(self, text: str) -> list[int]:
        ids = self.tokenizer(text.strip(), add_special_tokens=False).input_ids[2 - MAX_INSTRUCTION :]
        return [self.tokenizer.cls_token_id, *ids, self.tokenizer.sep_token_id]
