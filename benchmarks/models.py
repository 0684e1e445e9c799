"""The model of the speed benchmarks with random weights, here and in Transformers.

On a CPU it is CLIP-B/16 at 224 pixels, an MLP and SmolLM2-135M, on a GPU CLIP-L/14 at 336 pixels and TinyLlama-1.1B.
Both compute in the precision that `trainer.precision=auto` has on this machine.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlm.connectors.mlp import MLP
from vlm.encoders.hf import HFEncoder
from vlm.llms.causal import CausalLM
from vlm.models.composed import Composed
from vlm.training.optim import cast_frozen, set_trainable
from vlm.training.run import native_precision

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
PRECISION = native_precision("auto")
BF16 = PRECISION == "bf16-mixed"
SIDE, PATCH = (336, 14) if ON_GPU else (224, 16)
NUM_VISUAL, IMAGE_ID, PAD_ID = (SIDE // PATCH) ** 2, 31_999 if ON_GPU else 49_151, 0
VISION: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": SIDE,
    "patch_size": PATCH,
    "hidden_act": "quick_gelu",
}
LLM: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1.0e-5,
    "tie_word_embeddings": True,
    "pad_token_id": PAD_ID,
}
if ON_GPU:
    VISION |= {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "projection_dim": 768,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    LLM |= {
        "vocab_size": 32_000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    }
LORA = {"r": 16, "alpha": 32, "dropout": 0.0}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def autocast() -> torch.autocast:
    """Context in which products have the precision of the benchmarks."""
    return torch.autocast(DEVICE, torch.bfloat16, enabled=BF16)


def ours(*, lora: bool = False) -> Composed:
    """This project's model, with the parts of a stage trainable; in bf16-mixed, frozen weights are in bfloat16."""
    torch.manual_seed(0)
    encoder = HFEncoder(pretrained="random", config=VISION, weights="random", layer=-2, mean=[0.5] * 3, std=[0.5] * 3)
    llm = CausalLM(pretrained=None, config=LLM, weights="random", dtype="bfloat16" if BF16 else "float32")
    sizes: dict[str, Any] = {"vision_width": encoder.width, "grid": encoder.grid, "llm_width": llm.width}
    connector = MLP(**sizes, output_rms=llm.embed_rms, norm=False, position=False)
    model = Composed(encoder=encoder, connector=connector, llm=llm)
    states = {"encoder": "frozen", "connector": "full", "llm": "lora" if lora else "frozen"}
    set_trainable(model, states, LORA if lora else {})
    if BF16:
        cast_frozen(model, states)
    return model


def theirs(*, lora: bool = False) -> Any:
    """Transformers' LLaVA with the same weights, in the same precision, with the same trainable parameters."""
    mine = ours()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**LLM),
        image_token_index=IMAGE_ID,
        vision_feature_layer=-2,
        tie_word_embeddings=LLM["tie_word_embeddings"],
    )
    model = LlavaForConditionalGeneration(config)
    core = model.model
    core.vision_tower.load_state_dict(mine.encoder.tower.state_dict(), strict=False)  # LLaVA keeps an unused last block
    core.language_model.load_state_dict(mine.llm.model.model.state_dict())
    model.lm_head.load_state_dict(mine.llm.model.lm_head.state_dict())
    model.tie_weights()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16 if BF16 else torch.float32)
    linear = [layer for layer in mine.connector.modules() if isinstance(layer, torch.nn.Linear)]
    core.multi_modal_projector.float()
    for name, layer in zip(("linear_1", "linear_2"), linear, strict=True):
        getattr(core.multi_modal_projector, name).load_state_dict(layer.state_dict())
    model.requires_grad_(False)
    core.multi_modal_projector.requires_grad_(True)
    if lora:
        from peft import LoraConfig, inject_adapter_in_model

        settings = LoraConfig(r=LORA["r"], lora_alpha=LORA["alpha"], lora_dropout=0.0, target_modules=LINEAR)
        inject_adapter_in_model(settings, core.language_model)
        for name, parameter in core.language_model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(True)
                parameter.data = parameter.data.float()
    return model.to(DEVICE)
