"""Tiny parts and batches for tests: a two-block eye, a two-layer LLM, rows of token ids with or without pictures."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.helpers.connectors import connect
from vlm.data.collate import Row, collate
from vlm.encoders.timm import TimmEncoder
from vlm.evaluation.visual_gain import VisualGain
from vlm.llms.causal import CausalLM
from vlm.models.composed import Composed
from vlm.module import VLMModule
from vlm.objectives.language_modeling import LanguageModeling
from vlm.schema import IGNORE, Batch, Message, Sample, VisualSpec
from vlm.text.row import Encoded
from vlm.training.optim import set_trainable

IMAGE = None  # in a prompt: the place of the next image
SIDE, NUM_TOKENS, VOCABULARY = 16, 4, 320
SPEC = VisualSpec(num_tokens=NUM_TOKENS, image_size=(SIDE, SIDE), transform=lambda image: torch.zeros(3, SIDE, SIDE))
FACTS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # logits that differ
}
LORA = {"r": 2, "alpha": 4, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
STATES = {"encoder": "frozen", "connector": "full", "llm": "frozen"}


def tiny_llm(model_type: str = "llama", *, seed: int = 0, dtype: Any = "float32", **facts: Any) -> CausalLM:
    torch.manual_seed(seed)
    config = {"model_type": model_type, **FACTS, **facts}
    attention = "eager" if model_type == "gemma2" else "sdpa"  # it caps its attention logits, which sdpa cannot
    options: dict[str, Any] = {"weights": "random", "chat_template": "chatml", "attention": attention, "dtype": dtype}
    return CausalLM(pretrained=None, config=config, **options)


def tiny_encoder(*, seed: int = 1) -> TimmEncoder:
    torch.manual_seed(seed)
    small = {"patch_size": SIDE // 2, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return TimmEncoder(name="vit_tiny_patch16_224", weights="random", image_size=SIDE, model_args=small)


def tiny_model(*, llm: CausalLM | None = None, connector: nn.Module | None = None, seed: int = 2) -> Composed:
    encoder, llm = tiny_encoder(), llm or tiny_llm()
    torch.manual_seed(seed)
    return Composed(encoder=encoder, connector=connector or connect("mlp", encoder, llm), llm=llm)


class Gated(nn.Module):
    """The least connector with fusion "layers": adds the mean of a row's visual tokens, times a gate, to each layer."""

    fusion: ClassVar[str] = "layers"
    num_tokens = NUM_TOKENS

    def __init__(self, *, vision_width: int = 24, llm_width: int = 32) -> None:
        super().__init__()
        self.project = nn.Linear(vision_width, llm_width)
        self.gate = nn.Parameter(torch.zeros(()))
        self._seen: Tensor | None = None

    def forward(self, features: Tensor) -> Tensor:
        return self.project(features)  # N K D

    def attach(self, layers: Sequence[nn.Module]) -> None:
        def look(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            return None if self._seen is None else (args[0] + self.gate * self._seen, *args[1:])

        for layer in layers:
            layer.register_forward_pre_hook(look)

    @contextmanager
    def attending_to(self, visual: Tensor, batch: Batch) -> Any:
        rows = torch.repeat_interleave(torch.arange(len(batch.ids)), batch.num_images)
        sums = torch.zeros(len(batch.ids), visual.shape[2]).index_add(0, rows, visual.mean(1))
        self._seen = sums[:, None]  # B 1 D
        yield
        self._seen = None


def pictures(num: int, *, seed: int = 0) -> list[Tensor]:
    return list(torch.randn(num, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)))


