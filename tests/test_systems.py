"""The published systems: what `plan=true` counts, beside the paper's arithmetic and what the experiment's file says."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from tests.helpers.configs import DOCUMENTS
from vlm import config
from vlm.launch.entry import CONF
from vlm.launch.overrides import override
from vlm.launch.plan import build_meta
from vlm.launch.probe import without_weights
from vlm.training.run import count_parameters

NO_FILES = ("connector.init=random", "connector.init_from=null")  # of a Q-Former


@cache
def stages(experiment: str, *options: str) -> list[dict[str, Any]]:
    """The checked settings of each stage, as the recipe starts it."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        recipe: Any = OmegaConf.to_container(
            compose("train", [f"experiment={experiment}", *options, "run_dir=x"]).recipe
        )
        found = []
        for entry in recipe["stages"]:
            own = [override(key, value) for key, value in entry.items()]
            words = [f"experiment={experiment}", "recipe=null", *own, *options, "run_dir=x"]
            found.append(without_weights(config.plain(compose("train", words))))
    for settings in found:
        config.check(settings)
    return found


def trained(settings: dict[str, Any]) -> dict[str, int]:
    model, objective = build_meta(settings)
    return {
        part: numbers["trainable"]
        for part, numbers in count_parameters(model, objective).items()
        if numbers["trainable"]
    }


def mlp(encoder: int, llm: int) -> int:
    return encoder * llm + llm + llm * llm + llm


def llama(width: int, hidden: int, layers: int, vocabulary: int = 32000, keys: int | None = None) -> int:
    keys = keys or width
    each = 2 * width * width + 2 * width * keys + 3 * width * hidden + 2 * width
    return layers * each + 2 * vocabulary * width + width


def lora(width: int, hidden: int, layers: int, rank: int) -> int:
    return layers * rank * (4 * 2 * width + 3 * (width + hidden))


SEVEN, THIRTEEN = (4096, 11008, 32), (5120, 13824, 40)
# Of CLIP ViT-L/14 at 336 pixels: 23 of 24 blocks, patches, class token, positions, first norm.
CLIP = 23 * (12 * 1024**2 + 13 * 1024) + 3 * 14 * 14 * 1024 + 1024 + 577 * 1024 + 2 * 1024
EXPECTED: dict[str, list[dict[str, int]]] = {
    "llava15_7b": [{"connector": mlp(1024, 4096)}, {"connector": mlp(1024, 4096), "llm": llama(*SEVEN)}],
    "llava15_7b_lora": [{"connector": mlp(1024, 4096)}, {"connector": mlp(1024, 4096), "llm": lora(*SEVEN, 128)}],
    "llava15_13b": [{"connector": mlp(1024, 5120)}, {"connector": mlp(1024, 5120), "llm": llama(*THIRTEEN)}],
    "llava15_13b_lora": [{"connector": mlp(1024, 5120)}, {"connector": mlp(1024, 5120), "llm": lora(*THIRTEEN, 128)}],
    "llava_next_8b": [
        {"connector": mlp(1024, 4096)},
        {"encoder": CLIP, "connector": mlp(1024, 4096) + 4096, "llm": llama(4096, 14336, 32, 128256, 1024)},
    ],
    "minigpt4_7b": [{"connector": 768 * 4096 + 4096}] * 2,
}


def options(experiment: str) -> tuple[str, ...]:
    return NO_FILES if experiment == "minigpt4_7b" else ()


@pytest.mark.parametrize("experiment", EXPECTED)
def test_trainable_parameters(experiment: str) -> None:
    counts = [trained(settings) for settings in stages(experiment, *options(experiment))]
    assert counts == EXPECTED[experiment]
    header = Path(CONF, "experiment", f"{experiment}.yaml").read_text().partition("defaults:")[0].replace("\n#", "")
    page = Path(CONF).parent.joinpath("docs", "systems.md").read_text()
    row = next(line for line in page.splitlines() if f"`{experiment}`" in line)
    for total in (sum(each.values()) for each in counts):
        assert f"{total:,}" in row
    if experiment not in ("llava_next_8b",):
        assert f"{sum(counts[-1].values()):,}" in header


