"""Small random BLIP-2 models of Transformers, and ours with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
)

from tests.helpers.parts import FACTS, IMAGE, SIDE, VOCABULARY
from vlm.connectors.qformer import QFormer
from vlm.connectors.qformer_weights import TEXT_VOCABULARY, to_blip2
from vlm.models.composed import Composed
from vlm.objectives.language_modeling import LanguageModeling
from vlm.schema import Batch

SIZES: dict[str, Any] = {"vision_width": 24, "llm_width": 32, "grid": (1, 5), "output_rms": 0.7}
TINY: dict[str, Any] = {**SIZES, "num_queries": 4, "depth": 3, "width": 16, "num_heads": 2}


THEIRS: dict[str, Any] = {
    "vocab_size": TEXT_VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "encoder_hidden_size": 24,
}


VISION = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": SIDE // 2,
    "initializer_range": 0.2,
}


OPT = {
    "model_type": "opt",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 256,
    "init_std": 0.2,
}


IMAGE_ID = VOCABULARY - 1


def shaken(model: nn.Module, seed: int = 0) -> Any:
    """The model in evaluation mode, no two of its parameters alike: not even biases or norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def bare(folder: Path, **changes: Any) -> Blip2QFormerModel:
    model = shaken(Blip2QFormerModel(Blip2QFormerConfig(**THEIRS, **changes)))
    model.save_pretrained(folder)
    return model


def retrieval(folder: Path) -> Blip2ForImageTextRetrieval:
    """A BLIP-2 of the first stage, with its text path."""
    config = Blip2Config(
        qformer_config={**THEIRS, "use_qformer_text_input": True},
        vision_config=VISION,
        text_config=OPT,
        num_query_tokens=4,
        image_token_index=None,
    )
    model = shaken(Blip2ForImageTextRetrieval(config))
    model.save_pretrained(folder)
    return model


def instructed(folder: Path) -> InstructBlipForConditionalGeneration:
    """An InstructBLIP, whose Q-Former reads the question, with a Llama."""
    config = InstructBlipConfig(
        qformer_config=THEIRS,
        vision_config=VISION,
        text_config={"model_type": "llama", **FACTS},
        num_query_tokens=4,
        image_token_index=IMAGE_ID,
    )
    model = shaken(InstructBlipForConditionalGeneration(config))
    model.save_pretrained(folder)
    return model


def captioner(folder: Path, llm: dict[str, Any] = OPT) -> Blip2ForConditionalGeneration:
    """A BLIP-2 of the second stage, with its LLM."""
    config = Blip2Config(
        qformer_config=THEIRS, vision_config=VISION, text_config=llm, num_query_tokens=4, image_token_index=IMAGE_ID
    )
    model = shaken(Blip2ForConditionalGeneration(config))
    model.save_pretrained(folder)
    return model


def start(folder: Path, init: Any = "blip2", **changes: Any) -> Any:
    return QFormer(**{**TINY, "position": False, "init": init, "init_from": str(folder), **changes})


class Eye(nn.Module):
    """BLIP-2's own encoder up to its last norm, class token and all."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor) -> Tensor:
        return self.tower(pixels, output_hidden_states=True).hidden_states[-1]


def twin(reference: Blip2ForConditionalGeneration, folder: Path, llm: Any) -> Composed:
    """Ours with the same weights; of both, the Q-Former learns."""
    reference.requires_grad_(False)
    for part in (reference.qformer, reference.language_projection, reference.vision_model.post_layernorm):
        part.requires_grad_(True)
    reference.query_tokens.requires_grad_(True)
    llm.model.load_state_dict(reference.language_model.state_dict())
    connector = start(folder, init_projection=True)
    ours = Composed(encoder=Eye(reference.vision_model), connector=connector, llm=llm.requires_grad_(False))
    return ours.eval()


def question(batch: Batch) -> dict[str, Tensor]:
    """The images and texts of a batch as Transformers takes them."""
    ids = batch.input_ids.masked_fill(batch.image_mask, IMAGE_ID)
    return {"pixel_values": batch.pixel_values, "input_ids": ids, "attention_mask": batch.attention_mask.long()}


ROWS = (([IMAGE, 5, 6], [7, 8, 9]), ([3, IMAGE, 4, IMAGE], [10, 11]), ([12, 13], [14]))  # one, two and no picture


def assert_learns_alike(reference: Any, ours: Composed, batch: Batch, theirs: Tensor) -> None:
    """The loss of ours is `theirs`, the reference's own, and so are the gradients of the Q-Former."""
    output = LanguageModeling()(ours, batch)
    loss = output.sums["lm_loss"] / output.counts["lm_loss"]
    torch.testing.assert_close(loss, theirs, atol=1e-5, rtol=0)
    loss.backward()
    theirs.backward()
    gradients = to_blip2({name: parameter.grad for name, parameter in ours.connector.named_parameters()})
    expected = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
    assert gradients.keys() == expected.keys()
    # Gradients of up to 1 summed over a batch in another order: their size counts beside the 1e-5.
    torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-4)
