"""vlm-import of LAVIS' BLIP-2: a Q-Former under the authors' names computes as Transformers' with the same weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.blip2 import captioner
from tests.helpers.exchange import import_
from tests.helpers.programs import weights
from vlm import build, config
from vlm.exchange.from_lavis import read_qformer
from vlm.training import artifact

PARTS = ["encoder=tiny", "encoder.model_args={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}"]
PARTS = [*PARTS, "llm=tiny", "llm.config.hidden_size=32", "connector.num_heads=2"]  # heads of 8, where BERT has 64


def lavis(name: str) -> str:
    """The name in LAVIS, by the conversion script that Transformers had for BLIP-2, backwards."""
    name = name.replace("qformer.layernorm.", "Qformer.bert.embeddings.LayerNorm.")
    name = re.sub(r"^qformer\.", "Qformer.bert.", name)
    name = name.replace("attention.attention.", "attention.self.")
    name = name.replace("vision_model.post_layernorm.", "ln_vision.")
    return name.replace("language_projection.", "opt_proj.")


@pytest.mark.parametrize("stage", [pytest.param("first", marks=pytest.mark.slow), "second"])
def test_the_qformer_computes_as_transformers_does(tmp_path: Path, stage: str) -> None:
    reference = captioner(tmp_path / "theirs")
    parts = ("qformer.", "query_tokens", "vision_model.post_layernorm.", "language_projection.")
    state: dict[str, Tensor] = {lavis(n): t for n, t in reference.state_dict().items() if n.startswith(parts)}
    others = ("visual_encoder.cls_token", "Qformer.bert.embeddings.position_ids", "opt_model.model.decoder.x", "temp")
    state |= {name: torch.zeros(1) for name in others}
    if stage == "first":
        state = {name: tensor for name, tensor in state.items() if not name.startswith("opt_")}
    torch.save({"model": state}, tmp_path / "blip2.pth")
    run = tmp_path / "run"
    assert import_(tmp_path / "blip2.pth", f"out={run}", *PARTS) == 0
    settings, _ = config.read_config(run)
    model, manifest = build.build_model(settings)
    artifact.load(run, model=model, manifest=manifest)
    features = torch.randn(2, 64, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        normed = reference.vision_model.post_layernorm(features)
        queries = reference.query_tokens.expand(2, -1, -1)
        expected = reference.qformer(query_embeds=queries, encoder_hidden_states=normed)[0]
        connector = model.get_submodule("connector").eval()
        torch.testing.assert_close(connector.hidden_states(features), expected, atol=1e-5, rtol=0)
        if stage == "second":
            projected = reference.language_projection(expected)
            torch.testing.assert_close(connector(features), projected, atol=1e-5, rtol=0)
    assert weights(run)["connector.project.weight"].shape == (32, 16)


def test_published_names_and_shapes() -> None:
    """BLIP-2's: 12 blocks of width 768, of which every second attends to features of width 1408; 32 queries."""
    block = {
        **{f"attention.self.{kind}.weight": (768, 768) for kind in ("query", "key", "value")},
        "attention.output.dense.weight": (768, 768),
        "attention.output.LayerNorm.weight": (768,),
        "intermediate.dense.weight": (3072, 768),
        "output.dense.weight": (768, 3072),
        "output.LayerNorm.weight": (768,),
        "intermediate_query.dense.weight": (3072, 768),
        "output_query.dense.weight": (768, 3072),
        "output_query.LayerNorm.weight": (768,),
    }
    cross = {"query": (768, 768), "key": (768, 1408), "value": (768, 1408)}
    shapes = {"query_tokens": (1, 32, 768), "ln_vision.weight": (1408,), "vision_proj.weight": (256, 768), "temp": ()}
    shapes |= {"Qformer.bert.embeddings.word_embeddings.weight": (30523, 768)}
    shapes |= {"Qformer.bert.embeddings.position_embeddings.weight": (512, 768)}
    shapes |= {f"Qformer.bert.encoder.layer.{n}.{name}": shape for n in range(12) for name, shape in block.items()}
    for number in range(0, 12, 2):
        prefix = f"Qformer.bert.encoder.layer.{number}.crossattention"
        shapes |= {f"{prefix}.self.{kind}.weight": shape for kind, shape in cross.items()}
    imported = read_qformer({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert imported.options == {
        "connector": "qformer",
        "connector.position": False,
        "connector.norm": True,
        "connector.text": True,
        "connector.num_queries": 32,
        "connector.width": 768,
        "connector.num_heads": 12,
        "connector.depth": 12,
        "connector.cross_attention_every": 2,
    }
    assert imported.tensors["connector.queries"].shape == (32, 768)
    assert len(imported.tensors) == len(shapes) - 2  # the heads of the first stage
    with pytest.raises(ValueError, match=r"^'Qformer.other' is not a tensor of BLIP-2's Q-Former as LAVIS names it$"):
        read_qformer({"query_tokens": torch.zeros(1, 1, 1), "Qformer.other": torch.zeros(1)})
