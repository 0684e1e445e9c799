"""The tokenizer for rendered conversations: the LLM's vocabulary and two private tokens."""

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

# A private token, like IMAGE_PLACEHOLDER. It splits a text where no token may cross; rows never contain it.
BREAK = "<|vlm:break|>"


def breaker(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str]:
    """A function that puts BREAK into the name of each special token in a text.

    The name is then tokenized as plain characters. Only the template may write special tokens: an "<|im_end|>" in a
    question would end the turn.
    """
    rests: dict[str, list[str]] = defaultdict(list)  # by first letter
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and len(token.content) > 1:
            rests[token.content[0]].append(re.escape(token.content[1:]))
    if not rests:
        return str
    # Only the first letter is matched, so all of several overlapping names are broken.
    parts = [f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items()]
    # A function as replacement: with a string, `sub` would hash the whole pattern at every call.
    return partial(re.compile("|".join(parts)).sub, lambda first: first[0] + BREAK)


def private_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A tokenizer with the two private tokens.

    It shares the vocabulary with `tokenizer`, which takes 20 ms; a deep copy of Gemma's tokenizer takes 5 s. The
    post-processor is not copied, because it adds special tokens, which the template writes, and may change offsets.
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
    if moved:  # the ids have gaps, which adding the tokens again does not reproduce
        private = Tokenizer.from_str(shared.to_str())
        private.no_truncation()
        private.no_padding()
    private.add_tokens([AddedToken(name, special=True, normalized=False) for name in (IMAGE_PLACEHOLDER, BREAK)])
    return private


def splits_cleanly(private: Tokenizer) -> bool:
    """Whether BREAK splits a text and changes nothing else. Llama 2's tokenizer, for example, adds a space after it."""
    tokens = private.encode(f"x{BREAK}x", add_special_tokens=False).tokens
    return not tokens[tokens.index(BREAK) + 1].startswith(("▁", "Ġ"))


def opens_with_space(private: Tokenizer) -> bool:
    """Whether "x" and " x" are the same tokens, because the tokenizer puts a space before a text without one."""
    once, twice = (private.encode(text, add_special_tokens=False).ids for text in ("x", " x"))
    return once == twice
