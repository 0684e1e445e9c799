"""Q-Former weights in Transformers' names: BLIP-2's (arXiv 2301.12597) both ways, BERT's (arXiv 1810.04805) to read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

TEXT_VOCABULARY = 30_523  # the words of BERT (uncased), then [DEC], with which BLIP-2 begins a caption

BLIP2 = {
    "queries": "query_tokens",
    "feature_norm": "vision_model.post_layernorm",
    "words": "embeddings.word_embeddings",
    "word_positions": "embeddings.position_embeddings",
    "norm": "qformer.layernorm",
    "blocks.*.attention.query": "qformer.encoder.layer.*.attention.attention.query",
    "blocks.*.attention.key": "qformer.encoder.layer.*.attention.attention.key",
    "blocks.*.attention.value": "qformer.encoder.layer.*.attention.attention.value",
    "blocks.*.attention.out": "qformer.encoder.layer.*.attention.output.dense",
    "blocks.*.attention.norm": "qformer.encoder.layer.*.attention.output.LayerNorm",
    "blocks.*.cross.query": "qformer.encoder.layer.*.crossattention.attention.query",
    "blocks.*.cross.key": "qformer.encoder.layer.*.crossattention.attention.key",
    "blocks.*.cross.value": "qformer.encoder.layer.*.crossattention.attention.value",
    "blocks.*.cross.out": "qformer.encoder.layer.*.crossattention.output.dense",
    "blocks.*.cross.norm": "qformer.encoder.layer.*.crossattention.output.LayerNorm",
    "blocks.*.query_feed.up": "qformer.encoder.layer.*.intermediate_query.dense",
    "blocks.*.query_feed.down": "qformer.encoder.layer.*.output_query.dense",
    "blocks.*.query_feed.norm": "qformer.encoder.layer.*.output_query.LayerNorm",
    "blocks.*.text_feed.up": "qformer.encoder.layer.*.intermediate.dense",
    "blocks.*.text_feed.down": "qformer.encoder.layer.*.output.dense",
    "blocks.*.text_feed.norm": "qformer.encoder.layer.*.output.LayerNorm",
    "project": "language_projection",
}
BERT = {
    "words": "embeddings.word_embeddings",
    "word_positions": "embeddings.position_embeddings",
    "norm": "embeddings.LayerNorm",
    "blocks.*.attention.query": "encoder.layer.*.attention.self.query",
    "blocks.*.attention.key": "encoder.layer.*.attention.self.key",
    "blocks.*.attention.value": "encoder.layer.*.attention.self.value",
    "blocks.*.attention.out": "encoder.layer.*.attention.output.dense",
    "blocks.*.attention.norm": "encoder.layer.*.attention.output.LayerNorm",
    "blocks.*.query_feed.up": "encoder.layer.*.intermediate.dense",
    "blocks.*.query_feed.down": "encoder.layer.*.output.dense",
    "blocks.*.query_feed.norm": "encoder.layer.*.output.LayerNorm",
    "blocks.*.text_feed.up": "encoder.layer.*.intermediate.dense",
    "blocks.*.text_feed.down": "encoder.layer.*.output.dense",
    "blocks.*.text_feed.norm": "encoder.layer.*.output.LayerNorm",
}
REMEDIES = {  # by what is in our name, where a tensor is missing or of another shape; the first that fits
    "project": "set connector.init_projection=false",
    "text_feed": "set connector.text=false or choose a checkpoint with its text path",
    "word": "set connector.text=false or choose a checkpoint with its text path",
    "feature_norm": "choose the encoder that it was trained with, or another checkpoint",
    "cross": "choose the encoder that it was trained with, or another checkpoint",
    "": "choose another checkpoint",
}


def to_blip2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Q-Former's state dict in the names of Transformers' Blip2ForConditionalGeneration.

    The text embeddings are named as in its Blip2ForImageTextRetrieval. Raises ValueError for `position`.
    """
    if "position" in state:
        raise ValueError("a BLIP-2 has no place for the Q-Former's position; train with connector.position=false")
    return {
        theirs: state[ours][None] if ours == "queries" else state[ours] for ours, theirs in _names(state, BLIP2).items()
    }


def start_from_blip2(state: Mapping[str, Tensor], folder: str, *, num_heads: int, projection: bool) -> None:
    """Copy a Q-Former of Transformers into `state`, a module's own tensors; `position` keeps its values.

    A bare Blip2QFormerModel has the blocks and the norm before them; the rest then keeps its values too. Raises
    ValueError, with both numbers and the option to change, where the checkpoint does not fit.
    """
    checkpoint = _Checkpoint(folder)
    names = _names(state, BLIP2)
    if "layernorm.weight" in checkpoint.shapes:  # bare
        names = {o: t.removeprefix("qformer.") for o, t in names.items() if t.startswith("qformer.") or "project" in o}
    if not projection:
        names = {ours: theirs for ours, theirs in names.items() if not ours.startswith("project.")}
    checkpoint.check(state, names, num_heads=num_heads)
    for ours, theirs in names.items():
        tensor = checkpoint.read(theirs)
        _copy(state[ours], tensor[0] if ours == "queries" else tensor)


