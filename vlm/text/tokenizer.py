"""The tokenizer that reads a rendered conversation: the LLM's own vocabulary and two private tokens."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer

from vlm.text.templates import IMAGE_PLACEHOLDER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private, as IMAGE_PLACEHOLDER is. It splits the name of a special token that somebody typed; rows never contain it.
BREAK = "<|vlm:break|>"


def disarmer(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str]:
    """A function that puts BREAK into each special token's name in a text, so that it is tokenized as plain characters.

    Only the template may write special tokens: an "<|im_end|>" in a question would end the turn.
    """
    rests: dict[str, list[str]] = defaultdict(list)  # by first letter
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and len(token.content) > 1:
            rests[token.content[0]].append(re.escape(token.content[1:]))
    if not rests:
        return str
    # The first letter only is matched, so that names that overlap are all broken.
    parts = [f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items()]
    # A function as replacement: with a string, `sub` would hash the whole pattern at every call.
    return partial(re.compile("|".join(parts)).sub, lambda first: first[0] + BREAK)


def private_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A private tokenizer with two more tokens, on the shared vocabulary: a deep copy of Gemma's takes 5 s, this 20 ms.

    The post-processor is not copied: it adds special tokens, which the template writes, and some exclude spaces from
    offsets.
    """
    shared = tokenizer.backend_tokenizer
    private = Tokenizer(shared.model)
    if shared.normalizer is not None:
        private.normalizer = shared.normalizer
    if shared.pre_tokenizer is not None:
        private.pre_tokenizer = shared.pre_tokenizer
    added = shared.get_added_tokens_decoder()
    private.add_tokens([added[index] for index in sorted(added)])
    moved = [token.content for index, token in added.items() if private.token_to_id(token.content) != index]
    if moved:  # adding tokens again cannot reproduce gaps among their ids
        private = Tokenizer.from_str(shared.to_str())
        private.no_truncation()
        private.no_padding()
    private.add_tokens([AddedToken(name, special=True, normalized=False) for name in (IMAGE_PLACEHOLDER, BREAK)])
    return private


def splits_cleanly(private: Tokenizer) -> bool:
    """Whether a BREAK splits a text and changes nothing else: Llama 2's and others put a space after such a token."""
    tokens = private.encode(f"x{BREAK}x", add_special_tokens=False).tokens
    return not tokens[tokens.index(BREAK) + 1].startswith(("▁", "Ġ"))


def opens_with_space(private: Tokenizer) -> bool:
    """Whether a space is put before a text unless it begins with one, so that "x" and " x" are the same tokens."""
    once, twice = (private.encode(text, add_special_tokens=False).ids for text in ("x", " x"))
    return once == twice
