"""An artifact gives back the same outputs on the right base, is refused on a wrong one, and survives a full disk."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.helpers.parts import ADAPTER, CONNECTOR, IMAGE, LORA, PARTS, STATES, make_batch, tiny_llm, tiny_model
from vlm.identity import fingerprint, identity
from vlm.models.composed import Composed
from vlm.training import artifact
from vlm.training.optim import set_trainable
from vlm.training.sharding import gather

EYE = {"_target_": "an.Encoder", "name": "vit", "pretrained": "a/vit", "image_size": 16, "model_args": {"act": "gelu"}}
BATCH = make_batch(([11, IMAGE, 12], [21, 22]), ([13, 14], [23]))


def manifest_of(model: Composed, **changes: Any) -> dict[str, Any]:
    """As build.py makes it."""
    return {
        "parts": PARTS,
        "bases": {
            "encoder": identity(model.encoder, EYE),
            "llm": identity(model.llm, {"pretrained": "a/llama"}),
        },
        "quantization": "none",
        "chat_template": "chatml",
        "num_image_tokens": 4,
        "lora": None,
        "stages": [],
        "code": {"git": None, "packages": {}},
        **changes,
    }


def train(model: Composed, *, seed: int) -> Tensor:
    """Move every trained tensor as if by steps; the model's outputs after that."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    with torch.no_grad():
        return model(BATCH)


def write(run: Path, model: Composed, manifest: dict[str, Any], *, inherited: list[str], step: int = 1) -> None:
    tensors = gather(model, artifact.trained_names(model, inherited))
    artifact.save(run / "artifact", tensors=tensors, manifest=manifest, step=step)


def outputs(model: Composed) -> Tensor:
    with torch.no_grad():
        return model(BATCH)


def align(run: Path) -> Tensor:
    model = tiny_model()
    manifest = manifest_of(model)
    set_trainable(model, STATES, {})
    after = train(model, seed=1)
    write(run, model, manifest, inherited=[])
    return after


def stored(run: Path) -> set[str]:
    with safe_open(run / "artifact" / "weights.safetensors", framework="pt") as file:
        return set(file.keys())


def test_round_trip(tmp_path: Path) -> None:
    after = align(tmp_path)
    model = tiny_model(seed=9)
    assert not torch.equal(outputs(model), after)
    artifact.load(tmp_path, model=model, manifest=manifest_of(model))
    assert torch.equal(outputs(model), after)
    assert stored(tmp_path) == CONNECTOR, "trained tensors only"
    manifest = artifact.read_manifest(tmp_path)
    assert set(manifest["tensors"]) == CONNECTOR
    assert manifest["step"] == 1


def test_an_adapter_lives_through_two_stages(tmp_path: Path) -> None:
    """Align, then a LoRA, then a stage that trains the connector alone: the last artifact still holds the LoRA."""
    align(tmp_path / "1")
    model = tiny_model(seed=9)
    manifest = manifest_of(model)
    earlier = artifact.load(tmp_path / "1", model=model, manifest=manifest)
    set_trainable(model, {**STATES, "connector": "frozen", "llm": "lora"}, LORA)
    second = train(model, seed=2)
    write(tmp_path / "2", model, {**manifest, "lora": LORA}, inherited=earlier["tensors"])
    assert stored(tmp_path / "2") == CONNECTOR | ADAPTER

    model = tiny_model(seed=10)
    manifest = manifest_of(model)
    earlier = artifact.load(tmp_path / "2", model=model, manifest=manifest)
    assert torch.equal(outputs(model), second)
    set_trainable(model, STATES, {})
    third = train(model, seed=3)
    write(tmp_path / "3", model, {**manifest, "lora": earlier["lora"]}, inherited=earlier["tensors"])
    assert stored(tmp_path / "3") == CONNECTOR | ADAPTER

    model = tiny_model(seed=11)
    artifact.load(tmp_path / "3", model=model, manifest=manifest_of(model))
    assert torch.equal(outputs(model), third)


