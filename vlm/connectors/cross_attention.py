"""Gated cross-attention inside the LLM: Flamingo's connector (Alayrac et al., arXiv 2204.14198).

Axes: N images, P patches per image, Dv encoder width, K visual tokens per image, D LLM width, B rows, T tokens per row,
I largest number of images in a row, H heads, W head_dim, L queries of a row (tokens of all its beams).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.module_tracker import ModuleTracker

from vlm.connectors.resampler import Resampler
from vlm.ranges import Depth, Heads, Range, Width
from vlm.schema import Batch

CONTEXT = "_visual_context"  # attribute of a layer's input
# Adam changes a parameter by about the learning rate per step. At the learning rate of the projections a gate would
# stay near zero for thousands of steps, so the gates are scaled.
GATE_SCALE = 30.0
POSITION_SCALE = 0.5  # of the learned vector per visual token at the start, relative to `output_rms`
SQUARED_RELU_SECOND_MOMENT = 1.5  # E[relu(z)⁴] for z ~ N(0, 1): half of E[z⁴] = 3


class AttendedLayers(nn.Module):
    """A connector whose gated blocks run before layers of the LLM and attend to the visual tokens.

    Forward pre-hooks run the blocks. The LLM's modules and names do not change; the blocks belong to this module.
    Outside `attending_to` they do nothing. A token attends to the last image before it, or with `all_previous_images`
    to all of them.

    Attributes:
        every: distance between the layers that have a block.
        blocks: filled by `attach`.
        make_block: makes one; a block has `project` and `forward` as `GatedBlock`, and an `attention_gate`.
    """

    fusion: ClassVar[str] = "layers"

    every: int
    all_previous_images: bool
    blocks: nn.ModuleList
    make_block: Callable[[], Any]
    _context: VisualContext | None = None

    def attended(self, layers: Sequence[nn.Module]) -> Sequence[nn.Module]:
        """The layers that have a block before them."""
        return layers[:: self.every]

    def normed(self, visual: Float[Tensor, "n k e"]) -> Float[Tensor, "n k e"]:
        """The visual tokens as the blocks take them."""
        return visual

    def attach(self, layers: Sequence[nn.Module]) -> None:
        """Create the blocks and hook them before layers of the LLM."""
        if self.every > len(layers):
            raise ValueError(
                f"connector.every={self.every} but the LLM has {len(layers)} layers; "
                f"set connector.every= to {len(layers)} or less"
            )
        for layer in self.attended(layers):
            with next(self.parameters()).device:  # may be the meta device
                block = self.make_block()
            self.blocks.append(block)
            layer.register_forward_pre_hook(partial(self._pre_hook, block))

    @contextmanager
    def attending_to(self, visual: Float[Tensor, "n k e"], batch: Batch) -> Iterator[None]:
        """Context in which the LLM attends to the images of `batch`, also while it generates."""
        self._context = VisualContext.of(self.normed(visual), batch, all_previous_images=self.all_previous_images)
        try:
            yield
        finally:
            self._context = None

    def _pre_hook(self, block: Any, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The input of a layer after its block; None leaves it unchanged."""
        hidden = args[0]  # R T D
        # A layer that is checkpointed with its hooks runs again in the backward pass, after `attending_to` has ended.
        # Its input is the same tensor then, so the context is stored on it.
        stored = getattr(hidden, CONTEXT, None) if ModuleTracker().is_bw else None
        context: VisualContext | None = self._context or stored
        if context is None:
            return None
        if torch.is_grad_enabled():
            setattr(hidden, CONTEXT, context)
        elif context.differentiable:
            raise ValueError(
                "a layer checkpointed with use_reentrant=True loses the gradient of the visual tokens; "
                "set use_reentrant=False"
            )
        # All beams of a row have the same keys, so they are joined to the queries of one row. The hidden states of a
        # bfloat16 LLM are cast for the block and back, which changes no value while the gates are zero.
        queries = hidden.to(block.attention_gate.dtype).reshape(len(context.visual), -1, hidden.shape[2])  # B L D
        added = block(queries, *context.keys_and_values(block), context.visible(*hidden.shape[:2]))  # B L D
        return (added.reshape(hidden.shape).to(hidden.dtype), *args[1:])


