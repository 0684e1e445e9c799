"""BLIP-2's first stage: a Q-Former that reads images and texts, without an LLM (Li et al., arXiv 2301.12597)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.connectors.bert_layers import NORM_EPS
from vlm.connectors.bert_tokenizer import load_tokenizer
from vlm.connectors.qformer import MAX_TEXT_LENGTH, QFormer
from vlm.connectors.qformer_weights import TEXT_VOCABULARY, start_head_from_bert
from vlm.hub import local_checkpoint
from vlm.llms.bytes import byte_tokenizer
from vlm.models.base import DescribesImages, EmbedsPairs, MatchesPairs, Model
from vlm.models.composed import (
    OF_ENCODER,
    RANDOM_WEIGHTS_SEED,
    SIZES,
    check_contract,
    check_kept_tokens,
    identity_of_encoder,
    split_tiles,
)
from vlm.options import bind, find_class
from vlm.ranges import Name, Width
from vlm.schema import Batch, VisualSpec


class QFormerPretraining(Model, EmbedsPairs, MatchesPairs, DescribesImages):
    """An encoder, a Q-Former with its text path, and the heads of the three losses.

        pixel_values ── encoder ──► features ──► Q-Former ──► queries [B,K,W] ── heads.image ──► image embeddings
        input_ids ─────────────────────────────► Q-Former ──► text [B,T,W] ──┬── heads.text ──► text embedding
                                                                             └── heads.words ──► logits of words

    Who attends to whom, besides the queries to the features:

        embed_texts    text to text
        describe       queries to queries; text to queries and earlier text (as in UniLM, arXiv 1905.03197)
        match          all to all

    In `describe` the queries do not see the text, so it also gives the embeddings of `embed_images`. The connector is
    that of a `Composed` model, which takes it over from a run of this model by `ckpt=`.

    Args:
        encoder, connector: the parts; the connector has its text path.
        tokenizer: folder or hub id of a BERT, whose tokenizer splits the texts.
        package: a Python package that contains the tokenizer; if it is installed, no network is needed.
        embed_dim: width of the embeddings (E).
    """

    parts = {  # noqa: RUF012
        "encoder": ("frozen", "full", "last_n"),
        "connector": ("frozen", "full"),
        "heads": ("frozen", "full"),
    }
    pretrained = ("encoder",)
    layer_decay_part = "encoder"
    feature_part = "encoder"
    root_methods = ("features", "embed_images", "embed_texts", "match", "describe")
    chat_template = "plain"  # pairs have none
    num_positions = MAX_TEXT_LENGTH

    encoder: Any
    connector: QFormer

    def __init__(
        self,
        *,
        encoder: nn.Module,
        connector: QFormer,
        tokenizer: Name,
        package: Name | None = None,
        embed_dim: Width = 256,
    ) -> None:
        super().__init__()
        self.encoder, self.connector = encoder, connector
        is_meta = connector.queries.is_meta  # plan=true
        self.tokenizer = byte_tokenizer() if is_meta else load_tokenizer(tokenizer, package, option="model.tokenizer")
        self.heads = Heads(connector.queries.shape[1], embed_dim=embed_dim)
        self.check_parts()

    def embed_images(self, features: Float[Tensor, "n p dv"]) -> Float[Tensor, "n k e"]:
        return self._unit(self.heads.image(self.connector.hidden_states(features)))  # N K E

    def embed_texts(self, ids: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, "b e"]:
        states = self.connector.hidden_states(None, ids, mask[:, None].expand(-1, ids.shape[1], -1))  # B T W
        return self._unit(self.heads.text(states[:, 0]))  # B E

    def match(
        self, features: Float[Tensor, "b p dv"], ids: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"]
    ) -> Float[Tensor, "b 2"]:
        seen = self._with_queries(mask)  # B S
        states = self.connector.hidden_states(features, ids, seen[:, None].expand(-1, seen.shape[1], -1))  # B S W
        return self.heads.match(states[:, : self.connector.num_tokens]).mean(1)  # B 2

    def describe(
        self, features: Float[Tensor, "b p dv"], batch: Batch
    ) -> tuple[Float[Tensor, "b k e"], Float[Tensor, "m v"]]:
        num_queries, length = self.connector.num_tokens, batch.input_ids.shape[1]
        ids = torch.cat(
            [torch.full_like(batch.input_ids[:, :1], self.tokenizer.bos_token_id), batch.input_ids[:, 1:]], 1
        )
        seen = self._with_queries(batch.attention_mask)  # B S
        order = torch.arange(seen.shape[1], device=seen.device).clamp(min=num_queries - 1)  # S, queries come together
        mask = seen[:, None] & (order[:, None] >= order)  # B S S
        states = self.connector.hidden_states(features, ids, mask)  # B S W
        queries, text = states.split([num_queries, length], dim=1)  # B K W, B T W
        assert self.connector.words is not None
        logits = self.heads.predict_words(text[batch.logits_mask], self.connector.words.weight)  # M V
        return self._unit(self.heads.image(queries)), logits

    def _with_queries(self, mask: Bool[Tensor, "b t"]) -> Bool[Tensor, "b s"]:
        return F.pad(mask, (self.connector.num_tokens, 0), value=True)  # B S

    @staticmethod
    def _unit(vectors: Tensor) -> Tensor:
        return F.normalize(vectors.float(), dim=-1)

    def blocks(self, part: str) -> list[nn.Module]:
        return list(self.encoder.blocks()) if part == "encoder" else []

    @property
    def num_visual_tokens(self) -> int:
        return self.connector.num_tokens

    def visual_spec(self) -> VisualSpec:
        return VisualSpec(num_tokens=0, image_size=self.encoder.image_size, transform=self.encoder.transform)

    def check_rows(self, *, max_length: int, packing: bool) -> None:
        super().check_rows(max_length=max_length, packing=packing)
        if max_length > MAX_TEXT_LENGTH:
            raise ValueError(
                f"data.max_length={max_length} is more than the {MAX_TEXT_LENGTH} tokens that the Q-Former takes; set "
                f"data.max_length={MAX_TEXT_LENGTH} or less"
            )

    @classmethod
    def groups(cls, cfg: Mapping[str, Any]) -> list[str]:
        return cls.required(("encoder", "connector"), cfg)

    @classmethod
    def check(cls, cfg: Mapping[str, Any]) -> None:
        options, tiles = split_tiles(cfg["encoder"])
        bind("encoder", options)
        connector: Any = find_class("connector", cfg["connector"].get("_target_"))
        if not issubclass(connector, QFormer):
            raise ValueError(f"{cls.__name__} needs a Q-Former, not {connector.__name__}; set connector=qformer")
        bind("connector", cfg["connector"], derived=dict.fromkeys(SIZES))
        check_kept_tokens(options, cfg["connector"], connector)
        if not cfg["connector"].get("text", False):
            raise ValueError(f"{cls.__name__} reads texts with the Q-Former; set connector.text=true")
        if tiles.grids:
            raise ValueError(
                f"{cls.__name__} takes an image as a whole, but encoder.tiles.grids={tiles.grids}; set it to []"
            )
        bind("model", cfg["model"], derived=dict.fromkeys(("encoder", "connector")))

    @classmethod
    def build(cls, cfg: Mapping[str, Any], *, bf16: bool) -> Model:
        """As `Model.build`; the connector gets the sizes of the encoder."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_WEIGHTS_SEED)
            encoder: Any = bind("encoder", split_tiles(cfg["encoder"])[0])().requires_grad_(False)
        check_contract("encoder", encoder, OF_ENCODER)
        torch.manual_seed(cfg["seed"])
        sizes = {"vision_width": encoder.width, "grid": tuple(encoder.grid), "llm_width": None, "output_rms": None}
        parts = {"encoder": encoder, "connector": bind("connector", cfg["connector"], sizes)()}
        model: Any = bind("model", cfg["model"], parts)()
        options = cfg["connector"]
        if options.get("init") == "bert" and (folder := local_checkpoint(options["init_from"], options.get("package"))):
            start_head_from_bert(model.heads.state_dict(), folder)
        return model

    def identity(self, cfg: Mapping[str, Any]) -> dict[str, Any]:
        """As `Model.identity`, with the layer and transform of the encoder."""
        identity = super().identity(cfg)
        identity["parts"]["encoder"] = identity_of_encoder(self.encoder, cfg["encoder"])
        return identity

    def use_local_tokenizer(self, cfg: Mapping[str, Any]) -> str:
        options = cfg["model"]
        if local_checkpoint(options["tokenizer"], options.get("package")) is None:
            return "a byte tokenizer"
        self.load_tokenizer(cfg)
        return "the tokenizer of its BERT"

    def load_tokenizer(self, cfg: Mapping[str, Any]) -> None:
        options = cfg["model"]
        self.tokenizer = load_tokenizer(options["tokenizer"], options.get("package"), option="model.tokenizer")


class Heads(nn.Module):
    """The projections of queries and text into the common space, of queries to "match", and of text to words."""

    def __init__(self, width: int, *, embed_dim: int) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(width, embed_dim), nn.Linear(width, embed_dim)
        self.match = nn.Linear(width, 2)
        self.transform, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=NORM_EPS)
        self.word_bias = nn.Parameter(torch.zeros(TEXT_VOCABULARY))
        for layer in (self.image, self.text, self.match, self.transform):
            nn.init.normal_(layer.weight, std=0.02)  # as BERT
            nn.init.zeros_(layer.bias)

    def predict_words(self, states: Float[Tensor, "m w"], words: Float[Tensor, "v w"]) -> Float[Tensor, "m v"]:
        """BERT's head, with the word embeddings as its last matrix."""
        return F.linear(self.norm(F.gelu(self.transform(states))), words, self.word_bias)  # M V
