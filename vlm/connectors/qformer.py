"""Q-Former: BLIP-2's Querying Transformer (Li et al., arXiv 2301.12597).

Axes: N images, P patches per image, Dv encoder width, K queries = visual tokens, D LLM width; W width of the Q-Former,
T text tokens, S length of queries and text together; either may be absent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vlm.connectors.bert_layers import NORM_EPS, Attention, FeedForward
from vlm.connectors.bert_tokenizer import Instructions
from vlm.connectors.qformer_weights import TEXT_VOCABULARY, start_from_bert, start_from_blip2
from vlm.hub import download_checkpoint, local_checkpoint
from vlm.ranges import Depth, Heads, Name, RatioBelowOne, Width

MAX_TEXT_LENGTH = 512  # as BERT
CROSS_LOGITS_STD = 0.3  # at the start, about BERT's; sharper random attention learns slower
LOCAL_ATTENTION = 2.5  # scale of the logit of a query's own patch; most of the attention is then on it
FEATURE_NORM_EPS = 1e-6  # as in the last norm of BLIP-2's encoders


class QFormer(nn.Module):
    """features [N,P,Dv] -> visual [N,K,D]: queries attend to each other and, in some blocks, to the features.

        queries [K,W] ──► norm ──► block ──► … ──► block ──► project ──► visual
                                     ▲
        features ──► feature_norm

        block: states = norm(states + attention(states)); in some blocks queries = norm(queries + cross(queries,
            features));
               states = norm(states + feed(states)), with separate feed-forward layers for queries and text

    The text path of BLIP-2's first stage is built with `text`: `hidden_states` then takes images, texts or both. The
    projection needs a much higher learning rate than the transformer; see conf/connector/qformer.yaml. Without an LLM
    (`llm_width` None), as in the first stage, there is no projection.

    Without `norm` and `position` it equals Transformers' Blip2QFormerModel and its language projection.

    Parameters with L blocks, C of them with cross-attention: L·(12·W² + 13·W) + C·(2·W² + 2·Dv·W + 6·W) + K·W + 2·W
    + W·D + D, and 2·Dv for `norm`, P·Dv for `position`, L·(8·W² + 7·W) + (30,523 + 512)·W for `text`.

    Args:
        vision_width, llm_width, grid, output_rms: of the encoder and the LLM; the builder passes them. The last three
            are not used without an LLM and without `position`.
        num_queries: visual tokens per image (K).
        depth, width, num_heads: of the transformer; the feed-forward layers have width 4·W.
        cross_attention_every: every n-th block, from the first, has cross-attention.
        norm: layer norm on the features; BLIP-2 has it as the last norm of its encoder.
        position: add a learned position embedding per patch to the keys, not to the values, as in DETR (arXiv
            2005.12872): the features of a ConvNet hold little of the position.
        text: build the text path.
        instruction: let the queries and the text of the question that an image comes with attend to each other
            (InstructBLIP, arXiv 2305.06500).
        tokenizer: folder or hub id of a BERT, whose tokenizer splits that text.
        dropout: of the embeddings, the attention weights and the output of each layer, as in BERT.
        init: random weights, or those of a BERT (arXiv 1810.04805; without cross-attention) or a BLIP-2.
        init_from: folder or hub id of that checkpoint of Transformers (safetensors); of a BLIP-2 also a run, whose
            LLM may be another one.
        package: a Python package that contains checkpoint and tokenizer; if it is installed, no network is needed.
        init_projection: also load the BLIP-2's projection, which fits only the LLM that it was trained with.
        gradient_checkpointing: recompute blocks in the backward pass instead of storing their activations.
    """

    fusion: ClassVar[str] = "tokens"
    takes_kept_tokens: ClassVar[bool] = True  # without `position`
    # What a next stage may change: how the weights started and are computed; and whether it keeps the text path.
    not_compared: ClassVar[tuple[str, ...]] = (
        *("dropout", "instruction", "tokenizer", "init", "init_from", "package", "init_projection"),
        "gradient_checkpointing",
    )
    can_be_dropped: ClassVar[Mapping[str, str]] = {"text": r"words\.|word_positions\.|blocks\.\d+\.text_feed\."}

    def __init__(
        self,
        *,
        vision_width: int,
        llm_width: int | None,
        grid: tuple[int, int],
        output_rms: float | None,
        num_queries: Width = 32,
        depth: Depth = 12,
        width: Width = 768,
        num_heads: Heads = 12,
        cross_attention_every: Depth = 2,
        norm: bool = True,
        position: bool = True,
        text: bool = False,
        instruction: bool = False,
        tokenizer: Name = "google-bert/bert-base-uncased",
        dropout: RatioBelowOne = 0.0,
        init: Literal["random", "bert", "blip2"] = "random",
        init_from: Name | None = None,
        package: Name | None = None,
        init_projection: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        at_least_one = {"num_queries": num_queries, "depth": depth, "cross_attention_every": cross_attention_every}
        for option, value in at_least_one.items():
            if value < 1:
                raise ValueError(f"connector.{option}={value} must be at least 1")
        if width % num_heads:
            raise ValueError(
                f"connector.width={width} must be a multiple of connector.num_heads={num_heads}; "
                f"try connector.width={width // num_heads * num_heads or num_heads}"
            )
        if (init == "random") != (init_from is None):
            raise ValueError(
                f"connector.init={init} and connector.init_from={init_from} do not fit together; set "
                "connector.init=bert or blip2 with connector.init_from=<folder>, or neither"
            )
        if init_projection and init != "blip2":
            raise ValueError(f"connector.init={init} has no projection; set connector.init_projection=false")
        if instruction and not text:
            raise ValueError("connector.instruction=true needs the text path; set connector.text=true")
        self.instructions = Instructions(tokenizer, package) if instruction else None
        self.num_tokens = num_queries
        self.gradient_checkpointing = gradient_checkpointing
        self.feature_norm = nn.LayerNorm(vision_width, eps=FEATURE_NORM_EPS) if norm else nn.Identity()
        self.position = nn.Parameter(torch.empty(grid[0] * grid[1], vision_width)) if position else None
        self.queries = nn.Parameter(torch.empty(num_queries, width))
        self.words = nn.Embedding(TEXT_VOCABULARY, width) if text else None
        self.word_positions = nn.Embedding(MAX_TEXT_LENGTH, width) if text else None
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            _Block(
                width=width,
                num_heads=num_heads,
                vision_width=None if index % cross_attention_every else vision_width,
                text=text,
                dropout=dropout,
            )
            for index in range(depth)
        )
        self.project = None if llm_width is None else nn.Linear(width, llm_width)
        self._init_weights()
        folder = self._checkpoint(init, init_from, package)
        if init == "blip2" and self.position is not None:
            nn.init.zeros_(self.position)  # keeps the output of the checkpoint
        if folder is not None and init == "bert":
            start_from_bert(self.state_dict(), folder, num_heads=num_heads)
        elif folder is not None:
            start_from_blip2(self.state_dict(), folder, num_heads=num_heads, projection=init_projection)
        if init != "blip2" and self.position is not None:
            self._init_local_attention(self.position)
        if not init_projection and self.project is not None and output_rms is not None:
            self._match_scale(self.project, output_rms)

    def forward(
        self,
        features: Float[Tensor, "n p dv"],
        ids: Int[Tensor, "n t"] | None = None,
        mask: Bool[Tensor, "n t"] | None = None,
    ) -> Float[Tensor, "n k d"]:
        """The visual tokens, also from the instructions `ids`, right-padded where `mask` is False, if there are any."""
        assert self.project is not None
        if self.instructions is not None and ids is None:  # no image in the batch: keeps all parameters in the graph
            ids = torch.zeros(len(features), 1, dtype=torch.long, device=features.device)  # N 1
            mask = ids == 0  # N 1
        if ids is None or mask is None:
            return self.project(self.hidden_states(features))  # N K D
        seen = F.pad(mask, (self.num_tokens, 0), value=True)  # N S
        states = self.hidden_states(features, ids, seen[:, None].expand(-1, seen.shape[1], -1))  # N S W
        queries, text = states[:, : self.num_tokens], states[:, self.num_tokens :]  # N K W, N T W
        unused = 0 * text.sum()  # keeps the text's last layers in the graph, as DDP needs
        return self.project(queries) + unused  # N K D

    def hidden_states(
        self,
        features: Float[Tensor, "n p dv"] | None,
        ids: Int[Tensor, "n t"] | None = None,
        mask: Bool[Tensor, "n s s"] | None = None,
    ) -> Float[Tensor, "n s w"]:
        """The last hidden states of the queries, if there are features, and of the text, if there are ids.

        `mask[n, i, j]` is True where position i may attend to position j; None allows all.
        """
        inputs, num_queries = [], 0
        if features is not None:
            features = self.feature_norm(features.to(self.queries.dtype))  # N P Dv
            inputs.append(self.queries.expand(len(features), -1, -1))  # N K W
            num_queries = self.num_tokens
        if ids is not None:
            inputs.append(self._embed(ids))  # N T W
        states = self.dropout(self.norm(torch.cat(inputs, dim=1)))  # N S W
        for block in self.blocks:
            arguments = (states, num_queries, features, self.position, mask)
            if self.gradient_checkpointing and self.training:
                states = checkpoint(block, *arguments, use_reentrant=False)  # N S W
            else:
                states = block(*arguments)  # N S W
        return states

    def _embed(self, ids: Int[Tensor, "n t"]) -> Float[Tensor, "n t w"]:
        if self.words is None or self.word_positions is None:
            raise ValueError("the Q-Former got a text but has no text path; set connector.text=true")
        if ids.shape[1] > MAX_TEXT_LENGTH:
            raise ValueError(
                f"the text has {ids.shape[1]} tokens, but the Q-Former takes at most {MAX_TEXT_LENGTH}; truncate it"
            )
        return self.words(ids) + self.word_positions.weight[: ids.shape[1]]  # N T W

    def _checkpoint(self, init: str, init_from: str | None, package: str | None) -> str | None:
        """The folder of the weights to start from; None if there is none, or if it is not here and sizes suffice."""
        if init == "random" or init_from is None:
            return None
        folder = local_checkpoint(init_from, package)
        if folder is None and not self.queries.is_meta:
            folder = download_checkpoint(init_from, package, option="connector.init_from")
        return folder

    def _init_weights(self) -> None:
        """Initialize so that the visual tokens depend on the image from the start.

        With BERT's initialization (std 0.02) the image gives 6 % of their variance, measured with EfficientNet on the
        shapes data; here it gives 29 %. The values of cross-attention have full scale, but its weights start almost
        uniform: with logits of std 3, 1 and 0.3 a small model (12 blocks of width 128, 150 steps of 8 images, one seed)
        reached a loss of 2.30, 1.87 and 1.66.
        """
        residual = (2 * len(self.blocks)) ** -0.5  # as GPT-2: the blocks together add the variance of the queries
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                gain = residual if name.endswith(("attention.out", "feed.down")) else 1.0
                gain *= CROSS_LOGITS_STD if name.endswith("cross.query") else 1.0
                nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)  # as BERT
        nn.init.normal_(self.queries)
        if self.position is not None:
            nn.init.normal_(self.position)

    @torch.no_grad()
    def _init_local_attention(self, position: nn.Parameter) -> None:
        """Let each query start with attention to a different patch; random weights would attend to all patches equally.

        In each cross-attention the projected query is the key of its patch's position. The queries are far fewer than W
        and nearly orthogonal, so one query projection can map each to its own key. In the i-th cross-attention the
        query is one of i + 1 equal parts of its hidden state; the others come from earlier cross-attentions.
        """
        patches = torch.linspace(0, len(position) - 1, len(self.queries)).round().long()
        inverse = torch.linalg.pinv(self.norm(self.queries))  # W K
        cross_attentions: list[Any] = [block.cross for block in self.blocks if block.cross is not None]
        for index, cross in enumerate(cross_attentions):
            target = LOCAL_ATTENTION * math.sqrt(index + 1) * cross.key(position[patches])  # K W
            cross.query.weight += (inverse @ target).T

    def _match_scale(self, project: nn.Linear, output_rms: float) -> None:
        """Initialize the projection for visual tokens of `output_rms`; the output of a norm has E[x²] = γ² + β²."""
        last: Any = self.blocks[-1].get_submodule("query_feed.norm")
        nn.init.normal_(project.weight)
        with torch.no_grad():
            project.weight *= output_rms * (last.weight.square() + last.bias.square()).sum().rsqrt()


class _Block(nn.Module):
    """A post-norm transformer layer; without cross-attention if `vision_width` is None."""

    def __init__(self, *, width: int, num_heads: int, vision_width: int | None, text: bool, dropout: float) -> None:
        super().__init__()
        attention: Any = partial(Attention, width, num_heads=num_heads, dropout=dropout)
        self.attention = attention(source_width=width)
        self.cross = None if vision_width is None else attention(source_width=vision_width)
        self.query_feed = FeedForward(width, dropout=dropout)
        self.text_feed = FeedForward(width, dropout=dropout) if text else None

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
        outputs = []
        if queries.shape[1]:
            if self.cross is not None:
                queries = self.cross(queries, features, position)  # N K W
            outputs.append(self.query_feed(queries))  # N K W
        if text.shape[1]:
            assert self.text_feed is not None
            outputs.append(self.text_feed(text))  # N T W
        return torch.cat(outputs, dim=1)  # N S W