def start_from_bert(state: Mapping[str, Tensor], folder: str, *, num_heads: int) -> None:
    """Copy a BERT of Transformers into `state`; queries, cross-attention and projection keep their values.

    Its feed-forward layers become those of the queries and of the text. The first of its token types, which it adds to
    every word, goes into the positions. Raises as `start_from_blip2`.
    """
    checkpoint = _Checkpoint(folder)
    root = "bert." if any(name.startswith("bert.") for name in checkpoint.shapes) else ""
    names = {ours: root + theirs for ours, theirs in _names(state, BERT).items()}
    checkpoint.check(state, names, num_heads=num_heads)
    for ours, theirs in names.items():
        tensor = checkpoint.read(theirs)
        if ours == "word_positions.weight":
            tensor = tensor + checkpoint.read(f"{root}embeddings.token_type_embeddings.weight")[0]
        _copy(state[ours], tensor)


def _names(state: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, str]:
    """Their names of those of our tensors that they have."""
    names = {}
    for ours in state:
        module, dot, kind = ours.rpartition(".")
        key = re.sub(r"\d+", "*", module) if dot else ours
        if key in table:
            block = "".join(re.findall(r"\d+", module))
            names[ours] = table[key].replace("*", block) + (f".{kind}" if dot else "")
    return names


def _copy(target: Tensor, tensor: Tensor) -> None:
    target[: len(tensor)].copy_(tensor)  # a vocabulary without [DEC] is one row short


class _Checkpoint:
    """The tensors in a folder's safetensors files, read one at a time: a BLIP-2 holds a whole LLM beside them."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.shapes: dict[str, list[int]] = {}
        self._files: dict[str, tuple[Path, str]] = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for stored in file.keys():  # noqa: SIM118, it is no dictionary
                    name = re.sub("gamma$", "weight", re.sub("beta$", "bias", stored))  # BERT's first release
                    self.shapes[name] = file.get_slice(stored).get_shape()
                    self._files[name] = (path, stored)
        if not self.shapes:
            raise ValueError(
                f"connector.init_from={folder} holds 0 tensors in files *.safetensors; download the checkpoint and set "
                "connector.init_from=<its folder>"
            )

    def read(self, name: str) -> Tensor:
        path, stored = self._files[name]
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(stored)

    def check(self, state: Mapping[str, Tensor], names: Mapping[str, str], *, num_heads: int) -> None:
        """Raise ValueError on the first difference between the checkpoint and what `names` says of `state`."""
        wanted = {theirs: [1] * (ours == "queries") + list(state[ours].shape) for ours, theirs in names.items()}
        layers = names["blocks.0.attention.query.weight"].partition("0.")[0]
        there, here = _facts(self.shapes, layers) | self._heads(), _facts(wanted, layers) | {"num_heads": num_heads}
        for option, value in there.items():
            if here.get(option, value) != value:
                raise ValueError(
                    f"connector.init_from={self.folder} has {option}={value}, here it is {here[option]}; "
                    f"set connector.{option}={value}"
                )
        missing = [theirs for theirs in wanted if theirs not in self.shapes]
        for ours, theirs in names.items():
            remedy = next(words for part, words in REMEDIES.items() if part in ours)
            if theirs in missing:
                raise ValueError(
                    f"connector.init_from={self.folder} lacks {len(missing)} of {len(wanted)} tensors, the first "
                    f"{missing[0]!r}; {remedy}"
                )
            rows, *rest = self.shapes[theirs]
            without_dec = ours == "words.weight" and rows + 1 == TEXT_VOCABULARY
            if [rows + without_dec, *rest] != wanted[theirs]:
                raise ValueError(
                    f"connector.init_from={self.folder}: {theirs} has shape {self.shapes[theirs]}, here it is "
                    f"{wanted[theirs]}; {remedy}"
                )

    def _heads(self) -> dict[str, int]:
        """The number of heads, which no shape tells, where the folder has a config."""
        path = Path(self.folder) / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        heads = config.get("qformer_config", config).get("num_attention_heads")
        return {} if heads is None else {"num_heads": heads}


def _facts(shapes: Mapping[str, list[int]], layers: str) -> dict[str, int]:
    """Our options, as far as names and shapes tell them; `layers` comes before the number of a block."""
    blocks = {int(found[1]) for name in shapes if (found := re.match(rf"{re.escape(layers)}(\d+)\.", name))}
    if not blocks:
        return {}
    facts = {"depth": len(blocks), "width": shapes[f"{layers}0.attention.output.LayerNorm.weight"][0]}
    crossed = [index for index in sorted(blocks) if f"{layers}{index}.crossattention.output.dense.weight" in shapes]
    if crossed:
        facts["cross_attention_every"] = crossed[1] - crossed[0] if len(crossed) > 1 else len(blocks)
    if "query_tokens" in shapes:
        facts["num_queries"] = shapes["query_tokens"][1]
    return facts
