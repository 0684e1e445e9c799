"""An artefact gives back the same outputs on the right base, is refused on a wrong one, and survives a full disk."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.parts import IMAGE, LORA, STATES, make_batch, tiny_llm, tiny_model
from tests.test_stages import ADAPTER, CONNECTOR
from vlm import artifact
from vlm.models.composed import Composed
from vlm.optim import set_trainable
from vlm.sharding import gather

BATCH = make_batch(([11, IMAGE, 12], [21, 22]), ([13, 14], [23]))


def manifest_of(model: Composed, **changes: Any) -> dict[str, Any]:
    """As build.py makes it."""
    parts = {"encoder": model.encoder, "llm": model.llm}
    return {
        "parts": {"connector": {"_target_": "vlm.connectors.mlp.MLP", "depth": 2}, "encoder": {"layer": -1}},
        "bases": {part: {"pretrained": None, "fingerprint": artifact.fingerprint(m)} for part, m in parts.items()},
        "quantization": "none",
        "chat_template": "chatml",
        "num_image_tokens": 4,
        "lora": None,
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


def write(run: Path, model: Composed, manifest: dict[str, Any], *, inherited: list[str], step: int = 1) -> list[str]:
    names = artifact.trained_names(model, inherited)
    artifact.save(run / "artifact", tensors=gather(model, names), manifest=manifest, step=step)
    return names


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
    assert set(artifact.read_manifest(tmp_path)["tensors"]) == CONNECTOR


def test_an_adapter_lives_through_two_stages(tmp_path: Path) -> None:
    """Align, then a LoRA, then a stage that trains the connector alone: the last artefact still holds the LoRA."""
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


def test_another_base_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    align(tmp_path)
    model = tiny_model(llm=tiny_llm(seed=5))
    ours, theirs = (artifact.fingerprint(llm) for llm in (model.llm, tiny_llm()))
    assert ours != theirs
    with pytest.raises(ValueError, match=f"bases.llm.fingerprint = {theirs}, here it is {ours}; use the same parts"):
        artifact.load(tmp_path, model=model, manifest=manifest_of(model))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"parts": {"connector": {"_target_": "vlm.connectors.mlp.MLP", "depth": 3}, "encoder": {"layer": -1}}},
         r"parts\.connector\.depth = 2, here it is 3"),
        ({"parts": {"connector": {"_target_": "vlm.connectors.mlp.MLP", "depth": 2}, "encoder": {"layer": -2}}},
         r"parts\.encoder\.layer = -1, here it is -2"),
        ({"quantization": "nf4"}, r"llm\.quantization = none, here it is nf4; use the same parts"),
        ({"chat_template": "llama3"}, "chat_template = chatml, here it is llama3"),
        ({"num_image_tokens": 9}, "num_image_tokens = 4, here it is 9"),
    ],
    ids=["connector option", "encoder option", "quantization", "template", "token count"],
)  # fmt: skip
def test_another_part_is_refused_with_both_values(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    align(tmp_path)
    model = tiny_model(seed=9)
    before = outputs(model)
    with pytest.raises(ValueError, match=text):
        artifact.load(tmp_path, model=model, manifest=manifest_of(model, **changes))
    assert torch.equal(outputs(model), before), "a refused artefact changes nothing"


def test_rounded_weights_are_named_before_the_fingerprint_that_they_change(tmp_path: Path) -> None:
    after = align(tmp_path)
    path = tmp_path / "artifact" / "manifest.json"
    manifest = json.loads(path.read_text())
    other = tiny_model(llm=tiny_llm(seed=5))
    path.write_text(json.dumps(manifest | {"quantization": "int8"}))
    with pytest.raises(ValueError, match=r"trained with llm\.quantization = int8, here it is none"):
        artifact.load(tmp_path, model=other, manifest=manifest_of(other))
    del manifest["quantization"]  # as artefacts were at first
    path.write_text(json.dumps(manifest))
    model = tiny_model(seed=9)
    artifact.load(tmp_path, model=model, manifest=manifest_of(model))
    assert torch.equal(outputs(model), after)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"is no run directory: it has no artifact/manifest\.json"):
        artifact.load(tmp_path, model=model, manifest=manifest_of(model))
    align(tmp_path)
    path = tmp_path / "artifact" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    with pytest.raises(ValueError, match="format version 99, this code reads 1"):
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


def test_a_full_disk_leaves_the_earlier_artefact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after = align(tmp_path)
    model = tiny_model()
    set_trainable(model, STATES, {})
    manifest = manifest_of(model)
    train(model, seed=7)

    def full(tensors: dict[str, Tensor], file: Path, **_: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifact, "save_file", full)
    with pytest.raises(artifact.SaveError, match=r"artefact of step 7 .*No space left.*saved before is intact"):
        write(tmp_path, model, manifest, inherited=[], step=7)
    with pytest.raises(artifact.SaveError, match="none was saved"):
        write(tmp_path / "other", model, manifest, inherited=[], step=7)
    assert sorted(file.name for file in (tmp_path / "artifact").iterdir()) == ["manifest.json", "weights.safetensors"]
    fresh = tiny_model(seed=9)
    artifact.load(tmp_path, model=fresh, manifest=manifest_of(fresh))
    assert torch.equal(outputs(fresh), after)


def test_fingerprint() -> None:
    llm, copy = tiny_llm(), tiny_llm().to(torch.bfloat16)
    assert artifact.fingerprint(llm) == artifact.fingerprint(copy)
    weight = llm.model.model.layers[1].mlp.up_proj.weight.data
    assert weight.numel() == 2048, "of which 1,024 are looked at, the first and the last among them"
    before = artifact.fingerprint(llm)
    weight[-1, -1] += 1
    assert artifact.fingerprint(llm) != before
    weight[-1, -1] -= 1
    renamed = torch.nn.ModuleDict({"other": llm})
    assert artifact.fingerprint(renamed) != before