def make_rows(
    *rows: tuple[list[int | None], list[int]],
    images: Sequence[Tensor] | None = None,
    num_tokens: int = NUM_TOKENS,
    first_id: int = 0,
    layouts: Sequence[Sequence[tuple[int, ...]]] | None = None,
) -> list[Row]:
    """Rows of (prompt, answer): the answer is supervised; `IMAGE` in the prompt takes the next of `images`.

    `layouts` are those of all images, where they are tiled: one `IMAGE` is one tile.
    """
    left = list(images if images is not None else pictures(sum(prompt.count(IMAGE) for prompt, _ in rows)))
    made = []
    for number, (prompt, answer) in enumerate(rows):
        ids, mask, before, labels = [], [], [], []
        seen = 0
        for token in [*prompt, *answer]:
            seen += token is IMAGE
            width = num_tokens if token is IMAGE else 1
            ids += [0 if token is IMAGE else token] * width
            mask += [token is IMAGE] * width
            before += [seen] * width
        labels = [IGNORE] * (len(ids) - len(answer)) + answer
        encoded = Encoded(input_ids=ids, image_mask=mask, images_before=before, labels=labels, text="")
        messages: list[Message] = [{"role": "user", "content": [{"type": "image"}] * seen}]
        sample = Sample(id=f"sample/{first_id + number}", images=[], messages=messages)
        of_row = list(layouts[number]) if layouts is not None else [(1,)] * seen
        made.append(Row([sample], [encoded], [left.pop(0) for _ in range(seen)], of_row))
    assert not left, "more images than places"
    return made


class Parts(Composed):
    """A model of the given parts, which cannot compute: for tests of what belongs to them."""

    def __init__(self, **parts: nn.Module) -> None:
        nn.Module.__init__(self)
        self.encoder, self.connector, self.llm = (parts.get(name, nn.Identity()) for name in Composed.parts)

    def blocks(self, part: str) -> list[nn.Module]:
        return list(self.encoder.blocks()) if part == "encoder" else []


def make_batch(*rows: tuple[list[int | None], list[int]], side: Any = "right", **options: Any) -> Batch:
    """A batch of `make_rows`."""
    return collate(make_rows(*rows, **options), spec=SPEC, pad_id=0, side=side)


def make_module(
    model: Composed | None = None, *, states: Any = None, objective: Any = None, **options: Any
) -> VLMModule:
    model = model or tiny_model()
    set_trainable(model, {**STATES, **(states or {})}, LORA)
    rates = {"encoder": 1e-3, "connector": 1e-3, "llm": 1e-3, "objective": 1e-3}
    evaluators = {"visual_gain": VisualGain()}
    objective = objective or LanguageModeling()
    return VLMModule(model=model, objective=objective, evaluators=evaluators, **{"lr": rates, **options})


def make_trainer(folder: Any, **options: Any) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    where = {"accelerator": "cpu", "devices": 1, "default_root_dir": str(folder), "num_sanity_val_steps": 0}
    return pl.Trainer(**{**quiet, **where, "log_every_n_steps": 1, "max_steps": 1, **options})


IMAGES = pictures(4)


ROWS = (
    ([11, IMAGE, 12], [21]),
    ([13, IMAGE], [22, 23]),
    ([IMAGE, 14], [24, 25, 26, 27, 28]),
    ([15, IMAGE, 16], [29, 30, 31, 32]),
)


HALVES = (make_batch(*ROWS[:2], images=IMAGES[:2]), make_batch(*ROWS[2:], images=IMAGES[2:], first_id=2))
WHOLE = make_batch(*ROWS, images=IMAGES)


def loader(batches: list[Batch]) -> DataLoader:
    return DataLoader(batches, batch_size=None)


def mean_loss(model: Any, batch: Batch) -> float:
    with torch.no_grad():
        output = LanguageModeling()(model, batch)
    return output.sums["lm_loss"].item() / output.counts["lm_loss"]


EVERY = {"val_check_interval": 1, "check_val_every_n_epoch": None}


CONNECTOR = {
    "connector.norm.weight",
    "connector.norm.bias",
    "connector.layers.0.weight",
    "connector.layers.0.bias",
    "connector.layers.1.weight",
    "connector.layers.1.bias",
    "connector.position",
}


ADAPTER = {
    f"llm.model.model.layers.{layer}.self_attn.{matrix}.lora_{side}.default.weight"
    for layer in (0, 1)
    for matrix in ("q_proj", "v_proj")
    for side in "AB"
}


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


PARTS = {
    "connector": {"_target_": "vlm.connectors.mlp.MLP", "depth": 2},
    "encoder": {
        "layer": -1,
        "image_size": [16, 16],
        "transform": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize": "squash"},
        "tiles": {"grids": []},
    },
}