def test_a_fully_trained_llm_is_kept_under_a_later_adapter(tmp_path: Path) -> None:
    """An adapter renames the matrices beside it; what an earlier stage trained there must not be lost."""
    model = tiny_model()
    manifest = manifest_of(model)
    set_trainable(model, {**STATES, "llm": "full"}, {})
    train(model, seed=1)
    write(tmp_path / "1", model, manifest, inherited=[])

    model = tiny_model(seed=9)
    earlier = artifact.load(tmp_path / "1", model=model, manifest=manifest)
    set_trainable(model, {**STATES, "llm": "lora"}, LORA)
    second = train(model, seed=2)
    write(tmp_path / "2", model, {**manifest, "lora": LORA}, inherited=earlier["tensors"])

    model = tiny_model(seed=10)
    artifact.load(tmp_path / "2", model=model, manifest=manifest_of(model))
    assert torch.equal(outputs(model), second)


def test_a_bfloat16_base_gives_back_float32_tensors(tmp_path: Path) -> None:
    model = tiny_model(llm=tiny_llm(dtype="bfloat16"))
    manifest = manifest_of(model)
    set_trainable(model, {**STATES, "llm": {"last_n": 1}}, {})
    with torch.autocast("cpu", torch.bfloat16):
        after = train(model, seed=1)
    write(tmp_path, model, manifest, inherited=[])
    model = tiny_model(llm=tiny_llm(dtype="bfloat16"), seed=9)
    artifact.load(tmp_path, model=model, manifest=manifest)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(outputs(model), after)


def changed(manifest: dict[str, Any], keys: str, value: Any) -> dict[str, Any]:
    """The manifest with another value at `keys`."""
    other = json.loads(json.dumps(manifest))
    inner = other
    *path, last = keys.split(".")
    for key in path:
        inner = inner[key]
    assert inner.get(last) != value
    inner[last] = value
    return other


def test_another_base_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    align(tmp_path)
    model = tiny_model(llm=tiny_llm(seed=5))
    ours, theirs = (fingerprint(llm) for llm in (model.llm, tiny_llm()))
    assert ours != theirs
    with pytest.raises(ValueError, match=f"bases.llm.fingerprint = {theirs}, here it is {ours}; use the same parts"):
        artifact.load(tmp_path, model=model, manifest=manifest_of(model))


