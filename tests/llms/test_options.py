"""What every LLM takes: gradient checkpointing, LoRA and DoRA, quantisation, foreign code, any other architecture."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.llms import composed, saved, settings, shrunk, small_llm
from tests.helpers.parts import IMAGE, LORA, STATES, Gated, make_batch, tiny_model
from vlm import build, config
from vlm.connectors.mlp import MLP
from vlm.llms.base import LanguageModel
from vlm.llms.causal import CausalLM
from vlm.training.optim import lora_names, set_trainable

FAMILIES = ["llama3_2_1b", "gemma3_1b", "qwen3_0_6b", "phi4_mini", "opt_2_7b", "flan_t5_xl"]
ROWS = (([11, IMAGE, 12], [21, 22]), ([14, 15], [23]), ([16, IMAGE], [24, 25, 26]))


# --- gradient checkpointing ------------------------------------------------------------------------------------------


def gradients(llm: LanguageModel, *, state: str, connector: nn.Module | None = None) -> dict[str, torch.Tensor]:
    """Of a composed model's trained parameters; the adapter drops out, by the same dice each time."""
    model = tiny_model(llm=llm, connector=connector)  # type: ignore[arg-type]
    torch.manual_seed(3)
    linears = [name.rpartition(".")[2] for name, m in llm.layers()[0].named_modules() if isinstance(m, nn.Linear)]
    set_trainable(model, {**STATES, "llm": state}, {**LORA, "dropout": 0.5, "target_modules": linears[:1]})
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model(make_batch(*ROWS, num_tokens=0 if connector else 4)).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("state", ["frozen", "lora", "full"])
@pytest.mark.parametrize("option", FAMILIES)
def test_gradients_are_equal_with_checkpointing(option: str, state: str) -> None:
    kept, recomputed = (gradients(small_llm(option, gradient_checkpointing=on), state=state) for on in (False, True))
    assert kept.keys() == recomputed.keys()
    assert any("connector" in name for name in kept)
    assert any("lora_A" in name for name in kept) == (state == "lora")
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


def test_gradients_are_equal_with_a_connector_on_the_layers() -> None:
    kept, recomputed = [], []
    for found, on in ((kept, False), (recomputed, True)):
        torch.manual_seed(4)
        connector = Gated()
        connector.gate.data.fill_(0.3)
        found += gradients(
            small_llm("llama3_2_1b", gradient_checkpointing=on), state="lora", connector=connector
        ).items()
    assert [name for name, _ in kept] == [name for name, _ in recomputed]
    found = {name for name, _ in kept if name.startswith("connector.")}
    assert found == {f"connector.{name}" for name in ("gate", "project.weight", "project.bias")}
    for (name, gradient), (_, again) in zip(kept, recomputed, strict=True):
        torch.testing.assert_close(again, gradient, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("option", FAMILIES)
def test_checkpointing_computes_each_layer_twice_and_only_to_train(option: str) -> None:
    llm = small_llm(option, gradient_checkpointing=True)
    model, batch = tiny_model(llm=llm), make_batch(*ROWS)  # type: ignore[arg-type]
    counts = {"norm": 0}
    norm = next(m for name, m in llm.layers()[0].named_modules() if "norm" in name)
    norm.register_forward_hook(lambda *_: counts.update(norm=counts["norm"] + 1))
    loss = model(batch).sum()
    assert (counts["norm"], llm.layers()[0].training) == (1, False)
    loss.backward()
    assert counts["norm"] == 2
    with torch.no_grad():
        model(batch)
    assert counts["norm"] == 3
    prompts = make_batch(*((prompt, []) for prompt, _ in ROWS), side="left")
    plain = tiny_model(llm=small_llm(option))  # type: ignore[arg-type]
    model.train()
    answers = [one.generate(prompts, stop_ids=[1], max_new_tokens=4).tolist() for one in (model, plain)]
    assert answers[0] == answers[1], "the KV cache is kept in training mode too"


def test_no_dropout_in_any_mode() -> None:
    """T5 was trained with a rate of 0.1."""
    model, batch = tiny_model(llm=small_llm("flan_t5_xl")), make_batch(*ROWS)  # type: ignore[arg-type]
    torch.testing.assert_close(model.train()(batch), model.eval()(batch), rtol=0, atol=0)


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", FAMILIES)
def test_dora_starts_as_the_llm_and_learns_lengths_too(option: str) -> None:
    llm, batch = small_llm(option), make_batch(*ROWS)
    model = tiny_model(llm=llm)  # type: ignore[arg-type]
    before = model(batch)
    set_trainable(model, {**STATES, "connector": "frozen", "llm": "lora"}, {"r": 2, "dropout": 0.0, "use_dora": True})
    torch.testing.assert_close(model(batch), before, rtol=1e-5, atol=1e-5)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    kinds = {name.split(".lora_")[1].split(".")[0] for name in trained}
    assert kinds == {"A", "B", "magnitude_vector"}
    assert len(trained) % 3 == 0
    lengths = [p for name, p in model.named_parameters() if "magnitude_vector" in name]
    model(batch).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in lengths)


