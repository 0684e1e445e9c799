"""Every LLM option keeps the contract on a shrunk copy of its architecture, and has the published size at full."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra.utils import get_class
from torch import nn

from tests.helpers.llms import composed, facts, small_llm
from tests.helpers.parts import IMAGE, NUM_TOKENS, make_batch, tiny_model
from tests.helpers.text import encoder, say
from vlm.launch.entry import CONF
from vlm.schema import Sample
from vlm.text.templates import TEMPLATES
from vlm.training.optim import lora_names

OPTIONS = sorted(path.stem for path in (Path(CONF) / "llm").glob("*.yaml") if not path.name.startswith("_"))
# Parameters as the hub counts those of the checkpoint's safetensors; a tied matrix counts once.
PUBLISHED = {
    "flan_t5_xl": 2_849_757_184,
    "gemma3_1b": 999_885_952,
    "gemma3_270m": 268_098_176,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "llama3_8b": 8_030_261_248,
    "mistral_7b": 7_248_023_552,  # v0.3
    "opt_2_7b": 2_651_596_800,
    "opt_6_7b": 6_658_473_984,
    "phi4_mini": 3_836_021_760,
    "pythia_1_4b": 1_414_647_808,
    "qwen3_0_6b": 596_049_920,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "smollm2_135m": 134_515_008,
    "smollm2_1_7b": 1_711_376_384,
    "smollm2_360m": 361_821_120,
    "vicuna_13b": 13_015_864_320,
    "vicuna_7b": 6_738_415_616,
}
NAMED = sorted({*PUBLISHED, "tiny"})
SEPARATE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LINEARS = {
    **dict.fromkeys(("llama", "mistral", "qwen3", "gemma3_text"), SEPARATE),
    "gpt_neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "t5": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
}


def test_the_table_names_every_option() -> None:
    assert set(OPTIONS) == {*NAMED, "hf"}


@pytest.mark.parametrize("option", PUBLISHED)
def test_the_size_is_that_of_the_published_checkpoint(option: str) -> None:
    settings = composed(option) | {"weights": "meta"}
    llm = get_class(settings.pop("_target_"))(**settings)
    assert sum(parameter.numel() for parameter in llm.parameters()) == PUBLISHED[option]
    assert {parameter.device.type for parameter in llm.parameters()} == {"meta"}


@pytest.mark.parametrize("option", OPTIONS)
def test_no_option_runs_foreign_code_or_rounds_weights_unasked(option: str) -> None:
    settings = composed(option)
    assert (settings["trust_remote_code"], settings["quantization"]) == (False, "none")
    assert settings["gradient_checkpointing"] is False
    assert settings["chat_template"] in ({None} if option == "hf" else set(TEMPLATES))


ROWS = (([11, IMAGE, 12, 13], [21, 22]), ([14, 15], [23]), ([16, IMAGE], [24, 25, 26]))


@pytest.mark.parametrize("option", NAMED)
def test_embeds_layers_and_width(option: str) -> None:
    llm = small_llm(option)
    ids = torch.tensor([[11, 12, 13]])
    scale = llm.width**0.5 if option.startswith("gemma3") else 1.0
    torch.testing.assert_close(llm.embed(ids), llm.model.get_input_embeddings().weight[ids] * scale)
    assert llm.width == 32
    assert len(llm.layers()) == (4 if option == "flan_t5_xl" else 2)
    assert len({type(layer) for layer in llm.layers()}) == 1


@pytest.mark.parametrize("option", [option for option in NAMED if option != "flan_t5_xl"])
def test_narrowed_logits_are_the_full_ones(option: str) -> None:
    llm = small_llm(option)
    batch = make_batch(*((prompt, answer) for prompt, answer in ROWS if IMAGE not in prompt), ([14, 15, 16], [23, 24]))
    logits = llm(llm.embed(batch.input_ids), batch.attention_mask, batch.position_ids, batch.logits_mask)
    full = llm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    assert full.shape == (2, 5, 320)
    torch.testing.assert_close(logits, full[batch.logits_mask], rtol=1e-5, atol=1e-5)
    assert full.std() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("option", NAMED)
def test_both_attentions_agree(option: str) -> None:
    batch = make_batch(*ROWS)
    logits = [tiny_model(llm=small_llm(option, attention=attention))(batch) for attention in ("sdpa", "eager")]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("option", NAMED)
def test_greedy_words_are_the_repeated_argmax(option: str) -> None:
    model = tiny_model(llm=small_llm(option)).eval()
    batch = make_batch(*((prompt, []) for prompt, _ in ROWS), side="left")
    answers = model.generate(batch, stop_ids=[1], max_new_tokens=4)
    pixels = batch.pixel_values.split(batch.num_images.tolist())
    for (prompt, _), images, answer in zip(ROWS, pixels, answers.tolist(), strict=True):
        expected: list[int] = []
        for _ in range(4):
            with torch.no_grad():
                row = make_batch((prompt, [*expected, 7]), images=images, num_tokens=NUM_TOKENS)
                expected.append(int(model(row)[-1].argmax()))
        assert answer == expected


@pytest.mark.parametrize("option", NAMED)
def test_lora_lies_beside_every_linear_layer_but_the_head(option: str) -> None:
    llm = small_llm(option)
    before = set(dict(llm.named_parameters()))
    llm.add_lora(r=2)
    names = lora_names(llm)
    beside = {name.rpartition(".lora_")[0] for name in names}
    assert len(names) == 2 * len(beside)
    assert {name.rpartition(".")[2] for name in beside} == set(LINEARS[facts(option)["model_type"]])
    inside = [m for layer in llm.layers() for m in layer.modules()]
    assert len(beside) == sum(isinstance(m, nn.Linear) and 2 not in (m.in_features, m.out_features) for m in inside)
    kept = {name.replace(".base_layer.", ".") for name, _ in llm.named_parameters()} - set(names)
    assert kept == before
    assert not any("lm_head" in name for name in names)


@pytest.mark.parametrize("option", NAMED)
def test_what_is_learned_is_the_answer_and_its_end(option: str) -> None:
    """With the stand-in tokenizer, which knows every family's marks, so that random weights train with any template."""
    llm = small_llm(option)
    subject = encoder(llm.tokenizer, llm.chat_template, num_image_tokens=2)
    row = subject.encode(Sample("a/1", [], [say("user", None, "What?"), say("assistant", "A cat")]))
    end = {
        **dict.fromkeys(("chatml", "smollm2", "qwen3"), "<|im_end|>"),
        **dict.fromkeys(("llama3", "llama3_2"), "<|eot_id|>"),
        "gemma": "<end_of_turn>",
        "phi": "<|end|>",
    }
    space = " " if llm.chat_template in ("mistral", "vicuna_v1") else ""
    assert subject.supervised(row) == [space + "A cat" + end.get(str(llm.chat_template), "<eos>")]
    assert max(row.input_ids) < 320


@pytest.mark.parametrize("option", [option for option in NAMED if option != "flan_t5_xl"])
def test_rows_that_continue_one_beginning_are_computed_as_whole_rows(option: str) -> None:
    """The beginning is longer than the window of sliding attention, 8 tokens; the rows have different lengths."""
    llm, num = small_llm(option), 10
    assert llm.can_continue
    ids = torch.tensor([[*range(11, 21), 30, 31, 32, 33], [*range(11, 21), 40, 41, 0, 0]])  # B T
    mask = torch.tensor([[True] * 14, [True] * 12 + [False] * 2])  # B T
    wanted = torch.zeros_like(mask)
    wanted[0, 10:13] = wanted[1, 10:11] = True
    positions = torch.arange(14).expand(2, -1)
    embeds = llm.embed(ids)  # B T D
    with torch.no_grad():
        whole = llm(embeds, mask, positions, wanted)  # M V
        after = llm.continued(embeds[:1, :num], embeds[:, num:], mask[:, num:], wanted[:, num:])
    assert whole.shape == (4, whole.shape[1])
    torch.testing.assert_close(after, whole, atol=1e-4, rtol=1e-4)
