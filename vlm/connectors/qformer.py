"""Learned queries that read the picture: BLIP-2's Querying Transformer (Li et al., arXiv 2301.12597).

Axes: N images, P patches per image, Dv encoder width, K queries = visual tokens, D LLM width; W width of the Q-Former,
T tokens of a text, S the queries and the text, of which either may be absent.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vlm.connectors.qformer_weights import TEXT_VOCABULARY, start_from_bert, start_from_blip2
from vlm.ranges import Depth, Heads, Name, Width

MAX_TEXT = 512  # positions of BERT
LOOK_STD = 0.3  # of the logits of cross-attention at the start, about BERT's: sharper random looks learn slower
LOOK_LOCAL = 2.5  # of a query's own patch, over a key of its length: most of its weight is then there
NORM_EPS = 1e-12  # BERT's
FEATURE_NORM_EPS = 1e-6  # of the last norm of BLIP-2's encoders


class QFormer(nn.Module):
    """features [N,P,Dv] -> visual [N,K,D]: queries attend to each other and, in some blocks, to the features.

        queries [K,W] ──► norm ──► block ──► … ──► block ──► project ──► visual
                                     ▲
        features ──► feature_norm

        block: states = norm(states + attention(states)); queries = norm(queries + cross(queries, features)), where it
               has one; states = norm(states + feed(states)), with one feed for the queries and another for the text

    The text path, of BLIP-2's first stage, is built with `text`: `hidden_states` then takes pictures, texts or both.
    The last matrix wants a far higher learning rate than the transformer before it, as conf/connector/qformer.yaml has:
    what the LLM can read changes only as fast as that matrix does, and what twelve layers tell changes far too fast.

    With `norm` and `position` off it is Transformers' Blip2QFormerModel and the projection after it.

    Parameters with L blocks, C of them with cross-attention: L·(12·W² + 13·W) + C·(2·W² + 2·Dv·W + 6·W) + K·W + 2·W
    + W·D + D, and 2·Dv for `norm`, P·Dv for `position`, L·(8·W² + 7·W) + (30,523 + 512)·W for `text`.

    Args:
        vision_width, llm_width, grid, output_rms: of the encoder and the LLM; the builder passes them.
        num_queries: K, the visual tokens of an image.
        depth, width, num_heads: of the transformer; the feed-forward layers are four times as wide.
        cross_attention_every: every how many blocks, from the first, the queries attend to the features.
        norm: layer norm on the features first: BLIP-2's own, as our encoders leave out their last.
        position: add a learned vector per patch to the features where attention looks for them, not to what it takes
            from there, as DETR does (arXiv 2005.12872): a ConvNet's features do not tell where they are.
        text: build the text path.
        init: start from random weights, a BERT (arXiv 1810.04805; no cross-attention in it) or a BLIP-2.
        init_from: local folder of that checkpoint, in Transformers' names (safetensors).
        init_projection: read the projection of the BLIP-2 too, which suits only the LLM that it was trained with.
        gradient_checkpointing: compute the inside of each block again in the backward pass instead of storing it.
    """

    fusion: ClassVar[str] = "tokens"

    def __init__(
        self,
        *,
        vision_width: int,
        llm_width: int,
        grid: tuple[int, int],
        output_rms: float,
        num_queries: Width = 32,
        depth: Depth = 12,
        width: Width = 768,
        num_heads: Heads = 12,
        cross_attention_every: Depth = 2,
        norm: bool = True,
        position: bool = True,
        text: bool = False,
        init: Literal["random", "bert", "blip2"] = "random",
        init_from: Name | None = None,
        init_projection: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        least = {"num_queries": num_queries, "depth": depth, "cross_attention_every": cross_attention_every}
        for option, value in least.items():
            if value < 1:
                raise ValueError(f"connector.{option}={value} is less than 1; set it to 1 or more")
        if width % num_heads:
            raise ValueError(
                f"connector.width={width} is no multiple of connector.num_heads={num_heads}; "
                f"try connector.width={width // num_heads * num_heads or num_heads}"
            )
        if (init == "random") != (init_from is None):
            raise ValueError(
                f"connector.init={init} does not go with connector.init_from={init_from}; set the checkpoint's kind, "
                "connector.init=bert or blip2, and its folder, connector.init_from=<folder>, or neither"
            )
        if init_projection and init != "blip2":
            raise ValueError(f"connector.init={init} has no projection; set connector.init_projection=false")
        self.num_tokens = num_queries
        self.gradient_checkpointing = gradient_checkpointing
        self.feature_norm = nn.LayerNorm(vision_width, eps=FEATURE_NORM_EPS) if norm else nn.Identity()
        self.position = nn.Parameter(torch.empty(grid[0] * grid[1], vision_width)) if position else None
        self.queries = nn.Parameter(torch.empty(num_queries, width))
        self.words = nn.Embedding(TEXT_VOCABULARY, width) if text else None
        self.word_positions = nn.Embedding(MAX_TEXT, width) if text else None
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.blocks = nn.ModuleList(
            _Block(
                width=width,
                num_heads=num_heads,
                vision_width=None if index % cross_attention_every else vision_width,
                text=text,
            )
            for index in range(depth)
        )
        self.project = nn.Linear(width, llm_width)
        self._draw()
        if init == "bert":
            start_from_bert(self.state_dict(), str(init_from), num_heads=num_heads)
        elif init == "blip2":
            if self.position is not None:
                nn.init.zeros_(self.position)  # what the checkpoint computes stays
            start_from_blip2(self.state_dict(), str(init_from), num_heads=num_heads, projection=init_projection)
        if init != "blip2" and self.position is not None:
            self._look_at_patches(self.position)
        if not init_projection:
            self._match_scale(output_rms)

    def forward(self, features: Float[Tensor, "n p dv"]) -> Float[Tensor, "n k d"]:
        return self.project(self.hidden_states(features))  # N K D

    def hidden_states(
        self,
        features: Float[Tensor, "n p dv"] | None,
        ids: Int[Tensor, "n t"] | None = None,
        mask: Bool[Tensor, "n s s"] | None = None,
    ) -> Float[Tensor, "n s w"]:
        """The last states of the queries, if there are features, and of the text, if there are ids.

        `mask[n, i, j]` is True where position i may attend to position j of the S; None hides nothing.
        """
        start, num_queries = [], 0
        if features is not None:
            features = self.feature_norm(features.to(self.queries.dtype))  # N P Dv
            start.append(self.queries.expand(len(features), -1, -1))  # N K W
            num_queries = self.num_tokens
        if ids is not None:
            start.append(self._embed(ids))  # N T W
        states = self.norm(torch.cat(start, dim=1))  # N S W
        for block in self.blocks:
            given = (states, num_queries, features, self.position, mask)
            if self.gradient_checkpointing and self.training:
                states = checkpoint(block, *given, use_reentrant=False)  # N S W
            else:
                states = block(*given)  # N S W
        return states

    def _embed(self, ids: Int[Tensor, "n t"]) -> Float[Tensor, "n t w"]:
        if self.words is None or self.word_positions is None:
            raise ValueError("the Q-Former was given a text but has no text path; set connector.text=true")
        if ids.shape[1] > MAX_TEXT:
            raise ValueError(f"the text has {ids.shape[1]} tokens, but the Q-Former takes {MAX_TEXT}; cut it")
        return self.words(ids) + self.word_positions.weight[: ids.shape[1]]  # N T W

    def _draw(self) -> None:
        """Draw weights with which the visual tokens depend on the picture from the start.

        BERT's (std 0.02 everywhere) leave 6 % of their energy to it, on EfficientNet's features of drawn shapes; these
        29 %. Cross-attention brings its values in at full scale, but begins to look almost evenly: with logits of std
        3, 1 and 0.3, a proxy (12 blocks of width 128, 150 steps of 8, one seed) came to a loss of 2.30, 1.87 and 1.66.
        """
        branch = (2 * len(self.blocks)) ** -0.5  # as GPT-2: all blocks together are worth one state, the queries
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                gain = branch if name.endswith(("attention.out", "feed.down")) else 1.0
                gain *= LOOK_STD if name.endswith("cross.query") else 1.0
                nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)  # as BERT
        nn.init.normal_(self.queries)
        if self.position is not None:
            nn.init.normal_(self.position)

    @torch.no_grad()
    def _look_at_patches(self, position: nn.Parameter) -> None:
        """Let each query start by looking at a patch of its own, evenly spread: drawn at random, all see the average.

        What a query asks for in each block is the key of its patch's position; the queries, far fewer than W, are
        nearly orthogonal, so that a matrix can tell each what to ask for. A query is one of i + 1 equal parts of the
        states that enter the i-th look, beside what the earlier looks have seen.
        """
        patches = torch.linspace(0, len(position) - 1, len(self.queries)).round().long()
        of_query = torch.linalg.pinv(self.norm(self.queries))  # W K
        looks: list[Any] = [block.cross for block in self.blocks if block.cross is not None]
        for index, cross in enumerate(looks):
            wanted = LOOK_LOCAL * math.sqrt(index + 1) * cross.key(position[patches])  # K W
            cross.query.weight += (of_query @ wanted).T

    def _match_scale(self, output_rms: float) -> None:
        """Draw the projection so that the visual tokens have `output_rms`: E[x²] of a norm's output is γ² + β²."""
        last: Any = self.blocks[-1].get_submodule("query_feed.norm")
        nn.init.normal_(self.project.weight)
        with torch.no_grad():
            self.project.weight *= output_rms * (last.weight.square() + last.bias.square()).sum().rsqrt()


