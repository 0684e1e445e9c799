"""A vision-language model of an encoder, a connector and an LLM for Transformers; it belongs to the weights beside it.

Load it with `AutoModelForImageTextToText.from_pretrained(<folder>, trust_remote_code=True)`.

Axes: B rows, T tokens per row, N images, K visual tokens per image, D LLM width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel

# An exported folder names the classes of its run here (vlm.exchange.own).
from vlm.connectors.mlp import MLP as Connector
from vlm.encoders.hf import HFEncoder as Encoder


class VLMConfig(PreTrainedConfig):
    """The arguments of the parts; `image_token_id` may lie beyond the rows of the LLM's vocabulary.

    `adapter` is a LoRA that acts on some `tokens` only: its `r`, its `scale`, and the names and sizes of its `layers`.
    """

    model_type = "vlm_template"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        encoder: dict[str, Any] | None = None,
        connector: dict[str, Any] | None = None,
        text_config: Any = None,
        image_token_id: int = 0,
        adapter: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.adapter = adapter
        self.encoder, self.connector, self.image_token_id = encoder or {}, connector or {}, image_token_id
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config or AutoConfig.for_model("llama")
        super().__init__(**options)


class Adapter(nn.Module):
    """A LoRA (arXiv 2106.09685) beside one layer of the LLM.

    It acts on the tokens of `where` [B,T], which are those of the prompt; a later token is as the last of them.
    """

    def __init__(self, layer: nn.Module, in_features: int, out_features: int, *, r: int, scale: float) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, r, bias=False)
        self.up = nn.Linear(r, out_features, bias=False)
        self.scale, self.where = scale, torch.empty(0)
        layer.register_forward_hook(self._add)

    def _add(self, _: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        low = self.down(inputs[0])  # B T r
        where = self.where[:, -low.shape[1] :, None].to(low.dtype)
        return output + self.scale * self.up(low * where)  # B T ·


class VLMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Visual tokens take the places of the image tokens among the LLM's input embeddings."""

    config_class = VLMConfig
    input_modalities = ("image", "text")  # type: ignore[assignment]
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: VLMConfig) -> None:
        super().__init__(config)
        with torch.device("cpu"):  # not all encoders can be built without memory
            self.encoder = Encoder(**config.encoder, weights="random")
            self.connector = Connector(**config.connector)
        for module in (*self.encoder.modules(), *self.connector.modules()):
            module._non_persistent_buffers_set.clear()  # the weights have all buffers; Transformers would empty some
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        facts = config.adapter or {"layers": []}
        self.adapters = nn.ModuleList(
            Adapter(self.language_model.get_submodule(name), *sizes, r=facts["r"], scale=facts["scale"])
            for name, *sizes in facts["layers"]
        )
        self.post_init()

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        return self.language_model.get_output_embeddings()

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> Tensor:
        """pixel_values [N,3,H,W] -> visual tokens [N,K,D]."""
        return self.connector(self.encoder(pixel_values))  # N K D

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **options: Any,
    ) -> Any:
        if inputs_embeds is None:
            assert input_ids is not None
            is_image = input_ids == self.config.image_token_id  # B T
            past = options.get("past_key_values")
            if past is None or past.get_seq_length() == 0:
                self._adapt_to(is_image)
            table = self.get_input_embeddings()
            inputs_embeds = table(input_ids.clamp(max=table.num_embeddings - 1))  # B T D
            if pixel_values is not None and bool(is_image.any()):  # false for tokens after the prompt
                visual = self.get_image_features(pixel_values)  # N K D
                if int(is_image.sum()) != visual.shape[0] * visual.shape[1]:
                    raise ValueError(
                        f"the text has {int(is_image.sum())} image tokens, but {visual.shape[0]} images have "
                        f"{visual.shape[1]} each; write one <image> for each image"
                    )
                inputs_embeds = inputs_embeds.masked_scatter(is_image[..., None], visual.to(inputs_embeds.dtype))
        return self.language_model(inputs_embeds=inputs_embeds, **options)  # B T V

    def _adapt_to(self, is_image: Tensor) -> None:
        """Have the adapter act on its tokens of these rows [B,T]."""
        after = self.adapters and self.config.adapter["tokens"] == "after_image"
        for adapter in self.adapters:
            adapter.where = is_image.cumsum(1) > 0 if after else is_image
