"""Pretrained folders that are not whole, not there, or say more than is asked: refused by name, or not listened to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.helpers.encoders import CLIP, CLIP_SIZES, NORMALIZED
from tests.helpers.llms import saved
from tests.helpers.parts import IMAGE, WHOLE, loader, make_batch, make_module, make_trainer, tiny_llm, tiny_model
from vlm.encoders.hf import HFEncoder
from vlm.encoders.timm import TimmEncoder
from vlm.encoders.transform import Transform
from vlm.hub import look_up
from vlm.llms.causal import CausalLM
from vlm.llms.seq2seq import Seq2SeqLM
from vlm.module import NotFinite

SMALL = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 269060552\n"


def folder_of(part: str, folder: Path) -> Path:
    if part == "llm":
        return Path(saved(tiny_llm(), folder))
    if part == "timm":
        small = timm.create_model("vit_tiny_patch16_224", num_classes=3, **SMALL)
        timm.models.save_for_hf(small, folder, safe_serialization=True)
        return folder
    CLIPVisionModel(CLIPVisionConfig(**CLIP_SIZES)).save_pretrained(folder)
    return folder


def read(part: str, folder: Path) -> Any:
    if part == "llm":
        return CausalLM(pretrained=str(folder), config=None)
    if part == "timm":
        return TimmEncoder(name="vit_tiny_patch16_224", pretrained=str(folder), image_size=16, model_args=SMALL)
    return HFEncoder(pretrained=str(folder), config=CLIP, **NORMALIZED)


LAYERS_OF = {"llm": "model.layers.", "encoder": "encoder.layers.", "timm": "blocks."}


@pytest.mark.parametrize("part", list(LAYERS_OF))
def test_weights_that_lack_tensors_are_refused(part: str, tmp_path: Path) -> None:
    file = folder_of(part, tmp_path) / "model.safetensors"
    layer = f"{LAYERS_OF[part]}{0 if part == 'encoder' else 1}."
    whole = load_file(file)
    read(part, tmp_path)
    kept = {name: tensor for name, tensor in whole.items() if layer not in name}
    save_file(kept, file, metadata={"format": "pt"})
    num = len(whole) - len(kept)
    assert num > 8
    with pytest.raises(ValueError, match=rf"lacks {num} of the {part_of(part)}'s tensors, first '.*{layer}.*'; do"):
        read(part, tmp_path)


@pytest.mark.parametrize("part", list(LAYERS_OF))
@pytest.mark.parametrize(
    ("more", "num"),
    [
        (["7.mlp.fc1.weight", "7.mlp.fc1.bias", "10.mlp.fc1.weight"], 3),  # of a larger model
        (["0.self_attn.more.weight"], 1),  # of another one
        (["7.rotary_emb.inv_freq", "0.attn.bias", "0.self_attn.rotary_emb.inv_freq"], 0),
    ],
)
def test_layers_that_would_be_left_unused_are_refused(part: str, more: list[str], num: int, tmp_path: Path) -> None:
    file = folder_of(part, tmp_path) / "model.safetensors"
    beside = ["vision_tower.layers.0.mlp.weight", "lm_head.bias", "pooler.weight", "position_ids", "text.layers.9.bias"]
    added = {name: torch.zeros(1) for name in [*(LAYERS_OF[part] + name for name in more), *beside]}
    save_file(load_file(file) | added, file, metadata={"format": "pt"})
    if num:
        first = min(LAYERS_OF[part] + name for name in more)
        said = rf"holds {num} tensors of layers that the {part_of(part)}'s config does not have, fir"
        with pytest.raises(ValueError, match=rf"{said}st '.*{first}'; correct the number of layers"):
            read(part, tmp_path)
    else:
        read(part, tmp_path)


@pytest.mark.parametrize(
    ("part", "per_layer", "load"),
    [
        ("llm", 9, lambda folder: CausalLM(pretrained=folder, config=None)),
        ("encoder", 16, lambda folder: HFEncoder(pretrained=folder, config=None, layer=-1, **NORMALIZED)),
    ],
)
def test_a_checkpoint_of_more_layers_than_its_configuration(
    part: str, per_layer: int, load: Callable[[str], Any], tmp_path: Path
) -> None:
    folder_of(part, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    left = config["num_hidden_layers"] - 1
    assert left
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1, "layer_types": None}))
    with pytest.raises(
        ValueError, match=rf"holds {left * per_layer} tensors of layers that .*, first '{LAYERS_OF[part]}1\."
    ):
        load(str(tmp_path))


def part_of(part: str) -> str:
    return "encoder" if part == "timm" else part


@pytest.mark.parametrize("part", ["llm", "encoder", "timm"])
@pytest.mark.parametrize("content", ["pointer", "cut header", "cut tensors", "empty", "text", "other shapes"])
def test_weights_that_cannot_be_read_are_one_sentence(part: str, content: str, tmp_path: Path) -> None:
    file = folder_of("llm" if part == "llm" else "encoder", tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    if content == "other shapes":
        if part == "timm":
            pytest.skip("the CLIP that stands here has other names for timm, whose error is tested elsewhere")
        save_file({n: torch.zeros(*t.shape, 2) for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
        said = r"weights in '.*' cannot be read \(.*\); download them again"
    else:
        cuts = {"cut header": whole[:40], "cut tensors": whole[:-100], "empty": b"", "text": b"<html>not found</html>"}
        file.write_bytes(cuts.get(content, POINTER.encode()))
        said = {
            "pointer": r"model.safetensors' is a Git LFS pointer, not the \w+'s file itself; .* git lfs pull",
            "cut tensors": rf"model.safetensors' is truncated: it has {len(whole) - 100:,} of {len(whole):,} bytes;",
            "cut header": r"model.safetensors' is truncated: it has 40 of [\d,]+ bytes; download it again",
        }.get(content, r"model.safetensors' is not a safetensors file; download it again")
    with pytest.raises(ValueError, match=said) as caught:
        read(part, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["llm", "encoder", "timm"])
@pytest.mark.parametrize(
    "wrong", ["/no/such/folder", "./models", "~/models/x", "a/b/c", "..\\models", "there/x", "file"]
)
def test_a_wrong_folder_is_not_told_as_a_hub_id(
    part: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    said = rf"\({'.file. is a file; give the folder that holds it' if wrong == 'file' else 'there is no folder .*'}\)"
    with pytest.raises(ValueError, match=said) as caught:
        read(part, Path(wrong) if wrong == "/no/such/folder" else wrong)  # type: ignore[arg-type]
    assert "Repo id" not in str(caught.value)


def test_a_hub_id_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("owner/name", "gpt2", "timm/vit_x.y@main"):
        with pytest.raises(OSError, match=r"offline|Cannot reach|cannot reach"):
            look_up(name)


@pytest.mark.parametrize("part", ["llm", "encoder"])
def test_a_pointer_in_the_place_of_the_configuration(part: str, tmp_path: Path) -> None:
    folder_of(part, tmp_path)
    (tmp_path / "config.json").write_text(POINTER)
    with pytest.raises(
        ValueError, match=r"config.json' is a Git LFS pointer, not the \w+'s file itself; .* git lfs pull"
    ):
        read(part, tmp_path)


# --- generation ------------------------------------------------------------------------------------------------------

LEAKS = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "num_beams": 3, "do_sample": True, "temperature": 9.0}
PROMPTS = (([11, IMAGE, 12, 13], []), ([14, 15], []))


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_answers_are_greedy_whatever_the_checkpoint_says(kind: str, tmp_path: Path) -> None:
    facts = {"model_type": "t5", "vocab_size": 320, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2}
    facts |= {"num_heads": 4, "decoder_start_token_id": 0, "tie_word_embeddings": False}
    torch.manual_seed(0)
    maker = CausalLM if kind == "causal" else Seq2SeqLM
    first: Any = tiny_llm() if kind == "causal" else Seq2SeqLM(pretrained=None, config=facts, weights="random")
    folder = saved(first, tmp_path)
    published = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps({**published, **LEAKS}))
    batch = make_batch(*PROMPTS, side="left")

    def answers(llm: Any) -> list[list[int]]:
        torch.manual_seed(7)
        return tiny_model(llm=llm).eval().generate(batch, stop_ids=[1], max_new_tokens=12).tolist()

    llm = maker(pretrained=folder, config=None)
    expected = answers(first)
    assert answers(llm) == expected
    assert answers(maker(pretrained=folder, config=None, generation="checkpoint")) != expected
    assert llm.model.generation_config.num_beams == 3  # for a merged model's folder


# --- adapters --------------------------------------------------------------------------------------------------------

LAYERS = "down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_proj", "foo_proj"], f"'foo_proj' matches no layer of this llm; its layers are {LAYERS}"),
        (["proj"], f"'proj' matches no layer of this llm; its layers are {LAYERS}"),
        ("q_proj", f"'q_proj' matches no layer of this llm; its layers are {LAYERS}"),
        (r".*\.foo_proj", f"'.*\\\\.foo_proj' matches no layer of this llm; its layers are {LAYERS}"),
        (
            ["q_proj", "mlp"],
            "'mlp' matches 'model.layers.0.mlp', a LlamaMLP, which cannot have an adapter; choose from",
        ),
        (r".*layers\.0.*", "matches 'model.layers.0', a LlamaDecoderLayer, which cannot have an adapter"),
        ("(", "stage.lora.target_modules='(' is not a regular expression (missing ), unterminated subpattern"),
    ],
)
def test_targets_of_an_adapter_that_match_nothing_are_refused(targets: Any, said: str) -> None:
    with pytest.raises(ValueError, match="target_modules") as caught:
        make_module(tiny_llm_model := tiny_model()).model.llm.add_lora(r=2, target_modules=targets)
    assert said in str(caught.value)
    assert not tiny_llm_model.llm._lora_layers()


@pytest.mark.parametrize(
    ("targets", "beside"),
    [
        (["q_proj", "1.mlp.up_proj"], {*(f"layers.{n}.self_attn.q_proj" for n in (0, 1)), "layers.1.mlp.up_proj"}),
        (r".*layers\.1\.self_attn\.(q|k)_proj", {"layers.1.self_attn.q_proj", "layers.1.self_attn.k_proj"}),
    ],
)  # fmt: skip
def test_targets_of_an_adapter_by_name_and_by_expression(targets: Any, beside: set[str]) -> None:
    llm = tiny_llm()
    llm.add_lora(r=2, target_modules=targets)
    assert {name.removeprefix("model.") for name in llm._lora_layers()} == beside


# --- the right culprit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["encoder.model.norm.bias", "llm.model.model.layers.1.mlp.up_proj.weight"])
def test_weights_that_are_not_finite_are_named(name: str, tmp_path: Path) -> None:
    model = tiny_model()
    name = next(n for n, _ in model.named_parameters() if n == name or (name.startswith("enc") and n.startswith("enc")))
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = torch.nan
    part = name.partition(".")[0]
    said = rf"nan at step 1, because the loaded weights {name} hold NaN or infinity; set {part}.pretr"
    with pytest.raises(NotFinite, match=said):
        make_trainer(tmp_path).fit(make_module(model), loader([WHOLE]))


@pytest.mark.parametrize(
    "changes", [{"std": [0.0, 0.0, 0.0]}, {"std": [1.0, -1.0, 1.0]}, {"mean": [0.0, float("nan"), 0.0]}]
)
def test_numbers_that_no_picture_can_be_divided_by(changes: Any) -> None:
    options = {"size": (8, 8), "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", **changes}
    with pytest.raises(ValueError, match=r"encoder.mean=.* and encoder.std=.*: pixels are divided by std"):
        Transform(**options)


def test_a_size_below_one_patch_is_told_the_least() -> None:
    with pytest.raises(ValueError, match=r"encoder.image_size=7 must be a multiple of the patch size 8; try 8$"):
        HFEncoder(pretrained="x", config=CLIP, weights="meta", image_size=7, **NORMALIZED)
    with pytest.raises(ValueError, match=r"encoder.image_size=7 must be a multiple of the patch size 16; try 16$"):
        TimmEncoder(name="vit_tiny_patch16_224", weights="meta", image_size=7)
    with pytest.raises(ValueError, match=r"encoder.image_size=7 does not fit convnext_tiny \(.*\); try 224, the size"):
        TimmEncoder(name="convnext_tiny", weights="meta", image_size=7)


@pytest.mark.parametrize("name", ["efficientvit_b0", "resnest14d"])
def test_models_whose_heads_or_norms_are_particular(name: str) -> None:
    """A head that cannot do without pooling; batch norm of one value, which training mode refuses."""
    encoder = TimmEncoder(name=name, weights="random", image_size=64)
    features = encoder(torch.randn(2, 3, 64, 64))
    assert features.shape == (2, encoder.grid[0] * encoder.grid[1], encoder.width)
    assert not any("head" in n for n, _ in encoder.named_parameters())


def test_a_model_that_timm_cannot_make_is_one_sentence() -> None:
    with pytest.raises(
        ValueError, match=r"timm cannot build encoder.name=resnet18 with .*'depth': 3.* \(.*\); choose an"
    ):
        TimmEncoder(name="resnet18", weights="random", model_args={"depth": 3})