@pytest.mark.parametrize("experiment", [name for name in EXPECTED if name.startswith("llava")])
def test_llavas_two_stages(experiment: str) -> None:
    """What the authors' scripts say (scripts/v1_5/pretrain.sh, finetune.sh, finetune_lora.sh) and LLaVA-NeXT's card."""
    align, instruct = stages(experiment)
    is_next = experiment == "llava_next_8b"
    for stage in (align, instruct):
        of = stage["stage"]
        assert (of["schedule"], of["warmup_ratio"], of["min_lr_ratio"]) == ("cosine", 0.03, 0.0)
        assert (of["betas"], of["weight_decay"], of["gradient_clip_val"]) == ([0.9, 0.999], 0.0, 1.0)
        assert stage["data"]["too_long"] == "truncate"
        assert stage["data"]["max_length"] == (8192 if is_next else 2048)
        assert stage["data"]["val_fraction"] == 0
        assert (stage["encoder"]["layer"], stage["connector"]["norm"], stage["connector"]["position"]) == (
            -2,
            False,
            False,
        )
    rates = {"lora": (2e-5, 2e-4), "next": (1e-5, 1e-5)}.get(
        "next" if is_next else experiment.rpartition("_")[2], (2e-5, 2e-5)
    )
    assert align["stage"]["lr"]["connector"] == 1e-3
    assert (instruct["stage"]["lr"]["connector"], instruct["stage"]["lr"]["llm"]) == rates
    assert (align["llm"]["chat_template"], align["encoder"]["resize"], align["data"]["prompt"]) == (
        "caption",
        "crop",
        "",
    )
    expected = ("llama3", "squash") if is_next else ("vicuna_v1", "pad")
    assert (instruct["llm"]["chat_template"], instruct["encoder"]["resize"]) == expected
    assert (instruct["data"]["image_first"], instruct["data"]["batching"]) == (True, "modality")
    assert (align["data"]["batch_size"] * (16 if is_next else 8), align["trainer"]["max_steps"]) == (
        256,
        -(-558128 // 256),
    )
    assert instruct["data"]["batch_size"] * (16 if is_next else 8) == (64 if is_next else 128)
    assert instruct["trainer"]["max_steps"] == (-(-748000 // 64) if is_next else -(-665298 // 128))


def test_flamingos_parameters() -> None:
    """By the authors' helpers.py: 24 gated blocks, a resampler of 6; and two tokens, for which they count a table."""
    width, visual, inner = 2048, 1024, 8 * 64
    block = 2 * width * inner + 2 * visual * inner + 8 * width**2 + 4 * width + 2
    resampler = 64 * visual + 6 * (4 * visual * inner + 8 * visual**2 + 6 * visual) + 2 * visual
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        settings = without_weights(config.plain(compose("train", ["experiment=flamingo_3b", *DOCUMENTS, "run_dir=x"])))
    config.check(settings)
    assert trained(settings) == {"connector": 24 * block + resampler, "llm": 2 * 2 * width}
    header = Path(CONF, "experiment", "flamingo_3b.yaml").read_text().partition("defaults:")[0].replace("\n#", "")
    row = next(
        line
        for line in Path(CONF).parent.joinpath("docs", "systems.md").read_text().splitlines()
        if "flamingo_3b" in line
    )
    for number in (24 * block + resampler, 24 * block + resampler + 50280 * width):  # ours without the rows; theirs
        assert f"{number:,}" in header
    assert f"{24 * block + resampler + 4 * width:,}" in row
    of, data = settings["stage"], settings["data"]
    assert (of["lr"], of["schedule"]) == ({"encoder": None, "connector": 1e-4, "llm": 1e-4}, "constant")
    assert of["warmup_ratio"] * settings["trainer"]["max_steps"] == pytest.approx(1875, abs=1)
    assert settings["trainer"]["max_steps"] == -(-480 * 125_000 // (32 * 64))
    assert (data["batch_size"], data["weights"]) == (32 + 64, {"documents": 1, "pairs": 2})
    documents = data["sources"]["documents"]
    assert (documents["max_images"], documents["min_similarity"], documents["keep_single_image"]) == (6, 0.24, 0.5)


def test_minigpt4s_two_stages() -> None:
    """train_configs/minigpt4_stage1_pretrain.yaml and minigpt4_stage2_finetune.yaml."""
    first, second = stages("minigpt4_7b", *NO_FILES)
    for stage, peak, lowest, warmup, steps, size in (
        (first, 1e-4, 8e-5, 5000, 20000, 64),
        (second, 3e-5, 1e-5, 200, 1000, 12),
    ):
        of = stage["stage"]
        assert (of["lr"]["connector"], of["weight_decay"], of["gradient_clip_val"]) == (peak, 0.05, None)
        assert of["lr"]["connector"] * of["min_lr_ratio"] == pytest.approx(lowest, rel=1e-3)
        assert of["warmup_ratio"] * stage["trainer"]["max_steps"] == warmup
        assert (stage["trainer"]["max_steps"], stage["data"]["batch_size"]) == (steps, size)
    assert (first["llm"]["chat_template"], second["llm"]["chat_template"]) == ("caption", "minigpt4")
    assert first["data"]["max_length"] == 1 + 32 + 32
    assert [prompt.replace("<image>", "") for prompt in second["data"]["prompt"]] == [
        "<Img></Img> Describe this image in detail.",
        "<Img></Img> Take a look at this image and describe what you notice.",
        "<Img></Img> Please provide a detailed description of the picture.",
        "<Img></Img> Could you describe the contents of this image for me?",
    ]


def block(width: int, inner: int) -> int:
    """A transformer layer of BERT."""
    return 4 * (width * width + width) + width * inner + inner + inner * width + width + 4 * width


def bert(width: int, depth: int) -> int:
    """BERT without the embeddings of token types, with the row of [DEC]."""
    return (30523 + 512 + 2) * width + depth * block(width, 4 * width)


def head(width: int, outputs: int) -> int:
    """A linear layer with its norm, then the prediction."""
    return width * width + 3 * width + outputs


def co_attention(text: int, image: int, inner: int) -> int:
    queries = (text * inner + inner) + (image * inner + inner)
    keys_and_values = 2 * (text * inner + inner) + 2 * (image * inner + inner)
    out = (inner * text + text) + (inner * image + image)
    feeds = 2 * 4 * text * text + 4 * text + text + 2 * image * image + 2 * image
    return queries + keys_and_values + out + feeds + 2 * 2 * (text + image)


STREAMS = {
    "vilbert": {
        "text": bert(768, 12),
        "image": (2048 + 1 + 5 + 1 + 2) * 1024 + 6 * block(1024, 1024),
        "co_attention": 6 * co_attention(768, 1024, 1024),
        "heads": head(768, 30523) + head(1024, 1025 * 1000) + (768 + 1 + 1024 + 1) * 1024 + 2 * 1025,
    },
    "uniter": {
        "stream": bert(768, 12),
        "cells": 2048 + (2048 + 1 + 7 + 1 + 6 + 1) * 768,
        "heads": head(768, 30523) + head(768, 769 * 1000) + head(768, 2048) + 769 * 768 + 2 * 769,
    },
}


@pytest.mark.parametrize("experiment", STREAMS)
def test_streams(experiment: str) -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        words = [f"experiment={experiment}", "data.annotations=a.json", "data.images=b", "run_dir=x"]
        settings = without_weights(config.plain(compose("train", words)))
    config.check(settings)
    counts = trained(settings)
    assert counts == STREAMS[experiment]
    page = Path(CONF).parent.joinpath("docs", "systems.md").read_text()
    row = next(line for line in page.splitlines() if f"`{experiment}`" in line)
    assert f"{sum(counts.values()):,}" in row
