"""The options of every config group, and what they need to be composed."""

from __future__ import annotations

from pathlib import Path

from vlm.launch.configs import CONF, OF_EVAL

# Of train.py.
GROUPS = sorted(path.name for path in Path(CONF).iterdir() if path.is_dir() and path.name not in OF_EVAL)
COMPOSED = ["llm=tiny", "encoder=tiny", "run_dir=x"]
FILES = ["data.annotations=a.json", "data.images=b"]
DOCUMENTS = [
    "data.sources.documents.annotations=a.json",
    "data.sources.documents.images=b",
    "data.sources.pairs.shards=c.tar",
]
PAIRS = ("dual_stream", "single_stream")  # models of pairs, also names of stages
WITHOUT_LLM = {  # their model has none
    *(f"stage={name}" for name in ("pretrain", *PAIRS)),
    *(f"experiment={name}" for name in ("blip2_stage1", "blip2_stage1_small", "vilbert", "vilbert_small")),
    *("experiment=uniter", "experiment=uniter_small"),
}
CONVNET = ["encoder=efficientnet_lite0"]  # models of pairs need its classifier


NEEDED = {
    ("data", "captions"): FILES,
    ("data", "image_folder"): ["data.root=a"],
    ("data", "interleaved"): FILES,
    ("data", "flamingo"): DOCUMENTS,
    ("data", "instruct"): FILES,
    ("data", "webdataset"): ["data.shards=a.tar"],
    ("experiment", "minigpt4_7b"): [*FILES, "connector.init_from=x"],
    ("experiment", "blip2_stage1"): FILES,
    ("experiment", "flamingo_3b"): DOCUMENTS,
    **{("experiment", name): FILES for name in ("blip2_opt_2_7b", "blip2_flan_t5_xl", "instructblip_vicuna_7b")},
    ("model", "qformer_pretraining"): ["stage=pretrain"],
    ("objective", "representation_learning"): ["stage=pretrain"],
    ("evaluators", "pair_retrieval"): ["stage=pretrain"],
    **{("experiment", name): [*FILES, *CONVNET] for name in ("vilbert", "uniter")},
    **{("experiment", name): CONVNET for name in ("vilbert_small", "uniter_small")},
    **{("stage", name): CONVNET for name in PAIRS},
    **{("model", name): [*CONVNET, f"stage={name}"] for name in PAIRS},
    ("objective", "masked_pairs"): [*CONVNET, "stage=dual_stream"],
    ("objective", "conditional_masking"): [*CONVNET, "stage=single_stream"],
    **{("evaluators", name): [*CONVNET, "stage=dual_stream"] for name in ("masked_words", "pair_matching")},
    ("encoder", "hf"): ["encoder.pretrained=x"],
    ("encoder", "timm"): ["encoder.name=x"],
    ("llm", "hf"): ["llm.pretrained=x"],
}


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (Path(CONF) / group).glob("*.yaml") if not path.name.startswith("_"))


def composed(*overrides: str) -> list[str]:
    """The overrides with the parts of `COMPOSED`."""
    return [*(each for each in COMPOSED if each != "llm=tiny" or not WITHOUT_LLM & {*overrides}), *overrides]


def needs(group: str, option: str) -> list[str]:
    return NEEDED.get((group, option), [])