class CrossAttention(AttendedLayers):
    """features [N,P,Dv] -> visual [N,K,D], to which gated blocks before the LLM's layers attend.

        features ── resampler ──► visual ──────┬───────────────────────────┐
                                               ▼                           ▼
        embeds ───────────────────────────► block ──► layers 0, 1, … ──► block ──► layers `every`, … ──► logits

    A block runs before every n-th layer, from the first. The gates start at zero, so the LLM's output is unchanged at
    the start. A token without an image before it is not changed, as in Llama 3.2, so the LLM's output for text alone
    stays the same. A learned vector per visual token gives its position, because attention ignores the order.

    Parameters: the resampler's, K·D for the learned vectors, and for each block 4·D·H·W for attention, 2·ff_mult·D² for
    the feed-forward layer, 4·D for the norms and 2·D for the gates.

    Args:
        vision_width, llm_width, grid, output_rms: of the encoder and the LLM; the builder passes them.
        every: distance between blocks, in layers of the LLM.
        all_previous_images: a token attends to all images before it, not only to the last.
        num_queries, depth: visual tokens per image and number of blocks of the resampler.
        num_heads, head_dim, ff_mult: of attention and feed-forward in all blocks, also in the resampler's.
    """

    def __init__(
        self,
        *,
        vision_width: int,
        llm_width: int,
        grid: tuple[int, int],
        output_rms: float,
        every: Depth = 2,
        all_previous_images: bool = False,
        num_queries: Width = 64,
        depth: Depth = 2,
        num_heads: Heads = 8,
        head_dim: Width = 64,
        ff_mult: Annotated[int, Range(1, 64)] = 4,
    ) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"connector.every={every} must be at least 1")
        self.resampler = Resampler(
            vision_width=vision_width,
            llm_width=llm_width,
            grid=grid,
            output_rms=output_rms,
            num_queries=num_queries,
            depth=depth,
            num_heads=num_heads,
            head_dim=head_dim,
            ff_mult=ff_mult,
        )
        self.places = nn.Parameter(POSITION_SCALE * output_rms * torch.randn(num_queries, llm_width))
        self.num_tokens = num_queries
        self.every, self.all_previous_images = every, all_previous_images
        self.blocks = nn.ModuleList()  # filled by `attach`
        self.make_block = partial(
            GatedBlock,
            width=llm_width,
            num_heads=num_heads,
            head_dim=head_dim,
            ff_mult=ff_mult,
            output_rms=output_rms,
        )

    def forward(self, features: Float[Tensor, "n p dv"]) -> Float[Tensor, "n k d"]:
        return self.resampler(features) + self.places  # N K D

    def normed(self, visual: Float[Tensor, "n k d"]) -> Float[Tensor, "n k d"]:
        """Visual tokens have the scale of embeddings; the blocks are initialized for inputs of scale 1."""
        return F.layer_norm(visual, visual.shape[2:])  # N K D


