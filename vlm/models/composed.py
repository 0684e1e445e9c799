"""The vision-language model of encoder, connector and LLM: images enter the LLM as visual tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlm.architecture import depth_of, from_facts, with_depth
from vlm.encoders.tiles import Tiles
from vlm.llms.loading import load_tokenizer, local_facts, local_folder, local_tokenizer
from vlm.llms.quantization import check_quantization
from vlm.models.base import AnswersText, Generates, Model, PredictsTokens
from vlm.models.unpad import Unpad, pack
from vlm.options import bind, bind_class, parameters, unknown_key
from vlm.schema import Batch, VisualSpec
from vlm.text.templates import TEMPLATES

RANDOM_WEIGHTS_SEED = 0  # a random encoder or LLM is the same in every run, like a pretrained one
SIZES = ("vision_width", "llm_width", "grid", "output_rms")  # arguments of a connector that come from encoder and LLM
ONLY_ADDED = {"only": ["added_tokens"]}  # the state of an LLM that is frozen but for the rows of its added tokens


class Composed(Model, PredictsTokens, Generates, AnswersText):
    """A vision-language model made of three parts.

    pixel_values [N,3,H,W] ── encoder ──► features [N,P,Dv] ── connector ──► visual [N,K,D]
                                                                           │
    input_ids [B,T] ── llm.embed ──► embeds [B,T,D] ◄── placeholders ──────┘  fusion "tokens"
                                          │          or decoder layers ◄───┘  fusion "layers"
                                          ▼
                                         llm ──► logits [M,V] at the positions before supervised tokens
    """

    parts = {  # noqa: RUF012
        "encoder": ("frozen", "full", "last_n"),
        "connector": ("frozen", "full", "only"),
        "llm": ("frozen", "full", "lora", "last_n", "only"),
    }
    pretrained = ("encoder", "llm")
    layer_decay_part = "encoder"
    feature_part = "encoder"
    root_methods = ("generate", "logits_of_answers", "without_images")
    changeable = {  # noqa: RUF012
        "chat_template": "llm.chat_template",
        "parts.encoder.transform.resize": "encoder.resize",
        "parts.encoder.tiles": "encoder.tiles",
    }

    encoder: Any
    connector: Any
    llm: Any

    def __init__(
        self,
        *,
        encoder: nn.Module,
        connector: nn.Module,
        llm: nn.Module,
        tiles: Tiles | None = None,
        chat_template: str | None = None,
        quantization: str = "none",
    ) -> None:
        super().__init__()
        self.encoder, self.connector, self.llm = encoder, connector, llm
        self.tiles, self.chat_template, self.quantization = tiles or Tiles(), chat_template, quantization
        if connector.fusion == "layers":
            self.connector.attach(self.llm.layers())
        if self.tiles.unpad:
            if self.connector.num_tokens != (num := self.encoder.grid[0] * self.encoder.grid[1]):
                raise ValueError(
                    f"encoder.tiles.unpad=true needs a visual token for each of the {num} patches, but connector "
                    f"{type(connector).__name__} gives {connector.num_tokens}; choose connector=mlp or linear, or set "
                    "encoder.tiles.unpad=false"
                )
            newline = torch.randn(self.llm.width) / self.llm.width**0.5  # the scale of LLaVA-NeXT's
            self.connector.register_parameter("newline", nn.Parameter(newline))
        self.check_parts()

    def forward(self, batch: Batch) -> Float[Tensor, "m v"]:
        batch = self.without_padding(batch)
        visual = self.packed(self.visual(batch), batch)  # N K D, or S D
        embeds = self.llm.embed(batch.input_ids)  # B T D
        self.llm.adapt_to(batch)
        with self.fused(visual, embeds, batch) as embeds:  # B T D
            return self.llm(embeds, batch.llm_mask, batch.position_ids, batch.logits_mask)  # M V

    @torch.no_grad()
    def logits_of_answers(self, batch: Batch) -> Float[Tensor, "m v"]:
        shared = batch.num_shared_tokens
        if not shared or self.connector.fusion != "tokens" or not self.llm.can_continue:
            return self(batch)
        visual = self.packed(self.visual(batch), batch)  # N K D, or S D
        embeds = scatter_visual_tokens(visual, self.llm.embed(batch.input_ids), batch)  # B T D
        after = slice(shared, None)
        self.llm.adapt_to(batch)
        return self.llm.continued(
            embeds[:1, :shared], embeds[:, after], batch.attention_mask[:, after], batch.logits_mask[:, after]
        )  # M V

    @torch.no_grad()
    def generate(self, batch: Batch, *, stop_ids: list[int], **options: Any) -> Int[Tensor, "b s"]:
        visual = self.packed(self.visual(batch), batch)  # N K D, or S D
        embeds = self.llm.embed(batch.input_ids)  # B T D
        self.llm.adapt_to(batch)
        with self.fused(visual, embeds, batch) as embeds:  # B T D
            return self.llm.generate(embeds, batch.attention_mask, stop_ids=stop_ids, **options)  # B S

    def visual(self, batch: Batch) -> Float[Tensor, "n k d"]:
        """The visual tokens of each image; a connector that reads instructions gets that of the image too."""
        features = self.features(batch)  # U P Dv
        if batch.instruction_ids is None:
            return batch.of_each_image(self.connector(features))  # N K D
        return self.connector(batch.of_each_image(features), batch.instruction_ids, batch.instruction_mask)  # N K D

    def packed(self, visual: Float[Tensor, "n k d"], batch: Batch) -> Float[Tensor, "*visual d"]:
        """The visual tokens as they enter the LLM: with `tiles.unpad`, S tokens of all images, else unchanged."""
        if not self.tiles.unpad:
            return visual
        return pack(
            visual,
            self.connector.newline,
            layouts=list(chain.from_iterable(batch.layouts)),
            kept=list(chain.from_iterable(batch.kept_patches)),
            patches=tuple(self.encoder.grid),
        )  # S D

    @contextmanager
    def fused(
        self, visual: Float[Tensor, "*visual e"], embeds: Float[Tensor, "b t d"], batch: Batch
    ) -> Iterator[Float[Tensor, "b t d"]]:
        """Context that yields the LLM's input embeddings: with visual tokens, or while its layers attend to these."""
        if self.connector.fusion == "tokens":
            yield scatter_visual_tokens(visual, embeds, batch)  # B T D
        else:
            with self.connector.attending_to(visual, batch):
                yield embeds

    @property
    def joins_rows(self) -> bool:
        """Whether the LLM computes a batch as one row; its layers with visual tokens need the rows."""
        return bool(self.llm.joins_rows and self.connector.fusion == "tokens")

    def without_padding(self, batch: Batch) -> Batch:
        return batch.in_one_row() if self.joins_rows else batch

    @property
    def speed_choices(self) -> Mapping[str, str]:
        return {"attention": self.llm.attention, "padding": "none" if self.joins_rows else "computed"}

    def without_images(self, batch: Batch) -> Float[Tensor, "m v"]:
        batch = self.without_padding(batch)
        self.llm.adapt_to(batch)
        return self.llm(self.llm.embed(batch.input_ids), batch.llm_mask, batch.position_ids, batch.logits_mask)  # M V

    def text_parameters(self) -> Iterator[nn.Parameter]:
        return self.llm.model.parameters()

    def without_adapter(self) -> AbstractContextManager[None]:
        return self.llm.without_adapter()

    @torch.no_grad()
    def diagnostics(self, batch: Batch) -> dict[str, float]:
        """Root mean square of the visual tokens and of the LLM's embeddings.

        Training is slow if they differ much.
        """
        visual = self.visual(batch)  # N K D
        if len(visual) == 0:
            return {}
        rms = visual.float().square().mean().sqrt()
        return {"visual_rms": float(rms), "embed_rms": self.llm.embed_rms}

    def blocks(self, part: str) -> list[nn.Module]:
        if part == "encoder":
            return list(self.encoder.blocks())
        return list(self.llm.layers()) if part == "llm" else []

    @property
    def tokenizer(self) -> Any:
        return self.llm.tokenizer

    @property
    def max_answers(self) -> int | None:  # type: ignore[override]
        return self.llm.max_answers

    @property
    def num_positions(self) -> int | None:  # type: ignore[override]
        return self.llm.num_positions

    @property
    def num_visual_tokens(self) -> int:
        return self.connector.num_tokens

    def visual_spec(self) -> VisualSpec:
        transform = self.encoder.transform
        spec = VisualSpec(
            num_tokens=self.connector.num_tokens if self.connector.fusion == "tokens" else 0,
            image_size=self.encoder.image_size,
            transform=transform,
            instruction=getattr(self.connector, "instructions", None),
            image_token=getattr(self.connector, "image_token", None),
        )
        if not self.tiles.grids:
            return spec
        tiled, separator = self.tiles.tiled(transform), "\n" if self.tiles.row_separator else ""
        spec = replace(
            spec, transform=tiled, tile_rows=tiled.rows, max_tiles=self.tiles.max_tiles, row_separator=separator
        )
        if not self.tiles.unpad:
            return spec
        unpad = Unpad(grid=tiled.grid, patches=tuple(self.encoder.grid))
        height, width = self.encoder.image_size
        largest = max(unpad.number((cols * width, rows * height)) for rows, cols in self.tiles.grids)
        return replace(spec, kept_patches=unpad.kept, num_packed=unpad.number, max_packed=largest)

    def check_rows(self, *, max_length: int, packing: bool) -> None:
        self.llm.check_length(max_length)
        if packing and not next(self.llm.parameters()).is_meta:
            self.llm.check_packing()

    @classmethod
    def groups(cls, cfg: Mapping[str, Any]) -> list[str]:
        return cls.required(cls.parts, cfg)

    @classmethod
    def check(cls, cfg: Mapping[str, Any]) -> None:
        encoder, tiles = split_tiles(cfg["encoder"])
        bind("encoder", encoder)
        connector: Any = bind("connector", cfg["connector"], derived=dict.fromkeys(SIZES)).func
        llm: Any = bind("llm", cfg["llm"], derived={"dtype": "float32"}).func
        bind("model", cfg["model"], derived=dict.fromkeys(("encoder", "connector", "llm", *FROM_OPTIONS)))
        if lacking := [size for size in SIZES if size not in parameters(connector)]:
            raise ValueError(
                f"connector {connector.__name__} does not take {lacking[0]}; the constructor of a connector takes "
                f"{', '.join(SIZES)} (docs/extend.md)"
            )
        check_contract("connector", connector, ("fusion",))
        check_kept_tokens(encoder, cfg["connector"], connector)
        if tiles.grids and connector.fusion != "tokens":
            raise ValueError(
                f"connector {connector.__name__} does not support tiles, but encoder.tiles.grids="
                f"{tiles.grids}; set encoder.tiles.grids=[] or connector=mlp"
            )
        for part in ("encoder", "llm"):
            if isinstance(facts := cfg[part].get("config"), Mapping) and "model_type" in facts:
                from_facts(facts, option=f"{part}.config")
        options = cfg["llm"]
        if connector.fusion not in llm.fusions:
            raise ValueError(
                f"connector {connector.__name__} attaches to the layers of a decoder-only llm, but "
                f"{options['pretrained']} has an encoder and a decoder; choose another llm, or a connector for its "
                "input such as connector=mlp"
            )
        quantization, state = options.get("quantization", "none"), cfg["stage"].get("llm")
        if quantization != "none" and not _keeps_llm(state):
            raise ValueError(
                f"stage.llm={state} cannot train weights quantized by llm.quantization={quantization}; "
                "set stage.llm=lora or llm.quantization=none"
            )
        check_quantization(quantization, weights=options["weights"])
        _check_adapted_tokens(cfg, llm, connector)
        _check_added_tokens(cfg)
        if (template := options.get("chat_template")) is not None and template not in TEMPLATES:
            raise ValueError(unknown_key(f"llm.chat_template={template}", TEMPLATES, asked=template))

    @classmethod
    def build(cls, cfg: Mapping[str, Any], *, bf16: bool) -> Model:
        """As `Model.build`; the connector gets the sizes of encoder and LLM."""
        # Trainable parameters are loaded in float32, so that no value is rounded. With LoRA the LLM itself is frozen.
        llm_in_bf16 = bf16 and _keeps_llm(cfg["stage"]["llm"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_WEIGHTS_SEED)
            options, tiles = split_tiles(cfg["encoder"])
            encoder: Any = bind("encoder", options)().requires_grad_(False)
            check_contract("encoder", encoder, OF_ENCODER)
            sizes = {"vision_width": encoder.width, "grid": tuple(encoder.grid)}
            with torch.device("meta"):  # raises before the LLM is loaded if it does not fit
                connector: Any = bind("connector", cfg["connector"], {**sizes, "llm_width": 64, "output_rms": 1.0})()
            layer_methods = ("attach", "attending_to") if connector.fusion == "layers" else ()
            check_contract("connector", connector, ("num_tokens", *layer_methods))
            llm: Any = bind("llm", cfg["llm"], {"dtype": "bfloat16" if llm_in_bf16 else "float32"})().requires_grad_(
                False
            )
        torch.manual_seed(cfg["seed"])
        sizes |= {"llm_width": llm.width, "output_rms": llm.embed_rms}
        parts = {"encoder": encoder, "connector": bind("connector", cfg["connector"], sizes)(), "llm": llm}
        from_options = {
            "tiles": tiles,
            "chat_template": cfg["llm"]["chat_template"],
            "quantization": cfg["llm"].get("quantization", "none"),
        }
        return bind("model", cfg["model"], {**parts, **from_options})()

    def identity(self, cfg: Mapping[str, Any]) -> dict[str, Any]:
        """As `Model.identity`, with the layer, transform and tiles of the encoder and the added tokens of the LLM."""
        identity = super().identity(cfg)
        identity["parts"]["encoder"] = {
            **identity_of_encoder(self.encoder, cfg["encoder"]),
            "tiles": asdict(self.tiles),
        }
        if self.llm.added_tokens is not None:
            identity["bases"]["llm"]["added_tokens"] = list(self.llm.added_tokens.names)
        return identity

    def load_tokenizer(self, cfg: Mapping[str, Any]) -> None:
        llm = cfg["llm"]
        if llm["weights"] == "pretrained":
            self.llm.use_tokenizer(
                load_tokenizer(llm["pretrained"], package=llm["package"], trust=llm["trust_remote_code"])
            )

    @classmethod
    def weights_are_here(cls, cfg: Mapping[str, Any]) -> bool:
        return cfg["llm"]["weights"] != "pretrained" or local_folder(cfg["llm"]) is not None

    @classmethod
    def depth(cls, cfg: Mapping[str, Any]) -> int | None:
        return depth_of(local_facts(cfg["llm"]))

    @classmethod
    def with_depth(cls, cfg: Mapping[str, Any], depth: int) -> dict[str, Any]:
        return {**cfg, "llm": {**cfg["llm"], "config": with_depth(local_facts(cfg["llm"]), depth)}}

    def use_local_tokenizer(self, cfg: Mapping[str, Any]) -> str:
        if (found := local_tokenizer(cfg["llm"])) is not None:
            self.llm.use_tokenizer(found)
            return "the LLM's own tokenizer"
        # The byte tokenizer gives texts several times as long, and has no chat template.
        self.chat_template = self.chat_template or "chatml"
        return "a byte tokenizer"


OF_ENCODER = ("width", "grid", "image_size", "transform", "blocks")
FROM_OPTIONS = (
    "tiles",
    "chat_template",
    "quantization",
)  # arguments of the model that come from the options of its parts


def _check_adapted_tokens(cfg: Mapping[str, Any], llm: Any, connector: Any) -> None:
    """Raise ValueError if `stage.lora.tokens` does not fit the LLM, the connector or the other options."""
    stage, lora = cfg["stage"], cfg["stage"].get("lora") or {}
    tokens, replay = lora.get("tokens", "all"), cfg["data"].get("text_replay")
    if stage.get("llm") != "lora" or tokens == "all":
        return
    option = f"stage.lora.tokens={tokens}"
    if not llm.selects_tokens:
        raise ValueError(f"{option} needs a decoder-only llm; set stage.lora.tokens=all")
    if lora.get("use_dora"):
        raise ValueError(
            f"{option} does not go with stage.lora.use_dora=true, which scales the weights for all tokens; set one of "
            "them back"
        )
    if tokens == "visual" and connector.fusion != "tokens":
        raise ValueError(
            f"{option}, but connector {connector.__name__} puts no visual tokens into the row; set "
            "stage.lora.tokens=after_image"
        )
    if replay:
        raise ValueError(
            f"{option} leaves texts without an image to the untouched llm, so that data.text_replay={replay} trains "
            "nothing; set data.text_replay=0"
        )


def _keeps_llm(state: Any) -> bool:
    """Whether a stage changes no weight of the pretrained LLM."""
    return state in ("frozen", "lora", ONLY_ADDED)


def _check_added_tokens(cfg: Mapping[str, Any]) -> None:
    """Raise ValueError if `stage.llm` trains added tokens that are not there, or leaves new ones random."""
    state, added = cfg["stage"].get("llm"), cfg["llm"].get("added_tokens")
    if state == ONLY_ADDED and not added:
        raise ValueError(
            "stage.llm={only: [added_tokens]} trains the rows of llm.added_tokens, and there are none; set "
            "llm.added_tokens=[<token>] or stage.llm=frozen"
        )
    if added and state == "frozen" and cfg.get("ckpt") is None:
        raise ValueError(
            f"llm.added_tokens={added} have new rows, which stage.llm=frozen leaves random; set "
            "stage.llm={only: [added_tokens]} and stage.lr.llm"
        )


def identity_of_encoder(encoder: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """What an artifact stores of how an encoder is used."""
    return {
        **{key: options.get(key) for key in ("_target_", "layer")},
        "image_size": list(encoder.image_size),
        "transform": asdict(encoder.transform),
    }


def check_kept_tokens(encoder: Mapping[str, Any], options: Mapping[str, Any], connector: Any) -> None:
    """Raise ValueError if the encoder keeps class tokens and the connector needs each feature's place in the grid."""
    if not encoder.get("keep_tokens"):
        return
    needs_grid = not getattr(connector, "takes_kept_tokens", False)
    if needs_grid or options.get("position", True):
        remedy = "choose connector=qformer connector.position=false" if needs_grid else "set connector.position=false"
        raise ValueError(
            f"encoder.keep_tokens=true gives features that are no patches, and connector {connector.__name__} needs "
            f"the place of each; {remedy}, or encoder.keep_tokens=false"
        )


def check_contract(part: str, found: Any, names: tuple[str, ...]) -> None:
    """Raise ValueError if a part lacks an attribute that this model uses."""
    if lacking := [name for name in names if not hasattr(found, name)]:
        kind = found if isinstance(found, type) else type(found)
        raise ValueError(f"{part} {kind.__name__} has no {lacking[0]}; docs/extend.md lists the attributes of a {part}")


def scatter_visual_tokens(
    visual: Float[Tensor, "*visual d"], embeds: Float[Tensor, "b t d"], batch: Batch
) -> Float[Tensor, "b t d"]:
    """The embeddings with the visual tokens, in order, at the positions of the placeholders (`image_mask`).

    Raises ValueError if the numbers of placeholders and visual tokens differ.
    """
    placeholders, tokens = int(batch.image_mask.sum()), visual.shape[:-1].numel()
    if placeholders != tokens:
        found = f"{' images of '.join(map(str, visual.shape[:-1]))} visual tokens"
        raise ValueError(
            f"the batch has {placeholders} image placeholders but {found}{f' = {tokens}' * (visual.ndim == 3)}; set "
            f"num_tokens of the VisualSpec to the connector's (samples {', '.join(batch.ids[:4])})"
        )
    return embeds.masked_scatter(batch.image_mask[..., None], visual.to(embeds.dtype))


def split_tiles(options: Mapping[str, Any]) -> tuple[dict[str, Any], Tiles]:
    """The options of the encoder without `tiles`, and its tiles."""
    encoder = dict(options)
    return encoder, bind_class("encoder.tiles", Tiles, encoder.pop("tiles", {}))()