def test_another_part_is_refused_with_both_values(tmp_path: Path) -> None:
    """Hub ids, facts, connector, image size, layer, transform, quantization, token count: each on its own."""
    align(tmp_path)
    model = tiny_model(seed=9)
    before, manifest = outputs(model), manifest_of(model)
    for keys, value, text in (
        ("bases.llm.pretrained", "b/llama", "bases.llm.pretrained = a/llama, here it is b/llama"),
        ("bases.encoder.pretrained", "b/vit", "bases.encoder.pretrained = a/vit, here it is b/vit"),
        ("bases.encoder.config.name", "resnet", "bases.encoder.config.name = vit, here it is resnet"),
        ("bases.encoder.config.model_args.act", "relu", "bases.encoder.config.model_args.act = gelu, here it is relu"),
        ("bases.encoder.config.model_args.eps", 1e-3,
         "bases.encoder.config.model_args.eps = None, here it is 0.001"),
        ("bases.llm.config.hidden_size", 64, "bases.llm.config.hidden_size = 32, here it is 64"),
        ("parts.connector._target_", "vlm.connectors.linear.Linear",
         "parts.connector._target_ = vlm.connectors.mlp.MLP, here it is vlm.connectors.linear.Linear"),
        ("parts.connector.depth", 3, "parts.connector.depth = 2, here it is 3"),
        ("parts.encoder.layer", -2, "parts.encoder.layer = -1, here it is -2"),
        ("parts.encoder.image_size", [32, 32], "parts.encoder.image_size = [16, 16], here it is [32, 32]"),
        ("parts.encoder.transform.mean", [0.1] * 3,
         "parts.encoder.transform.mean = [0.5, 0.5, 0.5], here it is [0.1, 0.1, 0.1]"),
        ("parts.encoder.transform.std", [1.0] * 3,
         "parts.encoder.transform.std = [0.5, 0.5, 0.5], here it is [1.0, 1.0, 1.0]"),
        ("parts.encoder.transform.interpolation", "bilinear",
         "parts.encoder.transform.interpolation = bicubic, here it is bilinear"),
        ("quantization", "nf4", "llm.quantization = none, here it is nf4"),
        ("num_image_tokens", 9, "num_image_tokens = 4, here it is 9"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(f"ckpt={tmp_path} was trained with {text}; use the same parts")):
            artifact.load(tmp_path, model=model, manifest=changed(manifest, keys, value))
    assert torch.equal(outputs(model), before), "a refused artifact changes nothing"


def test_of_a_new_part_all_is_saved_though_one_module_is_trained(tmp_path: Path) -> None:
    """Its frozen modules may come from a file that is gone when the artifact is loaded."""
    model = tiny_model()
    set_trainable(model, {**STATES, "connector": {"only": ["norm"]}}, {})
    after = train(model, seed=1)
    write(tmp_path, model, manifest_of(model), inherited=[])
    assert stored(tmp_path) == CONNECTOR
    other = tiny_model(seed=9)
    artifact.load(tmp_path, model=other, manifest=manifest_of(other))
    assert torch.equal(outputs(other), after)


CHANGES = [
    ("chat_template", "llm.chat_template", "chatml", "llama3"),
    ("parts.encoder.transform.resize", "encoder.resize", "squash", "pad"),
    ("parts.encoder.tiles.grids", "encoder.tiles.grids", [], [[1, 2]]),
]


@pytest.mark.parametrize(("field", "option", "before", "now"), CHANGES)
def test_what_changes_no_tensor_is_refused_unless_the_user_has_said_it(
    tmp_path: Path, field: str, option: str, before: Any, now: Any
) -> None:
    after = align(tmp_path)
    model = tiny_model(seed=9)
    other = changed(manifest_of(model), field, now)
    group = option.partition(".")[0]
    for given in ([], [group, "experiment", f"{option}s", "data.prompt"]):  # another group option does not say it
        with pytest.raises(ValueError, match="was trained with") as refused:
            artifact.load(tmp_path, model=model, manifest=other, given=given)
        assert str(refused.value) == (
            f"ckpt={tmp_path} was trained with {option}={before}, here it is {now}; set {option}={before}, or, if this "
            f"stage is to change it, give {option}={now} on the command line or in the recipe's stage"
        )
    saved = artifact.load(tmp_path, model=model, manifest=other, given=[option])
    assert torch.equal(outputs(model), after)
    assert artifact.changes(saved, other, model) == {option: [before, now]}
    assert artifact.changes(saved, manifest_of(model), model) == {}


@pytest.mark.parametrize(
    ("model_type", "facts", "text"),
    [
        ("llama", {"rms_norm_eps": 1e-3}, "rms_norm_eps = 1e-06, here it is 0.001"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = silu, here it is gelu"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
         "rope_parameters.rope_theta = 10000.0, here it is 500.0"),
        ("gemma2", {"final_logit_softcapping": 5.0}, "final_logit_softcapping = 30.0, here it is 5.0"),
    ],
)  # fmt: skip
def test_facts_that_no_tensor_tells_are_compared(
    tmp_path: Path, model_type: str, facts: dict[str, Any], text: str
) -> None:
    model, other = (tiny_model(llm=tiny_llm(model_type, **each)) for each in ({}, facts))
    assert fingerprint(model.llm) == fingerprint(other.llm)
    set_trainable(model, STATES, {})
    write(tmp_path, model, manifest_of(model), inherited=[])
    with pytest.raises(ValueError, match=re.escape(f"bases.llm.config.{text}")):
        artifact.load(tmp_path, model=other, manifest=manifest_of(other))


def test_a_folder_is_where_weights_lie_and_a_hub_id_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that were downloaded, or moved, are the same by their facts and fingerprint."""
    after = align(tmp_path / "run")
    (tmp_path / "llama").mkdir()
    monkeypatch.chdir(tmp_path)
    model = tiny_model(seed=9)
    manifest = manifest_of(model)
    manifest["bases"]["llm"] = identity(model.llm, {"pretrained": "llama"})
    assert manifest["bases"]["llm"]["pretrained"] == str(tmp_path / "llama")
    artifact.load(tmp_path / "run", model=model, manifest=manifest)
    assert torch.equal(outputs(model), after)


def test_encoders_side_by_side_may_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "vit").mkdir()
    model = tiny_model()
    manifest = manifest_of(model)
    both = identity(model.encoder, {"pretrained": [str(tmp_path / "vit"), "a/vit"]})
    manifest["bases"]["encoder"] = both
    set_trainable(model, STATES, {})
    write(tmp_path / "run", model, manifest, inherited=[])
    elsewhere = {**both, "pretrained": ["b/vit", "a/vit"]}
    moved = {**manifest, "bases": {**manifest["bases"], "encoder": elsewhere}}
    artifact.load(tmp_path / "run", model=model, manifest=moved)
    other = {**moved, "bases": {**moved["bases"], "encoder": {**elsewhere, "fingerprint": "0"}}}
    with pytest.raises(ValueError, match=r"bases\.encoder\.fingerprint = .*, here it is 0"):
        artifact.load(tmp_path / "run", model=model, manifest=other)


def test_weights_that_a_disk_has_changed_are_refused(tmp_path: Path) -> None:
    """Length and header are right, a few values are not; all may read the file."""
    align(tmp_path)
    file = tmp_path / "artifact" / "weights.safetensors"
    assert file.stat().st_mode == (tmp_path / "artifact" / "manifest.json").stat().st_mode
    content = bytearray(file.read_bytes())
    content[-100:-90] = bytes(10)
    file.write_bytes(content)
    model = tiny_model(seed=9)
    before = outputs(model)
    with pytest.raises(ValueError, match=r"is damaged: its weights' checksum is [0-9a-f]{8}, not [0-9a-f]{8}; take"):
        artifact.load(tmp_path, model=model, manifest=manifest_of(model))
    assert torch.equal(outputs(model), before)


def test_an_option_that_is_left_out_has_its_default(tmp_path: Path) -> None:
    """An artifact of the time before an option was there, or a file that leaves it out."""
    align(tmp_path)  # names the depth alone
    model = tiny_model(seed=9)
    usual = {**PARTS["connector"], "position": True}
    artifact.load(tmp_path, model=model, manifest=manifest_of(model, parts={**PARTS, "connector": usual}))
    other = {**PARTS["connector"], "position": False}
    with pytest.raises(ValueError, match=r"parts\.connector\.position = True, here it is False"):
        artifact.load(tmp_path, model=model, manifest=manifest_of(model, parts={**PARTS, "connector": other}))


VERSION_1 = """{
  "format_version": 1,
  "parts": {"connector": {"_target_": "vlm.connectors.mlp.MLP", "depth": 2},
            "encoder": {"_target_": "vlm.encoders.timm.TimmEncoder", "image_size": 16, "layer": -1, "resize": "pad"}},
  "bases": {"encoder": {"pretrained": "a/vit", "fingerprint": "%s"},
            "llm": {"pretrained": "a/llama", "fingerprint": "%s"}},
  "chat_template": "the tokenizer's own",
  "num_image_tokens": 4,
  "lora": null,
  "stages": [{"name": "align", "run": "runs/first", "options": {"llm": "hf"}}],
  "code": {"git": "abc1234", "packages": {}},
  "tensors": %s
}
"""


def test_an_artifact_of_format_version_1_is_read(tmp_path: Path) -> None:
    after = align(tmp_path)
    model = tiny_model(seed=9)
    names = json.dumps(artifact.read_manifest(tmp_path)["tensors"])
    fingerprints = (fingerprint(part) for part in (model.encoder, model.llm))
    path = tmp_path / "artifact" / "manifest.json"
    path.write_text(VERSION_1 % (*fingerprints, names))
    resize = {**PARTS["encoder"]["transform"], "resize": "pad"}
    padded = {**PARTS, "encoder": {**PARTS["encoder"], "transform": resize}}
    manifest = artifact.load(tmp_path, model=model, manifest=manifest_of(model, parts=padded))
    assert torch.equal(outputs(model), after)
    assert (manifest["step"], manifest["quantization"], "chat_template" in manifest) == (None, "none", False)
    assert manifest["parts"]["encoder"] == {
        "_target_": "vlm.encoders.timm.TimmEncoder",
        "layer": -1,
        "image_size": [16, 16],
        "transform": {"resize": "pad"},
        "tiles": {"grids": [], "row_separator": False},
    }
    assert path.read_text() == VERSION_1 % (*map(fingerprint, (model.encoder, model.llm)), names)
    with pytest.raises(ValueError, match=r"encoder.resize=pad, here it is squash"):
        artifact.load(tmp_path, model=model, manifest=manifest_of(model))
    wider = {**padded, "encoder": {**padded["encoder"], "image_size": [32, 32]}}
    with pytest.raises(ValueError, match=r"image_size = \[16, 16\], here it is \[32, 32\]"):
        artifact.load(tmp_path, model=model, manifest=manifest_of(model, parts=wider))


def test_rounded_weights_are_named_before_the_fingerprint_that_they_change(tmp_path: Path) -> None:
    align(tmp_path)
    path = tmp_path / "artifact" / "manifest.json"
    manifest = json.loads(path.read_text())
    other = tiny_model(llm=tiny_llm(seed=5))
    path.write_text(json.dumps(manifest | {"quantization": "int8"}))
    with pytest.raises(ValueError, match=r"trained with llm\.quantization = int8, here it is none"):
        artifact.load(tmp_path, model=other, manifest=manifest_of(other))


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"is not a run directory: it has no artifact/manifest\.json"):
        artifact.load(tmp_path, model=model, manifest=manifest_of(model))
    align(tmp_path)
    path = tmp_path / "artifact" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    with pytest.raises(ValueError, match="format version 99, but this code reads 1 to 3; update the code"):
        artifact.load(tmp_path, model=model, manifest=manifest_of(model))
    path.write_text("{")
    with pytest.raises(ValueError, match="is not a manifest"):
        artifact.read_manifest(tmp_path)


def test_a_lost_tensor_is_named(tmp_path: Path) -> None:
    align(tmp_path)
    path = tmp_path / "artifact" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "tensors": [*manifest["tensors"], "connector.lost"]}))
    model = tiny_model()
    with pytest.raises(ValueError, match=r"1 tensors differ, first 'connector\.lost'"):
        artifact.load(tmp_path, model=model, manifest=manifest_of(model))


def test_weights_that_are_cut_off_are_named(tmp_path: Path) -> None:
    align(tmp_path)
    path = tmp_path / "artifact" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    model = tiny_model()
    with pytest.raises(ValueError, match=r"weights\.safetensors cannot be read \(.*\); take another ckpt="):
        artifact.load(tmp_path, model=model, manifest=manifest_of(model))


def test_a_full_disk_leaves_the_earlier_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after = align(tmp_path)
    model = tiny_model()
    set_trainable(model, STATES, {})
    manifest = manifest_of(model)
    train(model, seed=7)

    def full(tensors: dict[str, Tensor], file: Path, **_: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifact, "save_file", full)
    with pytest.raises(artifact.SaveError, match=r"artifact of step 7 .*No space left.*previous artifact is intact"):
        write(tmp_path, model, manifest, inherited=[], step=7)
    with pytest.raises(artifact.SaveError, match="none was saved"):
        write(tmp_path / "other", model, manifest, inherited=[], step=7)
    assert sorted(file.name for file in (tmp_path / "artifact").iterdir()) == ["manifest.json", "weights.safetensors"]
    fresh = tiny_model(seed=9)
    artifact.load(tmp_path, model=fresh, manifest=manifest_of(fresh))
    assert torch.equal(outputs(fresh), after)


def test_fingerprint() -> None:
    llm, copy = tiny_llm(), tiny_llm().to(torch.bfloat16)
    assert fingerprint(llm) == fingerprint(copy)
    weight = llm.model.model.layers[1].mlp.up_proj.weight.data
    assert weight.numel() == 2048, "of which 1,024 are looked at, the first and the last among them"
    before = fingerprint(llm)
    weight[-1, -1] += 1
    assert fingerprint(llm) != before
    weight[-1, -1] -= 1
    renamed = torch.nn.ModuleDict({"other": llm})
    assert fingerprint(renamed) != before
