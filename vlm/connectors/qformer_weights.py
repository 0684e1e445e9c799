"""Q-Former weights from and to Transformers' BLIP-2 (arXiv 2301.12597), from runs, and from BERT (arXiv 1810.04805)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

TEXT_VOCABULARY = 30_523  # BERT's (uncased) vocabulary and [DEC], BLIP-2's first token of a caption

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
    "blocks.*.feed.up": "encoder.layer.*.intermediate.dense",
    "blocks.*.feed.down": "encoder.layer.*.output.dense",
    "blocks.*.feed.norm": "encoder.layer.*.output.LayerNorm",
}
BERT_HEAD = {
    "transform.weight": "cls.predictions.transform.dense.weight",
    "transform.bias": "cls.predictions.transform.dense.bias",
    "norm.weight": "cls.predictions.transform.LayerNorm.weight",
    "norm.bias": "cls.predictions.transform.LayerNorm.bias",
    "word_bias": "cls.predictions.bias",
}
RUN = Path("artifact/weights.safetensors")  # in the directory of a run
REMEDIES = {  # part of the name of a tensor that does not fit -> what to set; the first match counts
    "project": "set connector.init_projection=false",
    "text_feed": "set connector.text=false or choose a checkpoint with its text path",
    "word": "set connector.text=false or choose a checkpoint with its text path",
    "feature_norm": "choose the encoder that it was trained with, or another checkpoint",
    "cross": "choose the encoder that it was trained with, or another checkpoint",
    "": "choose another checkpoint",
}


def to_blip2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Q-Former's state dict with the names of Transformers' Blip2ForConditionalGeneration.

    The text embeddings are named as in Blip2ForImageTextRetrieval. Raises ValueError if there is a `position`.
    """
    if "position" in state:
        raise ValueError(
            "BLIP-2 has no parameter for the Q-Former's position embeddings; train with connector.position=false"
        )
    return {
        target: state[name][None] if name == "queries" else state[name] for name, target in _names(state, BLIP2).items()
    }


def our_name(theirs: str) -> str | None:
    """The name in a Q-Former's state dict of a tensor of Transformers' BLIP-2; None for one that it does not have."""
    module, dot, kind = theirs.rpartition(".")
    key = re.sub(r"\.\d+\.", ".*.", f"{module}.").rstrip(".") if dot else theirs
    ours = {stored: name for name, stored in BLIP2.items()}.get(key)
    block = "".join(re.findall(r"\.(\d+)\.", f"{module}."))
    return None if ours is None else ours.replace("*", block) + (f".{kind}" if dot else "")


def start_from_blip2(state: Mapping[str, Tensor], folder: str, *, num_heads: int, projection: bool) -> None:
    """Copy the weights of a Transformers Q-Former into `state`, the tensors of a module; `position` keeps its values.

    `folder` may also be a run with a Q-Former, whose LLM may be another one if its `projection` is not read. A
    Blip2QFormerModel alone has the blocks and the norm before them; all other tensors then keep their values. Raises
    ValueError, with both numbers and the option to change, if the checkpoint does not fit.
    """
    checkpoint = _Checkpoint(folder)
    names = _names(state, BLIP2)
    if "layernorm.weight" in checkpoint.shapes:  # Blip2QFormerModel alone
        names = {
            name: stored.removeprefix("qformer.")
            for name, stored in names.items()
            if stored.startswith("qformer.") or "project" in name
        }
    if not projection:
        names = {name: stored for name, stored in names.items() if not name.startswith("project.")}
    checkpoint.check(state, names, num_heads=num_heads)
    for name, stored in names.items():
        tensor = checkpoint.read(stored)
        _copy(state[name], tensor[0] if name == "queries" else tensor)


def start_from_bert(state: Mapping[str, Tensor], folder: str, *, num_heads: int, part: str = "connector") -> None:
    """Copy the weights of a Transformers BERT into `state`; queries, cross-attention and projection keep their values.

    A Q-Former gets its feed-forward layers for the queries and for the text. The embedding of token type 0, which BERT
    adds to every token, is added to the position embeddings. Raises as `start_from_blip2`, with options of `part`.
    """
    checkpoint = _Checkpoint(folder, part)
    root = "bert." if any(name.startswith("bert.") for name in checkpoint.shapes) else ""
    names = {name: root + stored for name, stored in _names(state, BERT).items()}
    checkpoint.check(state, names, num_heads=num_heads)
    for name, stored in names.items():
        tensor = checkpoint.read(stored)
        if name == "word_positions.weight":
            tensor = tensor + checkpoint.read(f"{root}embeddings.token_type_embeddings.weight")[0]
        _copy(state[name], tensor)


def start_head_from_bert(state: Mapping[str, Tensor], folder: str) -> None:
    """Copy the head that predicts words, without its tied word embeddings; a BERT without this head changes nothing."""
    checkpoint = _Checkpoint(folder)
    names = {name: stored for name, stored in BERT_HEAD.items() if stored in checkpoint.shapes}
    for name, stored in names.items():
        _copy(state[name], checkpoint.read(stored))


