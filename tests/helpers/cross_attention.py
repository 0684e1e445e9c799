"""A model whose LLM's layers attend to the image."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.helpers.connectors import connect
from tests.helpers.parts import tiny_encoder, tiny_llm
from vlm.connectors.cross_attention import GATE_SCALE
from vlm.models.composed import Composed

SIZES: dict[str, Any] = {"num_queries": 3, "depth": 1, "num_heads": 2, "head_dim": 8, "ff_mult": 2}


def attending(*, gate: float = 0.0, llm: Any = None, every: int = 1, **options: Any) -> Composed:
    """A model whose gates stand at `gate`."""
    encoder, llm = tiny_encoder(), llm or tiny_llm(num_hidden_layers=3)
    torch.manual_seed(3)
    connector = connect("cross_attention", encoder, llm, **{**SIZES, **options}, every=every)
    model = Composed(encoder=encoder, connector=connector, llm=llm)
    for name, parameter in connector.named_parameters():
        if name.endswith("_gate"):
            nn.init.constant_(parameter, gate / GATE_SCALE)
    return model
