"""vlm-import of OpenFlamingo: a connector under the authors' names computes as their formulas with the same weights."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.helpers.exchange import import_
from tests.helpers.parts import IMAGE, make_batch, pictures
from tests.helpers.programs import weights
from vlm import build, config
from vlm.exchange.from_open_flamingo import read_flamingo
from vlm.training import artifact

WIDTH, VISUAL, HEADS, HEAD_DIM, LATENTS = 32, 24, 2, 64, 3
INNER = HEADS * HEAD_DIM
FIRST = 272  # id of <|endofchunk|>: after the byte tokenizer's, without the one that it has
PARTS = ["encoder=tiny", f"encoder.model_args={{patch_size: 8, embed_dim: {VISUAL}, depth: 2, num_heads: 2}}"]
PARTS += ["llm=tiny", f"llm.config.hidden_size={WIDTH}", "llm.config.num_hidden_layers=4"]


def shapes(
    *, layers: list[int], prefix: str, depth: int, sizes: tuple[int, int, int, int], rows: int
) -> dict[str, Any]:
    """The names and shapes of a checkpoint with blocks before these layers."""
    width, visual, inner, latents = sizes

    def norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (size,), f"{name}.bias": (size,)}

    found: dict[str, Any] = {"perceiver.latents": (latents, visual), **norm("perceiver.norm", visual)}
    for number in range(depth):
        attention, feed = f"perceiver.layers.{number}.0", f"perceiver.layers.{number}.1"
        found |= norm(f"{attention}.norm_media", visual) | norm(f"{attention}.norm_latents", visual)
        found |= norm(f"{feed}.0", visual)
        found |= {f"{attention}.to_q.weight": (inner, visual), f"{attention}.to_kv.weight": (2 * inner, visual)}
        found |= {f"{attention}.to_out.weight": (visual, inner)}
        found |= {f"{feed}.1.weight": (4 * visual, visual), f"{feed}.3.weight": (visual, 4 * visual)}
    for layer in layers:
        block = f"lang_encoder.{prefix}.{layer}.gated_cross_attn_layer"
        found |= norm(f"{block}.attn.norm", width) | norm(f"{block}.ff.0", width)
        found |= {f"{block}.attn.to_q.weight": (inner, width), f"{block}.attn.to_kv.weight": (2 * inner, visual)}
        found |= {f"{block}.attn.to_out.weight": (width, inner)}
        found |= {f"{block}.ff.1.weight": (4 * width, width), f"{block}.ff.3.weight": (width, 4 * width)}
        found |= {f"{block}.attn_gate": (1,), f"{block}.ff_gate": (1,)}
    return {**found, "lang_encoder.transformer.wte.weight": (rows, width)}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    sizes = (WIDTH, VISUAL, INNER, LATENTS)
    found = shapes(layers=[1, 3], prefix="transformer.blocks", depth=2, sizes=sizes, rows=FIRST + 3)
    return {name: torch.randn(shape) * (0.5 if len(shape) == 1 else shape[-1] ** -0.5) for name, shape in found.items()}


def attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Of the authors' helpers.py: heads first, a scale of head_dim^-½, a mask, softmax, heads joined."""
    q, k, v = (x.view(len(x), HEADS, HEAD_DIM).transpose(0, 1) for x in (q, k, v))
    similarity = q @ k.mT / math.sqrt(HEAD_DIM)
    if allowed is not None:
        similarity = similarity.masked_fill(~allowed, -torch.finfo(similarity.dtype).max)
    return (similarity.softmax(-1) @ v).transpose(0, 1).flatten(1)


def norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def feed_forward(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    inner = F.gelu(norm(state, f"{name}.0", x) @ state[f"{name}.1.weight"].T)
    return inner @ state[f"{name}.3.weight"].T


def perceiver(state: dict[str, Tensor], features: Tensor) -> Tensor:
    """One image: features [P,Dv] -> latents [K,Dv]."""
    latents = state["perceiver.latents"]
    for number in range(2):
        name = f"perceiver.layers.{number}"
        normed = norm(state, f"{name}.0.norm_latents", latents)
        both = torch.cat([norm(state, f"{name}.0.norm_media", features), normed])
        k, v = (both @ state[f"{name}.0.to_kv.weight"].T).chunk(2, -1)
        found = attention(normed @ state[f"{name}.0.to_q.weight"].T, k, v)
        latents = latents + found @ state[f"{name}.0.to_out.weight"].T
        latents = latents + feed_forward(state, f"{name}.1", latents)
    return norm(state, "perceiver.norm", latents)


def gated(state: dict[str, Tensor], layer: int, hidden: Tensor, media: Tensor, locations: Tensor) -> Tensor:
    """One row: hidden [T,D] with images [I,K,Dv] at `locations` [T]."""
    name = f"lang_encoder.transformer.blocks.{layer}.gated_cross_attn_layer"
    text_time, image_time = locations.cumsum(0), torch.arange(1, len(media) + 1).repeat_interleave(LATENTS)
    k, v = (media.flatten(0, 1) @ state[f"{name}.attn.to_kv.weight"].T).chunk(2, -1)
    q = norm(state, f"{name}.attn.norm", hidden) @ state[f"{name}.attn.to_q.weight"].T
    found = attention(q, k, v, text_time[:, None] == image_time) * (text_time > 0)[:, None]
    hidden = hidden + found @ state[f"{name}.attn.to_out.weight"].T * state[f"{name}.attn_gate"].tanh()
    return hidden + feed_forward(state, f"{name}.ff", hidden) * state[f"{name}.ff_gate"].tanh()


def test_the_connector_computes_as_published(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"model_state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "f.pt")
    run = tmp_path / "run"
    assert import_(tmp_path / "f.pt", f"out={run}", *PARTS) == 0
    settings, _ = config.read_config(run)
    model: Any
    model, manifest = build.build_model(settings)
    artifact.load(run, model=model, manifest=manifest)
    model.eval()
    image_id, end_id = FIRST + 1, FIRST
    batch = make_batch(([11, IMAGE, image_id, 12, end_id, IMAGE, image_id, 13], [14, end_id]), num_tokens=0)
    layers, seen = model.llm.layers(), {}
    for number in (1, 3):
        layers[number].register_forward_pre_hook(
            lambda _, args, number=number: seen.setdefault(number, [args[0]]) and None, prepend=True
        )
        layers[number].register_forward_pre_hook(lambda _, args, number=number: seen[number].append(args[0]) and None)
    side = model.encoder.image_size
    batch = torch.utils._pytree.tree_map(lambda x: x, batch)
    images = torch.stack(pictures(2))
    images = F.interpolate(images, size=side)
    with torch.no_grad():
        features = model.encoder(images)
        visual = model.connector(features)
        expected = torch.stack([perceiver(state, each) for each in features])
        torch.testing.assert_close(visual, expected, rtol=0, atol=1e-5)
        embeds = model.llm.embed(batch.input_ids)
        with model.connector.attending_to(visual, batch):
            model.llm(embeds, batch.attention_mask, batch.position_ids, batch.logits_mask)
        locations = batch.input_ids[0] == image_id
        for number in (1, 3):
            before, after = seen[number]
            torch.testing.assert_close(
                after[0], gated(state, number, before[0], expected, locations), rtol=0, atol=1e-5
            )
    table = state["lang_encoder.transformer.wte.weight"]
    assert torch.equal(embeds[0, 1], table[image_id])
    assert torch.equal(embeds[0, 3], table[end_id])
    assert torch.equal(weights(run)["llm.added_tokens.output"], table[FIRST : FIRST + 2])


def test_published_names_and_shapes() -> None:
    """Of OpenFlamingo 4B, with RedPajama 3B, whose blocks are before every second of 32 layers."""
    sizes = (2560, 1024, 512, 64)
    given = shapes(layers=[*range(1, 32, 2)], prefix="gpt_neox.layers", depth=6, sizes=sizes, rows=50280)
    given["lang_encoder.gpt_neox.embed_in.weight"] = given.pop("lang_encoder.transformer.wte.weight")
    tensors = {name: torch.empty(shape, device="meta") for name, shape in given.items()}
    found = read_flamingo(tensors)
    assert {key: value for key, value in found.options.items() if key.startswith("connector")} == {
        "connector": "flamingo",
        "connector.every": 2,
        "connector.image_token": "<image>",
        "connector.num_queries": 64,
        "connector.depth": 6,
        "connector.num_heads": 8,
        "connector.ff_mult": 4,
    }
    assert found.options["llm.added_tokens"] == ["<|endofchunk|>", "<image>"]
    assert found.keeps_first == ("llm.added_tokens.output",)
    assert len(found.tensors) == len(given) + 6 + 16  # keys and values are two matrices
    other = {
        re.sub(r"gpt_neox\.layers\.(\d+)\.gated_cross_attn_layer", r"gated_cross_attn_layers.\1", n): t
        for n, t in tensors.items()
    }
    assert read_flamingo(other).tensors.keys() == found.tensors.keys()
    with pytest.raises(
        ValueError, match=r"^'perceiver.frame_embs' is not a tensor of OpenFlamingo's resampler, gated "
    ):
        read_flamingo({**tensors, "perceiver.frame_embs": torch.zeros(1)})
