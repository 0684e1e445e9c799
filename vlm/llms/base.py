"""What every language model of Transformers shares here: how it is built, embedded, adapted and recomputed."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

from vlm.llms.bytes import byte_tokenizer
from vlm.llms.loading import load, make
from vlm.llms.quantization import Quantization, check_quantization
from vlm.ranges import Facts, Length, Name, Range, RatioBelowOne

ADAPTABLE = (nn.Linear, nn.Embedding, Conv1D)  # what PEFT's LoRA stands beside


class LanguageModel(nn.Module, ABC):
    """The contract's common half; `forward` and `layers` are the subclass's.

    The model's own modules and state-dict keys stay as they are. It is always in evaluation mode and its dropout rates
    are zero; an adapter has a mode and a dropout of its own.

    Args:
        pretrained: hub id or local folder of the weights (safetensors).
        config: architecture facts (Transformers' names, with `model_type`), enough to build it with no network; None
            reads them from `pretrained`.
        weights: `pretrained` reads them, `random` draws them, `meta` allocates none.
        package: a Python package that carries the weights as a GGUF file; where it is installed, no network is needed.
        chat_template: name of a template of ours, or None for the tokenizer's own; the data renders with it.
        dtype: of the weights, `float32` or `bfloat16`.
        attention: Transformers' attention implementation.
        quantization: `int8` (LLM.int8(), arXiv 2208.07339) or `nf4` (QLoRA, arXiv 2305.14314) stores the weights of the
            linear layers so; on the meta device they count as they were published.
        generation: `greedy` answers with the likeliest token at every place; `checkpoint` as the generation config that
            comes with the weights says (sampling, beams, penalties).
        gradient_checkpointing: compute each layer again in the backward pass instead of keeping what it computed.
        trust_remote_code: run code that comes with the weights; off unless you trust its author.

    Without the pretrained weights there is no pretrained tokenizer: a byte tokenizer stands in.
    """

    auto_class: ClassVar[Any]  # Transformers' class that finds the architecture
    fusions: ClassVar[tuple[str, ...]]  # kinds of connector that it works with
    max_answers: ClassVar[int | None] = None  # to learn in a row; None: any number

    def __init__(
        self,
        *,
        pretrained: Name | None,
        config: Facts | None,
        weights: Literal["pretrained", "random", "meta"] = "pretrained",
        package: Name | None = None,
        chat_template: str | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa",
        quantization: Quantization = "none",
        generation: Literal["greedy", "checkpoint"] = "greedy",
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        check_quantization(quantization, weights=weights)
        self.chat_template, self.gradient_checkpointing = chat_template, gradient_checkpointing
        self.generation = generation
        common = {"trust": trust_remote_code, "dtype": getattr(torch, dtype), "attention": attention}
        if weights == "pretrained":
            self.model, self.tokenizer = load(
                self.auto_class, pretrained, package=package, quantization=quantization, **common
            )
        else:
            device = "meta" if weights == "meta" else "cpu"
            self.model = make(self.auto_class, config, pretrained=pretrained, device=device, **common)
            self.tokenizer = byte_tokenizer()
            rows, tokens = self.model.get_input_embeddings().num_embeddings, len(self.tokenizer)
            if rows < tokens:
                raise ValueError(
                    f"llm.config.vocab_size={rows} is less than the {tokens} tokens of the byte tokenizer; set it to "
                    f"{tokens} or more"
                )
        self.model.eval()
        if gradient_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})

    def train(self, mode: bool = True) -> LanguageModel:
        """Training mode, which is that of the adapter's layers alone."""
        super().train(mode)
        self.model.eval()
        for layer in self._adapted().values():
            layer.train(mode)
        return self

    @property
    def width(self) -> int:
        return self.model.get_input_embeddings().weight.shape[1]

    @property
    def embed_rms(self) -> float:
        """Root mean square of the input embeddings: the scale that visual tokens should have."""
        table = self.model.get_input_embeddings().weight
        if table.is_meta:
            return 1.0
        ids = torch.linspace(0, len(table) - 1, 4096, device=table.device).long()
        with torch.no_grad():
            return float(self.embed(ids).float().square().mean().sqrt())

    @abstractmethod
    def layers(self) -> list[nn.Module]:
        """The transformer layers, in the order of computation."""

    def check_length(self, max_length: int) -> None:
        """Raise ValueError where the model has no positions for `max_length` tokens, the option `data.max_length`."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and max_length > limit:
            raise ValueError(
                f"data.max_length={max_length}, but this llm has positions for {limit} tokens; "
                f"set data.max_length={limit} or less"
            )

    @abstractmethod
    def check_packing(self) -> None:
        """Raise ValueError unless samples that share a row leave each other alone."""

    def embed(self, ids: Int[Tensor, "*b"]) -> Float[Tensor, "*b d"]:
        """Input embeddings, with whatever scaling the model applies to them."""
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
        """New ids only, as the option `generation` and `options` (Transformers' own) say; rows are left-padded."""
        with self.recomputing(False), self._generating():
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
        """Within it the model has the generation config that the option `generation` asks for.

        One that is handed to Transformers' `generate` would be filled up from the checkpoint's.
        """
        published = self.model.generation_config
        if self.generation == "greedy":
            start = published.decoder_start_token_id
            start = getattr(self.model.config, "decoder_start_token_id", None) if start is None else start
            self.model.generation_config = GenerationConfig(do_sample=False, num_beams=1, decoder_start_token_id=start)
        try:
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
    ) -> None:
        """Put a low-rank adapter (LoRA, arXiv 2106.09685) beside the named linear layers, in place.

        `target_modules` lists last parts of names, or is a regular expression of names in full. `use_dora` learns the
        length of each weight vector apart from its direction (DoRA, arXiv 2402.09353). Raises ValueError where one of
        the names or the expression matches no layer that can be adapted.
        """
        from peft import LoraConfig, inject_adapter_in_model

        self._check_targets(target_modules)
        settings = LoraConfig(
            r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, use_dora=use_dora
        )
        inject_adapter_in_model(settings, self.model)

    def _check_targets(self, target_modules: str | list[str]) -> None:
        """Raise ValueError for a name that matches no layer, which PEFT ignores, or one that it cannot adapt."""
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
            if odd := next((name for name in names if name not in adaptable), None):
                raise ValueError(
                    f"stage.lora.target_modules: {target!r} matches {odd!r}, a {type(modules[odd]).__name__}, which "
                    f"cannot have an adapter; choose from {known}"
                )

    def merge_lora(self) -> None:
        """Add the adapter to the matrices that it stands beside, and take it away."""
        for name, module in self._adapted().items():
            module.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, module.get_base_layer())

    def _adapted(self) -> dict[str, Any]:
        """The layers of PEFT that stand in the place of those that they adapt, by name."""
        return {name: module for name, module in self.model.named_modules() if hasattr(module, "base_layer")}

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Within it the LLM is what it was before `add_lora`; one without an adapter stays as it is."""
        layers = self._adapted().values()
        trains = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
            for parameter, flag in trains:  # which PEFT has changed too
                parameter.requires_grad_(flag)

    @contextmanager
    def select_logits(self, logits_mask: Tensor) -> Iterator[None]:
        """Within it logits are computed at `logits_mask` alone: a vocabulary is far wider than hidden states.

        What the model does to its logits (soft-capping, scaling) still applies.
        """
        narrow = self.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0][logits_mask],))
        try:
            yield
        finally:
            narrow.remove()

    @contextmanager
    def recomputing(self, on: bool) -> Iterator[None]:
        """Within it layers are recomputed in the backward pass, if `on` and `gradient_checkpointing`.

        Transformers does so where a layer, its submodules aside, is in training mode; such a layer keeps no KV cache.
        """
        modes = [(layer, layer.training) for layer in self.layers()]
        for layer, _ in modes:
            layer.training = on and self.gradient_checkpointing
        try:
            yield
        finally:
            for layer, mode in modes:
                layer.training = mode