@dataclass(frozen=True)
class VisualContext:
    """The visual tokens of each row of a batch, and which tokens may attend to them."""

    visual: Float[Tensor, "b s d"]  # S = I·K, the images of a row in order; zeros if it has fewer than I
    image: Int[Tensor, " s"]  # index in its row, from 1, of the image of each visual token
    images_before: Int[Tensor, "b t"]
    images_hidden: Int[Tensor, "b t"]
    num_images: Int[Tensor, "b 1"]
    all_previous_images: bool
    differentiable: bool  # gradients were enabled in `attending_to`
    cache: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, visual: Float[Tensor, "n k d"], batch: Batch, *, all_previous_images: bool) -> VisualContext:
        """Raises ValueError if the batch does not count N images."""
        num_images = int(batch.num_images.sum())
        if num_images != len(visual):
            raise ValueError(
                f"the batch counts {num_images} images but has the visual tokens of {len(visual)}; "
                f"make num_images match pixel_values (samples {', '.join(batch.ids[:4])})"
            )
        # Rows without an image get one empty slot, because a softmax over nothing is NaN.
        slots = torch.arange(1, max(1, int(batch.num_images.max())) + 1, device=visual.device)  # I
        filled = slots <= batch.num_images[:, None]  # B I
        empty = visual.new_zeros(*filled.shape, *visual.shape[1:])  # B I K D
        return cls(
            visual=empty.index_put((filled,), visual).flatten(1, 2),
            image=slots.repeat_interleave(visual.shape[1]),
            images_before=batch.images_before,
            images_hidden=batch.images_hidden,
            num_images=batch.num_images[:, None],
            all_previous_images=all_previous_images,
            differentiable=torch.is_grad_enabled(),
        )

    def visible(self, rows: int, length: int) -> Bool[Tensor, "b l s"]:
        """Which visual tokens each query may attend to, if the LLM computes `rows` rows of `length` tokens.

        Tokens beyond those of the batch are generated and come after all images of their row; with a KV cache the LLM
        computes only them. The beams of a row are adjacent.
        """
        num_rows, num_tokens = self.images_before.shape
        known = num_tokens if length >= num_tokens else 0
        new = self.num_images.expand(-1, length - known)

        def of_queries(known_part: Tensor, new_part: Tensor) -> Tensor:
            both = torch.cat([known_part[:, :known], new_part], dim=1)  # B length
            return both.repeat(1, rows // num_rows)[:, :, None]  # B L 1

        before = of_queries(self.images_before, new)
        hidden = of_queries(self.images_hidden, torch.zeros_like(new))
        visible = self.image <= before if self.all_previous_images else self.image == before  # B L S
        return visible & (self.image > hidden)

    def keys_and_values(self, block: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of the block, cached without gradients: they cost more than the rest of a generated token."""
        if torch.is_grad_enabled():
            return block.project(self.visual)
        if block not in self.cache:
            self.cache[block] = block.project(self.visual)
        return self.cache[block]


class AttendingBlock(nn.Module):
    """What the blocks have in common: attention from the LLM's hidden states to the visual tokens."""

    num_heads: int
    attention_norm: nn.Module
    q: nn.Module
    k: nn.Module
    v: nn.Module

    def project(self, visual: Float[Tensor, "b s d"]) -> tuple[Float[Tensor, "b h s w"], Float[Tensor, "b h s w"]]:
        """Keys and values of the visual tokens."""
        return split_heads(self.k(visual), self.num_heads), split_heads(self.v(visual), self.num_heads)

    def attended(
        self,
        hidden: Float[Tensor, "b l d"],
        keys: Float[Tensor, "b h s w"],
        values: Float[Tensor, "b h s w"],
        visible: Bool[Tensor, "b l s"],
    ) -> Float[Tensor, "b l e"]:
        queries = split_heads(self.q(self.attention_norm(hidden)), self.num_heads)  # B H L W
        return attend(queries, keys, values, visible)  # B L H·W


class GatedBlock(AttendingBlock):
    """Attention to the visual tokens, then a feed-forward layer, each added through tanh gates that start at zero.

    While a gate is zero, only the gate gets a gradient. There is one gate per channel, as in Idefics: the gated output
    has a random direction at the start, which Flamingo's single gate cannot change. The output of an open gate starts
    at `output_rms`, the scale of the LLM's embeddings.
    """

    def __init__(self, *, width: int, num_heads: int, head_dim: int, ff_mult: int, output_rms: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * head_dim
        self.attention_norm = nn.LayerNorm(width)
        self.q = _linear(width, inner)
        self.k = _linear(width, inner)
        self.v = _linear(width, inner)
        self.out = _linear(inner, width, gain=output_rms)
        self.attention_gate = nn.Parameter(torch.zeros(width))
        self.ff_norm = nn.LayerNorm(width)
        self.ff_in = _linear(width, ff_mult * width)
        self.ff_out = _linear(ff_mult * width, width, gain=output_rms / math.sqrt(SQUARED_RELU_SECOND_MOMENT))
        self.ff_gate = nn.Parameter(torch.zeros(width))

    def forward(
        self,
        hidden: Float[Tensor, "b l d"],
        keys: Float[Tensor, "b h s w"],
        values: Float[Tensor, "b h s w"],
        visible: Bool[Tensor, "b l s"],
    ) -> Float[Tensor, "b l d"]:
        has_image = visible.any(2, keepdim=True)  # B L 1
        attended = self.attended(hidden, keys, values, visible)  # B L H·W
        hidden = hidden + (GATE_SCALE * self.attention_gate).tanh() * self.out(attended)  # B L D
        inner = F.relu(self.ff_in(self.ff_norm(hidden))).square() * has_image  # B L ff_mult·D
        return hidden + (GATE_SCALE * self.ff_gate).tanh() * self.ff_out(inner)  # B L D


def split_heads(x: Float[Tensor, "b t e"], num_heads: int) -> Float[Tensor, "b h t w"]:
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


def attend(
    queries: Float[Tensor, "b h l w"],
    keys: Float[Tensor, "b h s w"],
    values: Float[Tensor, "b h s w"],
    visible: Bool[Tensor, "b l s"],
) -> Float[Tensor, "b l e"]:
    """What each query gets of the visual tokens that it may attend to, all heads in one vector; 0 if it has none."""
    has_image = visible.any(2, keepdim=True)  # B L 1
    # Queries without an image attend to everything, for a finite gradient; then their output is set to 0.
    mask = (visible | ~has_image)[:, None]  # B 1 L S
    attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)  # B H L W
    return attended.transpose(1, 2).flatten(2) * has_image  # B L H·W


def _linear(fan_in: int, fan_out: int, *, gain: float = 1.0) -> nn.Linear:
    """A linear layer without bias that multiplies the root mean square by `gain` (He et al., arXiv 1502.01852)."""
    layer = nn.Linear(fan_in, fan_out, bias=False)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(fan_in))
    return layer