def test_the_adapter_of_llama_3_has_its_known_size() -> None:
    """Rank 16 beside the linear layers of 32 layers: 16 * (in + out) of each; the meta device takes no memory."""
    llm = small_llm("llama3_8b", config=composed("llama3_8b")["config"], weights="meta")
    llm.add_lora(r=16)
    widths = [4096 + 4096, 4096 + 1024, 4096 + 1024, 4096 + 4096, *[4096 + 14336] * 3]  # q k v o, gate up down
    assert sum(llm.get_parameter(name).numel() for name in lora_names(llm)) == 32 * 16 * sum(widths) == 41_943_040


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("+stage.lora.rank=4", ["there is no option stage.lora.rank", "r, target_modules, tokens, use_dora"]),
        ("stage.lora.use_dora=maybe", ["stage.lora.use_dora='maybe' must be true or false"]),
        ("stage.lora.r=1.5", ["stage.lora.r=1.5 must be a whole number"]),
    ],
)
def test_a_slip_in_the_adapters_options(override: str, words: list[str]) -> None:
    told = refusal("llm=tiny", "stage=instruct", override)
    assert all(word in told for word in words), told


# --- quantisation and pairs that do not fit --------------------------------------------------------------------------


def refusal(*overrides: str) -> str:
    """What `check`, which runs before anything is loaded, says of these words."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        config.check(settings(*overrides))
    return str(caught.value)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantisation_needs_a_gpu_and_bitsandbytes(quantization: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("llm=llama3_8b", f"llm.quantization={quantization}", "stage=instruct")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    no_gpu = f"llm.quantization={quantization} needs a CUDA GPU and this machine has none; set llm.quantization=none"
    assert refusal(*words) == no_gpu
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        CausalLM(pretrained="no/such", config=None, quantization=quantization)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'vlm-template[quantization]'" in refusal(*words)
    assert "needs pretrained weights, but llm.weights=random" in refusal(*words, "llm.weights=random")


def test_the_meta_device_needs_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config.check(settings("llm=llama3_8b", "llm.quantization=nf4", "llm.weights=meta", "stage=instruct"))


@pytest.mark.parametrize("state", ["full", "{last_n: 2}"])
def test_rounded_weights_do_not_train(state: str) -> None:
    told = refusal("llm=llama3_8b", "llm.quantization=int8", "stage=instruct", f"stage.llm={state}")
    assert "cannot train weights quantized by llm.quantization=int8; set stage.llm=lora" in told
    assert told.startswith("stage.llm=full" if state == "full" else "stage.llm={'last_n': 2}")


META = ("encoder.weights=meta", "llm.weights=meta")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_manifest_tells_how_weights_are_stored(quantization: str) -> None:
    _, manifest = build.build_model(settings("llm=tiny", *META, f"llm.quantization={quantization}"))
    assert manifest["quantization"] == quantization


def test_rows_longer_than_the_llms_positions_are_refused() -> None:
    build.build_model(settings("llm=tiny", *META, "data.max_length=2048"))
    said = "data.max_length=2049, but this llm has 2048 positions; set data.max_length to at most 2048"
    with pytest.raises(ValueError, match=said):
        build.build_model(settings("llm=tiny", *META, "data.max_length=2049"))
    small_llm("flan_t5_xl").check_length(10**6)  # its positions are relative


def test_several_answers_for_an_encoder_decoder_are_refused_before_the_first_step() -> None:
    words = ("llm=flan_t5_xl", *META, "llm.config.num_layers=1", "stage=instruct")
    model, _ = build.build_model(settings(*words))
    data = build.connect_data(build.build_data(settings(*words), None), settings(*words), model)
    with pytest.raises(ValueError, match=r"has 3 answers, but an encoder-decoder llm learns 1 per row; set data."):
        data.preflight(num_samples=1, show=0)
    for change in ("data.train_on=last_assistant", "data.num_questions=1"):
        cfg = settings(*words, change)
        build.connect_data(build.build_data(cfg, None), cfg, model).preflight(num_samples=1, show=0)


def test_a_connector_on_the_layers_needs_a_decoder_only_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MLP, "fusion", "layers")
    config.check(settings("llm=opt_2_7b"))
    told = refusal("llm=flan_t5_xl")
    assert "connector MLP attaches to the layers of a decoder-only llm, but google/flan-t5-xl has an encoder" in told


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("bitsandbytes") is None,
    reason="needs a CUDA GPU and bitsandbytes",
)
@pytest.mark.parametrize(("quantization", "kind"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_an_adapter_trains_on_rounded_weights(quantization: Any, kind: str, tmp_path: Path) -> None:
    wider = shrunk("llama3_2_1b") | {"hidden_size": 64, "head_dim": 16}  # NF4 rounds 64 weights together
    folder = saved(small_llm("llama3_2_1b", config=wider), tmp_path)
    llm = CausalLM(pretrained=folder, config=None, quantization=quantization, dtype="bfloat16")
    inside = [m for m in llm.layers()[0].modules() if isinstance(m, nn.Linear)]
    assert {type(m).__name__ for m in inside} == {kind}
    llm.requires_grad_(False)
    llm.add_lora(r=2)
    for name in lora_names(llm):
        llm.get_parameter(name).requires_grad_(True)
    batch = make_batch(([11, 12], [21, 22])).to(llm.model.device)
    logits = llm(llm.embed(batch.input_ids), batch.attention_mask, batch.position_ids, batch.logits_mask)
    logits.float().square().sum().backward()
    learned = {name for name, p in llm.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert learned == {name for name in lora_names(llm) if "lora_B" in name}  # A learns once B is not zero


# --- any other model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "facts"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
        ("gpt_neox", {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}),
    ],
)
def test_hf_takes_what_the_folder_says(model_type: str, facts: dict[str, Any], tmp_path: Path) -> None:
    config = {"model_type": model_type, "vocab_size": 320, "initializer_range": 0.2, **facts}
    first = CausalLM(pretrained=None, config=config, weights="random")
    options = composed("hf") | {"pretrained": saved(first, tmp_path)}
    target = options.pop("_target_")
    assert target == "vlm.llms.causal.CausalLM"
    read, drawn, empty = (CausalLM(**{**options, "weights": w}) for w in ("pretrained", "random", "meta"))
    batch = make_batch(([11, 12, 13], [21, 22]), ([14], [23]))
    logits = [tiny_model(llm=one)(batch) for one in (first, read, drawn)]
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=0)
    assert not torch.allclose(logits[2], logits[0])
    full = first.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    torch.testing.assert_close(logits[0], full[batch.logits_mask], rtol=1e-5, atol=1e-5)
    assert [len(one.layers()) for one in (read, drawn, empty)] == [3, 3, 3]
    assert {p.device.type for p in empty.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("pretrained", "no weights for the llm: looked for the folder or hub id 'no/such' with its safetensors"),
        ("random", r"no configuration for the llm: looked for the folder or hub id 'no/such' \(no/such\)"),
    ],
)
def test_what_is_not_there_is_named(weights: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr("vlm.hub.look_up", unreachable)
    with pytest.raises(ValueError, match=words):
        CausalLM(pretrained="no/such", config=None, weights=weights)
    with pytest.raises(ValueError, match=r"no pretrained weights; set llm\.weights=random or llm\.pretrained="):
        CausalLM(pretrained=None, config=None, weights=weights)


@pytest.mark.parametrize("weights", ["pretrained", "random"])
@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (None, r"\(the folder has no config\.json\); .*llm\.pretrained=<folder>"),
        ({}, r"\(Transformers does not support its config\.json: Unrecognized model in [^.]*\); .*llm\.pretrained="),
        ({"model_type": "nothing"}, r"\(Transformers does not support its config\.json: .*\); .*llm\.pretrained="),
        (
            {"model_type": "clip_vision_model"},
            r"is a 'clip_vision_model', which .*CausalLM does not support; set llm\.pretr",
        ),
    ],
)
def test_a_folder_of_something_else_is_told_as_that(tmp_path: Path, weights: Any, facts: Any, words: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if facts is not None:
        (folder / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=words):
        CausalLM(pretrained=str(folder), config=None, weights=weights)


def test_foreign_code_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "foreign.py").write_text("open(__file__ + '.ran', 'w')\nraise SystemExit\n")
    facts = {"model_type": "foreign", "auto_map": {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.M"}}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(
        ValueError, match=r"come with their own code, which is not run by default; set llm\.trust_remote_code="
    ):
        CausalLM(pretrained=str(tmp_path), config=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "foreign.py"]
