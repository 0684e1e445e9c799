"""Tokens beside the vocabulary: their rows are trained and saved, and the LLM's own tables stay as they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.llms import FAMILIES, small_llm
from tests.helpers.parts import FACTS, VOCABULARY, make_batch, make_module, tiny_llm, tiny_model
from tests.helpers.programs import QUICK, artifact_program, evaluate, program, train, weights
from vlm.cli import export
from vlm.llms.bytes import byte_tokenizer
from vlm.llms.causal import CausalLM
from vlm.training import artifact

NAMES = ["<end>", "<image>"]
FIRST = len(byte_tokenizer())
TOKENS = 'llm.added_tokens=["<end>","<image>"]'
ADDED = [TOKENS, "stage.llm={only: [added_tokens]}", "stage.lr.llm=1.0e-2", "trainer.val_check_interval=1"]
ADDED += ["stage.schedule=constant", "stage.warmup_ratio=0.0"]  # the rate does not depend on the number of steps


def extended(family: str = "llama", **facts: Any) -> CausalLM:
    torch.manual_seed(0)
    config = {"model_type": family, **FACTS, **facts}
    options: dict[str, Any] = {"weights": "random", "chat_template": "chatml", "attention": "eager"}
    return CausalLM(pretrained=None, config=config, added_tokens=NAMES, **options)


def logits(llm: CausalLM, ids: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    return llm(llm.embed(ids), everywhere, positions, everywhere)


@pytest.mark.parametrize("vocabulary", [VOCABULARY, FIRST, FIRST + 1])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma2"])
@torch.no_grad()
def test_an_llm_with_added_tokens_is_one_with_larger_tables(family: str, vocabulary: int) -> None:
    """Whose rows at these ids are the added ones; also if the LLM has unused rows there, or fewer than these tokens."""
    facts = {**FAMILIES[family], "tie_word_embeddings": False, "vocab_size": vocabulary}
    llm = extended(family, **facts)
    own = {name: tensor.clone() for name, tensor in llm.model.state_dict().items()}
    ids = torch.tensor([[5, 6, FIRST, 7, FIRST + 1], [8, FIRST + 1, 9, 9, 3]])
    found = logits(llm, ids)
    assert llm.added_tokens is not None
    size = max(vocabulary, FIRST + 2)
    torch.manual_seed(0)
    larger: Any = AutoModelForCausalLM.from_config(
        type(llm.model.config)(**{**llm.model.config.to_dict(), "vocab_size": size}), attn_implementation="eager"
    ).eval()
    larger.load_state_dict({**larger.state_dict(), **{k: v for k, v in own.items() if v.shape[0] != vocabulary}})
    scale = 32**0.5 if family.startswith("gemma") else 1.0  # of their embeddings
    for module, rows, name in (
        (larger.get_input_embeddings(), llm.added_tokens.input / scale, "model.embed_tokens.weight"),
        (larger.get_output_embeddings(), llm.added_tokens.output, "lm_head.weight"),
    ):
        module.weight[:vocabulary] = own[name]
        module.weight[FIRST : FIRST + 2] = rows
    torch.testing.assert_close(found, larger(ids).logits.flatten(0, 1), rtol=0, atol=1e-5)
    assert llm.model.config.vocab_size == vocabulary
    torch.testing.assert_close(dict(llm.model.state_dict()), own, rtol=0, atol=0)


@torch.no_grad()
def test_the_rows_that_a_tokenizer_has_beyond_the_llms_are_never_likely() -> None:
    llm = extended(vocab_size=FIRST)
    assert llm.added_tokens is not None
    llm.added_tokens.first_id += 3
    found = logits(llm, torch.tensor([[5, 6]]))
    assert found.shape == (2, FIRST + 5)
    assert (found[:, FIRST : FIRST + 3] == -torch.inf).all()
    assert found[:, FIRST + 3 :].isfinite().all()


@pytest.mark.parametrize("beams", [1, 3])
def test_they_can_be_generated(beams: int) -> None:
    llm = extended(vocab_size=FIRST)
    assert llm.added_tokens is not None
    with torch.no_grad():
        row = llm.added_tokens.output[0] * 1000
        llm.added_tokens.output.copy_(torch.stack([row, -row]))
    prompt = torch.tensor([[5, FIRST, 6]])
    found = llm.generate(
        llm.embed(prompt), prompt > 0, stop_ids=[2], max_new_tokens=4, num_beams=beams, do_sample=False
    )
    assert {FIRST, FIRST + 1} & set(found[0].tolist())
    assert llm.tokenizer.decode([FIRST, 77], skip_special_tokens=True) == llm.tokenizer.decode([77])
    assert llm.model.config.vocab_size == FIRST


def test_the_tokenizer_knows_them() -> None:
    llm = extended()
    assert llm.tokenizer("a<end><image>", add_special_tokens=False).input_ids[1:] == [FIRST, FIRST + 1]
    with pytest.raises(ValueError, match=r"^llm.added_tokens has '<eos>', which the llm's tokenizer has already; "):
        CausalLM(pretrained=None, config={"model_type": "llama", **FACTS}, weights="random", added_tokens=["<eos>"])


def test_an_encoder_decoder_has_them_too() -> None:
    llm = small_llm("flan_t5_xl", added_tokens=NAMES)
    assert llm.added_tokens is not None
    embeds = llm.embed(torch.tensor([[FIRST, 5]]))
    torch.testing.assert_close(embeds[0, 0], llm.added_tokens.input[0], rtol=0, atol=0)
    found = llm.generate(embeds, embeds[..., 0] < torch.inf, stop_ids=[2], max_new_tokens=3)
    assert found.shape[0] == 1


def test_gradients_reach_the_rows_alone() -> None:
    module = make_module(tiny_model(llm=extended()), states={"llm": {"only": ["added_tokens"]}})
    module.model(make_batch(([11, FIRST, 12], [FIRST + 1, 13]))).square().sum().backward()
    trained = {name for name, p in module.model.llm.named_parameters() if p.grad is not None}
    assert trained == {"added_tokens.input", "added_tokens.output"}
    assert module.model.llm.added_tokens.input.grad.any(1).tolist() == [True, True]
    lora = make_module(tiny_model(llm=extended()), states={"llm": "lora"}).model.llm
    others = {name for name, p in lora.named_parameters() if p.requires_grad and "lora_" not in name}
    assert others == trained


def test_the_embeddings_of_other_tokens_are_bit_equal() -> None:
    ids = torch.arange(VOCABULARY)[None]
    known = torch.ones(VOCABULARY, dtype=torch.bool)
    known[FIRST : FIRST + 2] = False
    assert torch.equal(extended().embed(ids)[0, known], tiny_llm().embed(ids)[0, known])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("added") / "run"
    assert train(*QUICK, *ADDED, f"run_dir={run}") == 0
    return run


def test_a_run_saves_the_rows(run_dir: Path) -> None:
    names = {name for name in weights(run_dir) if name.startswith("llm.")}
    assert names == {"llm.added_tokens.input", "llm.added_tokens.output"}
    manifest = artifact.read_manifest(run_dir)
    assert manifest["bases"]["llm"]["added_tokens"] == NAMES
    assert evaluate(f"ckpt={run_dir}", "num_samples=2", "batch_size=2", "trainer=cpu") == 0


def test_resumed_it_is_the_same_run(run_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(*QUICK, *ADDED, f"run_dir={run}", "trainer.max_steps=1") == 0
    assert train(f"resume={run}", "resume.allow=[trainer.max_steps]", "trainer.max_steps=2") == 0
    torch.testing.assert_close(weights(run), weights(run_dir), rtol=0, atol=0)


def test_the_next_stage_has_them(run_dir: Path, tmp_path: Path, told: Any) -> None:
    before = weights(run_dir)["llm.added_tokens.input"]
    options = [*QUICK, f"ckpt={run_dir}", TOKENS]
    assert train(*options, f"run_dir={tmp_path / 'frozen'}") == 0
    assert torch.equal(weights(tmp_path / "frozen")["llm.added_tokens.input"], before)
    assert train(*QUICK, f"ckpt={run_dir}", f"run_dir={tmp_path / 'other'}") == 2
    assert "does not fit this model: 2 tensors differ, first 'llm.added_tokens.input'" in told()
    assert train(*options[:-1], *ADDED[1:], 'llm.added_tokens=["<end>","<box>"]', f"run_dir={tmp_path / 'other'}") == 2
    assert "was trained with bases.llm.added_tokens = ['<end>', '<image>'], here it is ['<end>', '<box>']" in told()
    facts = ["+llm.config.rms_norm_eps=0.5"]
    assert train(*options, *facts, f"run_dir={tmp_path / 'other'}") == 2
    assert "was trained with bases.llm.config.rms_norm_eps" in told()


def test_what_has_no_place_for_them_is_refused(run_dir: Path, tmp_path: Path, told: Any) -> None:
    assert program(export.main, "vlm-export", f"ckpt={run_dir}", "to=hf", f"out={tmp_path / 'out'}") == 2
    assert "has llm.added_tokens=['<end>', '<image>'], for which no export has a place" in told()
    assert artifact_program("merge", f"ckpt={run_dir}", f"out={tmp_path / 'out'}") == 2
    assert "has llm.added_tokens=['<end>', '<image>'], which cannot be merged; use the run as it is" in told()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["stage.llm={only: [added_tokens]}", "stage.lr.llm=1"],
            "stage.llm={only: [added_tokens]} trains the rows of llm.added_tokens, and there are none; set "
            "llm.added_tokens=[<token>] or stage.llm=frozen",
        ),
        (
            ['llm.added_tokens=["<x>"]'],
            "llm.added_tokens=['<x>'] have new rows, which stage.llm=frozen leaves random; set "
            "stage.llm={only: [added_tokens]} and stage.lr.llm",
        ),
    ],
)
def test_refusals(options: list[str], said: str, told: Any, tmp_path: Path) -> None:
    assert train(*QUICK, *options, f"run_dir={tmp_path / 'run'}") == 2
    assert re.sub(r"\s+", " ", told()) == f"Error: {said}"
