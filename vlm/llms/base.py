"""Base class of the LLMs, which wrap models of Transformers."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

from vlm.llms.adapted import AdaptedTokens, Tokens
from vlm.llms.added_tokens import AddedTokens
from vlm.llms.bytes import byte_tokenizer
from vlm.llms.loading import build, load
from vlm.llms.quantization import Quantization, check_quantization
from vlm.ranges import Facts, Length, Name, Range, RatioBelowOne
from vlm.schema import Batch

ADAPTABLE = (nn.Linear, nn.Embedding, Conv1D)  # types of layers that PEFT's LoRA supports


class LanguageModel(nn.Module, ABC):
    """A language model of Transformers; subclasses define `forward`, `layers` and `check_packing`.

    The model keeps its modules and state-dict keys. It stays in evaluation mode, with dropout rates of zero; a LoRA
    adapter has its own mode and dropout.

    Args:
        pretrained: hub id or local folder of the weights (safetensors).
        config: architecture in Transformers' names, with `model_type`, so that it is built without network; None reads
            it from `pretrained`.
        weights: `pretrained` loads them, `random` initializes them, `meta` allocates no memory.
        package: a Python package that contains the weights as a GGUF file; if installed, no network is needed.
        chat_template: name of a built-in template of vlm/text/templates.py, or None for the tokenizer's own.
        dtype: of the weights, `float32` or `bfloat16`.
        attention: Transformers' attention implementation; `auto` is the fastest of those that work (`auto_attention`).
        quantization: `int8` (LLM.int8(), arXiv 2208.07339) or `nf4` (QLoRA, arXiv 2305.14314) quantizes the
            linear layers; on the meta device they are not quantized.
        generation: `greedy` decoding, or `checkpoint` for the generation config of the checkpoint (sampling, beams,
            penalties).
        gradient_checkpointing: recompute layers in the backward pass instead of storing their activations.
        trust_remote_code: run code that comes with the weights; set it only if you trust its author.
        added_tokens: special tokens beside the vocabulary, whose rows can be trained while the LLM is frozen.

    Random or meta weights come with a byte tokenizer instead of the pretrained one.
    """

    auto_class: ClassVar[Any]  # Transformers' AutoModel class
    fusions: ClassVar[tuple[str, ...]]  # kinds of connector fusion that it supports
    max_answers: ClassVar[int | None] = None  # maximum answers per row; None: no limit
    selects_tokens: ClassVar[bool] = False  # whether an adapter can act on some tokens only

    def __init__(
        self,
        *,
        pretrained: Name | None,
        config: Facts | None,
        weights: Literal["pretrained", "random", "meta"] = "pretrained",
        package: Name | None = None,
        chat_template: str | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto",
        quantization: Quantization = "none",
        generation: Literal["greedy", "checkpoint"] = "greedy",
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        added_tokens: list[Name] | None = None,
    ) -> None:
        super().__init__()
        check_quantization(quantization, weights=weights)
        self.chat_template, self.gradient_checkpointing = chat_template, gradient_checkpointing
        self.generation, self.adapted = generation, AdaptedTokens()
        implementation = "sdpa" if attention == "auto" else attention
        common = {"trust": trust_remote_code, "dtype": getattr(torch, dtype), "attention": implementation}
        if weights == "pretrained":
            self.model, self.tokenizer = load(
                self.auto_class, pretrained, package=package, quantization=quantization, **common
            )
        else:
            device = "meta" if weights == "meta" else "cpu"
            self.model = build(self.auto_class, config, pretrained=pretrained, device=device, **common)
            self.tokenizer = byte_tokenizer(without=added_tokens or ())
            rows, tokens = self.model.get_input_embeddings().num_embeddings, len(self.tokenizer)
            if rows < tokens:
                raise ValueError(
                    f"llm.config.vocab_size={rows} is less than the {tokens} tokens of the byte tokenizer; set it to "
                    f"at least {tokens}"
                )
        self.added_tokens: AddedTokens | None = None
        if added_tokens:
            self.added_tokens = AddedTokens(added_tokens, model=self.model, embed_rms=self.embed_rms)
            self.use_tokenizer(self.tokenizer)
        self.model.eval()
        if gradient_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        if attention == "auto":
            self.auto_attention()

    def use_tokenizer(self, tokenizer: Any) -> None:
        """Use a tokenizer, to which the added tokens are added."""
        self.tokenizer = tokenizer if self.added_tokens is None else self.added_tokens.add_to(tokenizer)

    def auto_attention(self) -> None:
        """Replace PyTorch's attention where there is a faster one for this model and machine."""

    @property
    def attention(self) -> str:
        """Transformers' name of the implementation in use."""
        return str(self.model.config._attn_implementation)

    @property
    def joins_rows(self) -> bool:
        """Whether a batch is faster as one row of several samples, which has no padding."""
        return False

    def train(self, mode: bool = True) -> LanguageModel:
        """Set the mode of the LoRA layers; the model itself stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        for layer in self._lora_layers().values():
            layer.train(mode)
        return self

    @property
    def width(self) -> int:
        return self.model.get_input_embeddings().weight.shape[1]

    @property
    def embed_rms(self) -> float:
        """Root mean square of the input embeddings: the scale for visual tokens; estimated on 4,096 rows."""
        table = self.model.get_input_embeddings().weight
        if table.is_meta:
            return 1.0
        ids = torch.linspace(0, len(table) - 1, 4096, device=table.device).long()
        with torch.no_grad():
            return float(self.embed(ids).float().square().mean().sqrt())

    @abstractmethod
    def layers(self) -> list[nn.Module]:
        """The transformer layers, in the order of computation."""

    @property
    def num_positions(self) -> int | None:
        """Largest number of tokens of a row, with its answer; None is no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def check_length(self, max_length: int) -> None:
        """Raise ValueError if `max_length` (`data.max_length`) exceeds the positions of the model, in tokens."""
        limit = self.num_positions
        if limit is not None and max_length > limit:
            raise ValueError(
                f"data.max_length={max_length}, but this llm has {limit} positions; "
                f"set data.max_length to at most {limit}"
            )

    @property
    def can_continue(self) -> bool:
        """Whether `continued` computes the beginning that rows share once."""
        return False

    @abstractmethod
    def check_packing(self) -> None:
        """Raise ValueError unless samples in one row are independent of each other."""

    def embed(self, ids: Int[Tensor, "*b"]) -> Float[Tensor, "*b d"]:
        """Input embeddings, with the scaling of the model."""
        return self.model.get_input_embeddings()(ids)

    @torch.no_grad()
    def generate(
        self,
        embeds: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "b t"],
        *,
        stop_ids: list[int],
        max_new_tokens: int,
        **options: Any,
    ) -> Int[Tensor, "b s"]:
        """The new ids. `options` are those of Transformers' `generate`; rows are left-padded.

        A beam search has no token to give to a `streamer` before its end.
        """
        with self.recomputing(False), self._generating():
            if (options.get("num_beams") or self.model.generation_config.num_beams or 1) > 1:
                options.pop("streamer", None)
            return self.model.generate(
                inputs_embeds=embeds,
                attention_mask=mask.long(),
                max_new_tokens=max_new_tokens,
                eos_token_id=stop_ids,
                pad_token_id=stop_ids[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id,
                **options,
            )

    @contextmanager
    def _generating(self) -> Iterator[None]:
        """Context in which the model has the generation config of the option `generation`, and counts the added tokens.

        A config passed to Transformers' `generate` would be completed from the checkpoint's.
        """
        published = self.model.generation_config
        if self.generation == "greedy":
            start = published.decoder_start_token_id
            start = getattr(self.model.config, "decoder_start_token_id", None) if start is None else start
            self.model.generation_config = GenerationConfig(do_sample=False, num_beams=1, decoder_start_token_id=start)
        counted = nullcontext() if self.added_tokens is None else self.added_tokens.counted(self.model.config)
        try:
            with counted:
                yield
        finally:
            self.model.generation_config = published

    def add_lora(
        self,
        *,
        r: Annotated[int, Range(1, 65_536)] = 16,
        alpha: Annotated[int, Range(1, 65_536)] = 32,
        dropout: RatioBelowOne = 0.05,
        target_modules: Name | Annotated[list[Name], Length(1)] = "all-linear",
        use_dora: bool = False,
        tokens: Tokens = "all",
    ) -> None:
        """Add a LoRA adapter (arXiv 2106.09685) to the linear layers in `target_modules`, in place.

        `target_modules` is a list of last parts of module names, or a regular expression for full names. `use_dora`
        also learns the magnitude of each weight vector (DoRA, arXiv 2402.09353). `tokens` are those that the adapter
        acts on (`AdaptedTokens`); then `adapted.where` must be set before each forward pass. Raises ValueError if a
        name or the expression matches no layer that LoRA supports.
        """
        from peft import LoraConfig, inject_adapter_in_model

        self._check_targets(target_modules)
        settings = LoraConfig(
            r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, use_dora=use_dora
        )
        inject_adapter_in_model(settings, self.model)
        self.adapted = AdaptedTokens(tokens)
        if tokens != "all":
            for layer in self._lora_layers().values():
                self.adapted.attach(layer)

    def _check_targets(self, target_modules: str | list[str]) -> None:
        """Raise ValueError for a name that matches no layer (PEFT ignores it) or an unsupported layer."""
        if target_modules == "all-linear":
            return
        modules = dict(self.model.named_modules())
        if isinstance(target_modules, str):
            try:
                found = {target_modules: [name for name in modules if re.fullmatch(target_modules, name)]}
            except re.error as error:
                raise ValueError(
                    f"stage.lora.target_modules={target_modules!r} is not a regular expression ({error}); give one "
                    "that matches names in full, or a list of last parts of names such as [q_proj,v_proj]"
                ) from error
        else:
            found = {
                target: [name for name in modules if name == target or name.endswith(f".{target}")]
                for target in target_modules
            }
        adaptable = {name for name, module in modules.items() if isinstance(module, ADAPTABLE)}
        known = ", ".join(sorted({name.rpartition(".")[2] for name in adaptable}))
        for target, names in found.items():
            if not names:
                raise ValueError(
                    f"stage.lora.target_modules: {target!r} matches no layer of this llm; its layers are {known}"
                )
            if unsupported := next((name for name in names if name not in adaptable), None):
                raise ValueError(
                    f"stage.lora.target_modules: {target!r} matches {unsupported!r}, a "
                    f"{type(modules[unsupported]).__name__}, which cannot have an adapter; choose from {known}"
                )

    def adapt_to(self, batch: Batch) -> None:
        """Have the adapter act on its tokens of a batch, in the forward pass that follows."""
        self.adapted.where = self.adapted.of(batch)

    def merge_lora(self) -> None:
        """Merge the LoRA weights into their base layers and remove the adapter.

        Raises ValueError if the adapter acts on some tokens only.
        """
        if self.adapted.tokens != "all":
            raise ValueError(
                f"an adapter with stage.lora.tokens={self.adapted.tokens} cannot be merged, because merged weights act "
                "on all tokens: use the run as it is"
            )
        for name, module in self._lora_layers().items():
            module.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, module.get_base_layer())

    def _lora_layers(self) -> dict[str, Any]:
        """The LoRA layers by name."""
        return {name: module for name, module in self.model.named_modules() if hasattr(module, "base_layer")}

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Context in which the LLM computes as before `add_lora`; without an adapter nothing changes."""
        layers = self._lora_layers().values()
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
            for parameter, flag in flags:  # changed by PEFT
                parameter.requires_grad_(flag)

    @contextmanager
    def select_logits(self, logits_mask: Tensor) -> Iterator[None]:
        """Context in which logits are computed only at `logits_mask`, which saves memory.

        Soft-capping and scaling of the logits still apply.
        """
        hook = self.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0][logits_mask],))
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def recomputing(self, on: bool) -> Iterator[None]:
        """Context in which layers are recomputed in the backward pass, if `on` and `gradient_checkpointing`.

        Transformers recomputes a layer if the layer itself is in training mode; such a layer has no KV cache.
        """
        modes = [(layer, layer.training) for layer in self.layers()]
        for layer, _ in modes:
            layer.training = on and self.gradient_checkpointing
        try:
            yield
        finally:
            for layer, mode in modes:
                layer.training = mode
