"""Masked words of texts, predicted with their image and with another one."""

from __future__ import annotations

import zlib
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from vlm.evaluation.base import Context, Evaluator
from vlm.evaluation.intervals import wilson
from vlm.evaluation.visual_gain import swapped
from vlm.models.base import FusesPairs
from vlm.ranges import Length, Name
from vlm.schema import Batch, LossOutput


class MaskedWords(Evaluator):
    """`val/masked_words/accuracy`: how often a masked word is predicted from the rest of its text and its image.

    `…_shuffled` is with the image of another sample: what the rest of the text gives away. `…_low` and `…_high` are
    Wilson's 95 % interval of the first, and `val/masked_words/num` is the number of words: one in each text, the same
    at every validation. Texts without such a word are left out, and images that cannot be swapped.

    Args:
        words: the words that are masked, each a single token; None: any token.
    """

    at: Literal["validation", "end"] = "validation"
    needs: ClassVar[tuple[type, ...]] = (FusesPairs,)

    def __init__(self, *, words: Annotated[list[Name], Length(1)] | None = None) -> None:
        self.words = words

    def before_training(self, context: Context) -> None:
        self._candidates(context.model.tokenizer)

    def start(self) -> None:
        self._right, self._right_shuffled, self._num = 0, 0, 0

    def update(self, context: Context, batch: Batch, output: LossOutput) -> None:
        model, ids = context.model, batch.input_ids
        exchanged, rows = swapped(batch)
        where = self._one_word_each(batch, model.tokenizer)  # B T
        where &= torch.tensor([[row in rows] for row in range(len(where))], device=where.device)  # B T
        masked = torch.where(where, model.tokenizer.mask_token_id, ids)  # B T
        found = []
        for shown in (batch, exchanged):
            features = model.masked_features(shown.pixel_values, None)  # B P Dv
            states = model.fuse(features, masked, batch.attention_mask).words[where]  # M W
            found.append(int((model.predict_words(states).argmax(1) == ids[where]).sum()))
        self._right += found[0]
        self._right_shuffled += found[1]
        self._num += int(where.sum())

    def finish(self, context: Context) -> dict[str, float]:
        right, shuffled, num = context.sum_over_ranks([self._right, self._right_shuffled, self._num])
        if not num:
            return {}
        low, high = wilson(right / num, int(num))
        name = "val/masked_words/accuracy"
        found = {name: right / num, f"{name}_low": low, f"{name}_high": high, f"{name}_shuffled": shuffled / num}
        return {**found, "val/masked_words/num": num}

    def _one_word_each(self, batch: Batch, tokenizer: Any) -> Tensor:
        """Where a word is masked [B,T]."""
        candidates = self._candidates(tokenizer)
        where = torch.zeros_like(batch.attention_mask)  # B T
        for row, (name, ids, mask) in enumerate(zip(batch.ids, batch.input_ids, batch.attention_mask, strict=True)):
            known = [place for place, token in enumerate(ids[mask].tolist()) if token in candidates]
            if known:
                where[row, known[zlib.crc32(name.encode("utf-8", "surrogatepass")) % len(known)]] = True
        return where

    def _candidates(self, tokenizer: Any) -> set[int]:
        """The ids of the words. Raises ValueError for a word of several tokens."""
        if self.words is None:
            return {*range(len(tokenizer))} - {*tokenizer.all_special_ids}
        found = set()
        for word in self.words:
            ids = tokenizer(word, add_special_tokens=False).input_ids
            if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
                raise ValueError(
                    f"evaluators.masked_words.words has {word!r}, which is "
                    f"{', '.join(tokenizer.convert_ids_to_tokens(ids))} to the tokenizer and must be one known token; "
                    "remove it"
                )
            found.add(ids[0])
        return found
