"""A KV cache in buffers with free positions at their end, so that a new token does not copy all tokens before it.

Axes: B rows, G key heads, S tokens of a layer, T new tokens, C positions of a buffer, E width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

NUM_FREE = 64  # positions of a new buffer after its tokens


class BufferedCache(DynamicCache):
    """Transformers' DynamicCache whose layers of full and of sliding attention have buffers."""

    def __init__(self, *, config: PretrainedConfig) -> None:
        super().__init__(config=config)
        self.layers = [_buffered(layer) for layer in self.layers]


class Buffer:
    """Keys or values of a layer, which are a part of `tensor` [B,G,C,E] unless the cache was changed otherwise."""

    tensor = torch.empty(0)

    def append(self, kept: Tensor | None, new: Float[Tensor, "b g t e"]) -> Float[Tensor, "b g s e"]:
        """`kept` and `new` after it; before the first tokens, `kept` has no elements."""
        if kept is None or not kept.numel():
            kept = new[:, :, :0]
        start, middle, num = kept.storage_offset() // kept.shape[3], kept.shape[2], kept.shape[2] + new.shape[2]
        is_part = kept.untyped_storage().data_ptr() == self.tensor.untyped_storage().data_ptr()
        if not is_part or start + num > self.tensor.shape[2]:
            start, self.tensor = 0, new.new_empty(*new.shape[:2], num + NUM_FREE, new.shape[3])  # B G C E
            self.tensor[:, :, :middle] = kept
        kept_and_new = self.tensor[:, :, start : start + num]  # B G S E
        kept_and_new[:, :, middle:] = new
        return kept_and_new


class BufferedLayer(DynamicLayer):
    """Keys and values of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers = Buffer(), Buffer()

    def update(
        self, key_states: Float[Tensor, "b g t e"], value_states: Float[Tensor, "b g t e"], *args: Any, **options: Any
    ) -> tuple[Float[Tensor, "b g s e"], Float[Tensor, "b g s e"]]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self.buffers[0].append(self.keys, key_states)
        self.values = self.buffers[1].append(self.values, value_states)
        return self.keys, self.values


class BufferedSlidingLayer(DynamicSlidingWindowLayer):
    """Keys and values of the last `sliding_window` - 1 tokens; `update` returns those and all new ones."""

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self.buffers = Buffer(), Buffer()

    def update(
        self, key_states: Float[Tensor, "b g t e"], value_states: Float[Tensor, "b g t e"], *args: Any, **options: Any
    ) -> tuple[Float[Tensor, "b g s e"], Float[Tensor, "b g s e"]]:
        if self.record_past:  # assisted decoding, which removes tokens again
            return super().update(key_states, value_states, *args, **options)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[2]
        keys = self.buffers[0].append(self.keys, key_states)
        values = self.buffers[1].append(self.values, value_states)
        self.keys, self.values = (each[:, :, -self.sliding_window + 1 :] for each in (keys, values))
        return keys, values


def _buffered(layer: Any) -> Any:
    if type(layer) is DynamicLayer:
        return BufferedLayer()
    return BufferedSlidingLayer(layer.sliding_window) if type(layer) is DynamicSlidingWindowLayer else layer
