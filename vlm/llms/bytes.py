"""A byte-level tokenizer that needs no files: one token per byte."""

from __future__ import annotations

from collections.abc import Collection

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>")
# Special tokens in the chat templates of other LLMs, used with random weights. Their ids follow those of the bytes.
TEMPLATE_TOKENS = (
    *("<start_of_turn>", "<end_of_turn>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("[INST]", "[/INST]"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "<|endofchunk|>",
)


def byte_tokenizer(*, without: Collection[str] = ()) -> PreTrainedTokenizerFast:
    """Special tokens, 256 byte tokens, template tokens; reversible on any text, with character offsets.

    It lacks the template tokens that `without` names, such as those that are added to an LLM.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    of_templates = [token for token in TEMPLATE_TOKENS if token not in without]
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *alphabet, *of_templates))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=[*SPECIAL[3:], *of_templates],
    )