def _names(state: Iterable[str], table: Mapping[str, str]) -> dict[str, str]:
    """Name in `state` -> name in Transformers, for all tensors in `table`."""
    names = {}
    for name in state:
        module, dot, kind = name.rpartition(".")
        key = re.sub(r"\d+", "*", module) if dot else name
        if key in table:
            block = "".join(re.findall(r"\d+", module))
            names[name] = table[key].replace("*", block) + (f".{kind}" if dot else "")
    return names


def _copy(target: Tensor, tensor: Tensor) -> None:
    target[: len(tensor)].copy_(tensor)  # a vocabulary without [DEC] has one row less


class _Checkpoint:
    """The tensors of a folder's safetensors files, read one at a time because a BLIP-2 also holds an LLM.

    Those of a run's connector have the names and shapes of BLIP-2's.
    """

    def __init__(self, folder: str, part: str = "connector") -> None:
        self.folder, self.part = folder, part
        self.shapes: dict[str, list[int]] = {}
        self._files: dict[str, tuple[Path, str]] = {}
        self._is_run = (Path(folder) / RUN).is_file()
        for path in [Path(folder) / RUN] if self._is_run else sorted(Path(folder).glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for stored in file.keys():  # noqa: SIM118, not a dictionary
                    name = re.sub("gamma$", "weight", re.sub("beta$", "bias", stored))  # BERT's first release
                    if self._is_run:
                        ours = stored.removeprefix("connector.")
                        name = _names([ours], BLIP2).get(ours, stored)
                    self.shapes[name] = self._added(name) + file.get_slice(stored).get_shape()
                    self._files[name] = (path, stored)
        if "connector.position" in self.shapes:
            raise ValueError(
                f"connector.init_from={folder} was trained with connector.position=true, which only ckpt= reads; take "
                "a run with connector.position=false"
            )
        if not self.shapes:
            raise ValueError(
                f"{part}.init_from={folder} has no tensors in *.safetensors; download the checkpoint and set "
                f"{part}.init_from=<its folder>"
            )

    def read(self, name: str) -> Tensor:
        path, stored = self._files[name]
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(stored)
        return tensor.reshape(*self._added(name), *tensor.shape)

    def _added(self, name: str) -> list[int]:
        """The axes that a tensor has in BLIP-2 and not in a run."""
        return [1] if self._is_run and name == "query_tokens" else []

    def check(self, state: Mapping[str, Tensor], names: Mapping[str, str], *, num_heads: int) -> None:
        """Raise ValueError on the first difference in options, names or shapes between the checkpoint and `state`."""
        expected = {stored: [1] * (name == "queries") + list(state[name].shape) for name, stored in names.items()}
        layers = names["blocks.0.attention.query.weight"].partition("0.")[0]
        options = _options(expected, layers) | {"num_heads": num_heads}
        for option, value in (_options(self.shapes, layers) | self._num_heads()).items():
            if options.get(option, value) != value:
                raise ValueError(
                    f"{self.part}.init_from={self.folder} has {option}={value}, the {self.part} has {options[option]}; "
                    f"set {self.part}.{option}={value}"
                )
        missing = [stored for stored in expected if stored not in self.shapes]
        for name, stored in names.items():
            known = REMEDIES if self.part == "connector" else {"": REMEDIES[""]}
            remedy = next(text for key, text in known.items() if key in name)
            if stored in missing:
                raise ValueError(
                    f"{self.part}.init_from={self.folder} lacks {len(missing)} of {len(expected)} tensors, first "
                    f"{missing[0]!r}; {remedy}"
                )
            rows, *rest = self.shapes[stored]
            without_dec = name == "words.weight" and rows + 1 == TEXT_VOCABULARY
            if [rows + without_dec, *rest] != expected[stored]:
                raise ValueError(
                    f"{self.part}.init_from={self.folder}: {stored} has shape {self.shapes[stored]}, the {self.part} "
                    f"needs {expected[stored]}; {remedy}"
                )

    def _num_heads(self) -> dict[str, int]:
        """The number of heads, if the folder has a config; it does not follow from the shapes."""
        path = Path(self.folder) / ("artifact/manifest.json" if self._is_run else "config.json")
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if self._is_run:
            return {key: value for key, value in config["parts"]["connector"].items() if key == "num_heads"}
        heads = config.get("qformer_config", config).get("num_attention_heads")
        return {} if heads is None else {"num_heads": heads}


def _options(shapes: Mapping[str, list[int]], layers: str) -> dict[str, int]:
    """The connector's options that follow from names and shapes; `layers` is the prefix of a block's index."""
    blocks = {int(found[1]) for name in shapes if (found := re.match(rf"{re.escape(layers)}(\d+)\.", name))}
    if not blocks:
        return {}
    options = {"depth": len(blocks), "width": shapes[f"{layers}0.attention.output.LayerNorm.weight"][0]}
    with_cross = [index for index in sorted(blocks) if f"{layers}{index}.crossattention.output.dense.weight" in shapes]
    if with_cross:
        options["cross_attention_every"] = with_cross[1] - with_cross[0] if len(with_cross) > 1 else len(blocks)
    if "query_tokens" in shapes:
        options["num_queries"] = shapes["query_tokens"][1]
    return options
