"""A connector from a checkpoint of OpenFlamingo (Awadalla et al., arXiv 2308.01390), the authors' code."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from vlm.exchange.run_folder import Imported

HEAD_DIM = 64  # of all published models; the number of heads is in no tensor
TOKENS = ("<|endofchunk|>", "<image>")  # then comes <PAD>: the last three rows of the embeddings
EMBEDDINGS = re.compile(r"lang_encoder\..*(wte|embed_in|embed_tokens)\.weight")
GATED = re.compile(r"lang_encoder\.(?:gated_cross_attn_layers\.(\d+)|.+\.(\d+)\.gated_cross_attn_layer)\.(.+)")
RESAMPLER = re.compile(r"perceiver\.layers\.(\d+)\.(.+)")
OF_RESAMPLER = {
    "0.norm_media": "features_norm",
    "0.norm_latents": "latents_norm",
    "0.to_q": "q",
    "0.to_kv": "k v",
    "0.to_out": "out",
    "1.0": "ff_norm",
    "1.1": "ff_in",
    "1.3": "ff_out",
}
OF_BLOCK = {
    "attn.norm": "attention_norm",
    "attn.to_q": "q",
    "attn.to_kv": "k v",
    "attn.to_out": "out",
    "ff.0": "ff_norm",
    "ff.1": "ff_in",
    "ff.3": "ff_out",
}
GATES = {"attn_gate": "attention_gate", "ff_gate": "ff_gate"}
OTHERS = {"perceiver.latents": "queries", "perceiver.norm.weight": "norm.weight", "perceiver.norm.bias": "norm.bias"}


def is_open_flamingo(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of an OpenFlamingo."""
    return any("gated_cross_attn_layer" in name for name in state)


def read_flamingo(state: Mapping[str, Tensor]) -> Imported:
    """The tensors of the resampler, of the gated blocks, and of the two added tokens.

    The published LLMs with `wte` have one table for embeddings and logits. Of the others no output rows were trained,
    and those of the added tokens keep their first values. Raises ValueError for a tensor of another name.
    """
    state = {name.removeprefix("module."): tensor.float() for name, tensor in state.items()}
    layers = sorted({int(found[1] or found[2]) for name in state if (found := GATED.fullmatch(name))})
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in OTHERS:
            tensors[f"connector.resampler.{OTHERS[name]}"] = tensor
        elif found := RESAMPLER.fullmatch(name):
            tensors |= _named(name, tensor, f"connector.resampler.blocks.{found[1]}", found[2], OF_RESAMPLER)
        elif found := GATED.fullmatch(name):
            block = f"connector.blocks.{layers.index(int(found[1] or found[2]))}"
            tensors |= _named(name, tensor, block, found[3], OF_BLOCK)
        elif found := EMBEDDINGS.fullmatch(name):
            tensors["llm.added_tokens.input"] = tensor[-3:-1].clone()
            if found[1] == "wte":
                tensors["llm.added_tokens.output"] = tensor[-3:-1].clone()
        else:
            raise ValueError(f"{name!r:.80} is not a tensor of OpenFlamingo's resampler, gated blocks or embeddings")
    inner, width = tensors["connector.blocks.0.q.weight"].shape
    of_resampler = {found[1] for name in state if (found := RESAMPLER.fullmatch(name))}
    options = {
        "connector": "flamingo",
        "connector.every": layers[0] + 1,
        "connector.image_token": TOKENS[1],
        "connector.num_queries": len(tensors["connector.resampler.queries"]),
        "connector.depth": len(of_resampler),
        "connector.num_heads": max(1, inner // HEAD_DIM),
        "connector.ff_mult": len(tensors["connector.blocks.0.ff_in.weight"]) // width,
        "llm.chat_template": "flamingo",
        "llm.added_tokens": list(TOKENS),
        "stage.llm": {"only": ["added_tokens"]},
        "stage.lr.llm": 1e-4,
    }
    learned = "llm.added_tokens.output" in tensors
    return Imported(options, tensors, keeps_first=() if learned else ("llm.added_tokens.output",))


def _named(name: str, tensor: Tensor, ours: str, rest: str, names: Mapping[str, str]) -> dict[str, Tensor]:
    """A tensor under our name; keys and values, which are one matrix there, are two."""
    if rest in GATES and names is OF_BLOCK:
        return {f"{ours}.{GATES[rest]}": tensor}
    module, _, kind = rest.rpartition(".")
    if module not in names:
        raise ValueError(f"{name!r:.80} is not a tensor of OpenFlamingo's resampler, gated blocks or embeddings")
    own = names[module].split()
    return {f"{ours}.{each}.{kind}": part.clone() for each, part in zip(own, tensor.chunk(len(own)), strict=True)}