class _Block(nn.Module):
    """A transformer layer with its norms after the sums; `vision_width` None leaves out the cross-attention."""

    def __init__(self, *, width: int, num_heads: int, vision_width: int | None, text: bool) -> None:
        super().__init__()
        self.attention = _Attention(width, source_width=width, num_heads=num_heads)
        self.cross = None if vision_width is None else _Attention(width, source_width=vision_width, num_heads=num_heads)
        self.query_feed = _FeedForward(width)
        self.text_feed = _FeedForward(width) if text else None

    def forward(
        self,
        states: Tensor,
        num_queries: int,
        features: Tensor | None,
        position: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        states = self.attention(states, states, mask=mask)  # N S W
        queries, text = states[:, :num_queries], states[:, num_queries:]  # N K W, N T W
        ends = []
        if queries.shape[1]:
            if self.cross is not None:
                queries = self.cross(queries, features, position)  # N K W
            ends.append(self.query_feed(queries))  # N K W
        if text.shape[1]:
            assert self.text_feed is not None
            ends.append(self.text_feed(text))  # N T W
        return torch.cat(ends, dim=1)  # N S W


class _Attention(nn.Module):
    def __init__(self, width: int, *, source_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(
        self, states: Tensor, source: Tensor, position: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        found = source if position is None else source + position
        query, key, value = (
            each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # N heads · W/heads
            for each in (self.query(states), self.key(found), self.value(source))
        )
        mask = None if mask is None else mask[:, None]  # N 1 S S
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)  # N heads S W/heads
        return self.norm(states + self.out(seen.transpose(1, 2).flatten(2)))  # N S W


class _FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, states: Tensor) -> Tensor:
        return self.norm(states + self.down(F.gelu(self.up(states))))  # N S W
