"""Every option of every group with values that may not be meant: in an explicit range, or refused in one sentence.

The options are those of conf/ and of the constructors that it names.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import jaxtyping
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from tests.helpers.configs import GROUPS, needs, options
from tests.helpers.configs import composed as parts_of
from vlm import config
from vlm.callbacks.save import Save
from vlm.cli.doctor import Options as DoctorOptions
from vlm.data.augment import Augment
from vlm.data.datamodule import VLMDataModule
from vlm.launch.entry import CONF
from vlm.llms.base import LanguageModel
from vlm.module import VLMModule
from vlm.options import parameters
from vlm.ranges import LIBRARIES, Known, Range

Key = tuple[str, ...]
VALUES: list[Any] = [-1, 0, 1e300, math.nan, None, "x", [], {}]
DERIVED = {"vision_width", "llm_width", "grid", "output_rms", "dtype", "split", "source", "model", "bad_samples_file"}
# These groups set keys of the others.
SETTING = ("experiment", "debug", "sweep")
SWEPT = [group for group in GROUPS if group not in ("hydra", *SETTING)]


@pytest.fixture(scope="module", autouse=True)
def hydra():
    GlobalHydra.instance().clear()
    jaxtyping.config.update("jaxtyping_disable", True)  # a user's mistake must not rest on the checks of pytest
    with initialize_config_dir(CONF, version_base="1.3"):
        yield
    jaxtyping.config.update("jaxtyping_disable", False)


def composed(*overrides: str) -> dict[str, Any]:
    return config.plain(compose("train", ["recipe=null", *parts_of(*overrides)]))


def constructor(target: str) -> Any:
    module, _, name = target.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)


def keys_of(node: Mapping[str, Any], key: Key = ()) -> Iterator[Key]:
    """Every key of a config, sections and groups too, and what their constructors take beside it."""
    given = set(node)
    if isinstance(target := node.get("_target_"), str):
        given |= parameters(constructor(target)).keys() - DERIVED
    for name in sorted(given):
        yield (*key, name)
        if isinstance(value := node.get(name), Mapping):
            yield from keys_of(value, (*key, name))


def configs() -> Iterator[tuple[dict[str, Any], list[Key]]]:
    """Each option of each group, with the keys that none before it had at the same constructor."""
    done: set[tuple[str, Key]] = set()
    shared = parameters(VLMDataModule).keys()
    for group, option in [("", ""), *((name, option) for name in SWEPT for option in options(name))]:
        settings = composed(*([f"{group}={option}"] if group else []), *needs(group, option))
        fresh = []
        for key in keys_of(settings):
            section = settings[key[0]]
            target = section.get("_target_", "") if isinstance(section, Mapping) else ""
            owner = "" if key[0] == "data" and key[1:] and key[1] in shared else target
            if (owner, key) not in done:
                done.add((owner, key))
                fresh.append(key)
        yield settings, fresh


def with_value(node: Mapping[str, Any], key: Key, value: Any) -> dict[str, Any]:
    name, *inner = key
    return {**node, name: with_value(node[name], tuple(inner), value) if inner else value}


@pytest.mark.slow
def test_every_option_with_every_value() -> None:
    accepted, refused, names = [], 0, set()
    for settings, keys in configs():
        names |= {*keys}
        for key, value in ((key, value) for key in keys for value in VALUES):
            full_key = ".".join(key)
            try:
                config.check(with_value(settings, key, value))
            except ValueError as error:
                said = str(error)
                assert full_key in said, f"{full_key}={value!r}: {said}"
                assert "\n" not in said, said
                refused += 1
            else:
                accepted.append((full_key, value))
    print(f"{len(names)} options, {len(accepted)} values accepted, {refused} refused")
    assert len(names) > 350
    assert refused > 9 * len(accepted)
    assert not [key for key, value in accepted if isinstance(value, float)]  # nan, and no option takes 1e300
    assert {key.rpartition(".")[2] for key, value in accepted if value == -1 and type(value) is int} == MINUS_ONE
    assert {key.rpartition(".")[2] for key, value in accepted if value == 0 and type(value) is int} == ZERO


# The last layer, all devices; of a logger; of forgetting; a cosine.
MINUS_ONE = {"layer", "devices", "version", "max", "min_similarity"}
ZERO = {
    *("layer", "drop_tokens", "pad_token_id", "decoder_start_token_id", "version", "seed", "num_workers", "show"),
    *(
        "max_bad_ratio",
        "text_replay",
        "keep_single_image",
        "min_similarity",
        "val_fraction",
        "max",
        "encoder",
        "connector",
        "llm",
        "min_lr_ratio",
        "warmup_ratio",
    ),
    *(
        "weight_decay",
        "gradient_clip_val",
        "dropout",
        "label_smoothing",
        "limit_train_batches",
        "limit_val_batches",
        "overfit_batches",
    ),
    *("rest", "project", "mlp", "resampler", "heads", "objective"),  # learning rates
    *("shapes", "stamps", "emoji", "documents", "pairs"),  # weights of a mixture
    "num_shots",
    *("text", "image", "co_attention", "stream", "cells", "classes"),
    *("mask_ratio", "swap_ratio", "transport_weight"),
    *("word", "feature", "class", "matching"),  # weights of tasks
    *("limit_test_batches", "limit_predict_batches", "reload_dataloaders_every_n_epochs"),
}


def without_range(hint: Any, *, bounded: bool = False) -> Iterator[Any]:
    """The numbers in a hint that no range bounds."""
    inner = get_args(hint)
    if get_origin(hint) is Annotated:
        for known in (each for each in inner[1:] if isinstance(each, Known)):
            for entry in known.hints.values():
                yield from without_range(entry)
        yield from without_range(inner[0], bounded=bounded or any(isinstance(each, Range) for each in inner[1:]))
    elif get_origin(hint) in (Union, UnionType):
        for each in inner:
            yield from without_range(each, bounded=bounded)
    elif hint in (int, float) and not bounded:
        yield hint
    elif get_origin(hint) in (list, tuple, dict) or str(get_origin(hint)).startswith("<class 'collections.abc"):
        for each in inner:
            yield from without_range(each) if not isinstance(each, list) else ()


def hints_of_options() -> Iterator[tuple[str, dict[str, Any]]]:
    targets = {
        constructor(node["_target_"])
        for settings, keys in configs()
        for key in keys
        if key[-1] == "_target_"
        for node in [settings if not key[:-1] else at(settings, key[:-1])]
    }
    named = {
        name for group in ("benchmark", "rival") for file in Path(CONF, group).glob("*.yaml") for name in named_in(file)
    }
    ours = {each for each in targets if each.__module__.startswith("vlm.")} | {*map(constructor, named)}
    for each in (*ours, Save, Augment, VLMDataModule, VLMModule, DoctorOptions):
        function = each.__init__ if inspect.isclass(each) else each
        of_a_library = getattr(function, "__module__", "").startswith("lightning.")  # inherited by a logger
        yield each.__name__, {} if of_a_library else get_type_hints(function, include_extras=True)
    yield "add_lora", get_type_hints(LanguageModel.add_lora, include_extras=True)
    yield from LIBRARIES.items()
    yield from (*config.SECTIONS.items(), ("stage", config.STAGE))
    yield from (("values", config.VALUES), ("evaluation", config.EVALUATION))


def named_in(file: Path) -> list[str]:
    """The classes of this project that a config names."""
    return re.findall(r"_target_: (vlm\.[\w.]+)", file.read_text("utf-8"))


def at(node: Any, key: Key) -> Any:
    for name in key:
        node = node[name]
    return node


@pytest.mark.slow
def test_every_number_has_a_range() -> None:
    checked = dict(hints_of_options())
    named = {name.rpartition(".")[2] for file in Path(CONF).rglob("*.yaml") for name in named_in(file)}
    shared = {"Save", "Augment", "VLMDataModule", "VLMModule", "Options", "add_lora", "stage", "values", "evaluation"}
    assert checked.keys() == (named - {"SweepReport"}) | shared | LIBRARIES.keys() | config.SECTIONS.keys()
    missing = {
        f"{name}.{option}"
        for name, hints in checked.items()
        for option, hint in hints.items()
        if option not in DERIVED and [*without_range(hint)]
    }
    assert missing == set()
