"""vlm-export as LlavaForConditionalGeneration: Transformers alone answers as the run does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration, pipeline

import vlm
from tests.helpers.exchange import HF, LLAVA, answers, export, noise, one_process, run_of, tower
from tests.helpers.programs import weights
from vlm.inference import TrainedModel

QUESTION = "What is it?"
NUM_DIFFERENT = {"clip": 4, "siglip": 1}  # answers; an LLM that ties random embeddings repeats itself
FORMS = {
    "clip": [*HF, tower("clip_vision_model"), "connector=mlp", *LLAVA, "encoder.resize=crop"],
    # Another image size, two layers, one linear layer, a system prompt, and an LLM that ties and scales its embeddings.
    "siglip": [
        *HF,
        *(tower("siglip_vision_model"), "encoder.layer=[1,-1]", "encoder.image_size=48", "encoder.resize=pad"),
        *("connector=linear", *LLAVA, "data.system_prompt='Say \"it\".\\n'", "llm.chat_template=gemma"),
        *("llm.config.model_type=gemma3_text", "+llm.config.head_dim=16", "llm.config.tie_word_embeddings=true"),
    ],
}


@pytest.fixture(scope="module", params=["clip", pytest.param("siglip", marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp(request.param), *FORMS[request.param])


@pytest.fixture(scope="module")
def trained(run: Path) -> TrainedModel:
    return vlm.load(run, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def out(run: Path) -> Path:
    out = run.parent / "exports" / "llava"
    with one_process():
        assert export(f"ckpt={run}", "to=hf", f"out={out}", "samples=2") == 0
    return out


def test_transformers_alone_answers_as_the_run_does(
    request: pytest.FixtureRequest, run: Path, out: Path, trained: TrainedModel
) -> None:
    asked = [[noise(50, 90, seed)] for seed in range(3)]
    asked = [*asked, [asked[0][0], asked[1][0]], []]
    expected = [trained.answer(images, QUESTION, max_new_tokens=12) for images in asked]
    assert answers(out, asked, QUESTION) == expected
    assert len(set(expected)) >= NUM_DIFFERENT[request.node.callspec.params["run"]]
    model, report = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert type(model) is LlavaForConditionalGeneration
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    projector = {f"connector.layers.{number}": f"linear_{number + 1}" for number in (0, 1)}
    for name, tensor in weights(run).items():
        module, _, kind = name.rpartition(".")
        torch.testing.assert_close(
            getattr(model.model.multi_modal_projector, projector[module]).get_parameter(kind).data,
            tensor,
            rtol=0,
            atol=0,
        )


def test_the_folder_has_all_that_it_needs_and_says_where_it_is_from(run: Path, out: Path) -> None:
    names = {path.name for path in out.iterdir()}
    needed = {"config.json", "generation_config.json", "model.safetensors", "processor_config.json", "tokenizer.json"}
    assert needed | {"tokenizer_config.json", "chat_template.jinja", "vlm_export.json"} == names
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {(run / "config.yaml").stat().st_mode & 0o777}
    facts = json.loads((out / "vlm_export.json").read_text())
    assert (facts["run"], facts["lora"], facts["check"]["num_samples"]) == (str(run), None, 2)
    assert facts["check"]["logits"] < 1e-5
    assert [path.name for path in out.parent.iterdir()] == ["llava"]


def test_the_pipeline_answers(out: Path, trained: TrainedModel) -> None:
    image = noise(70, 70, 5)
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    ask = pipeline("image-text-to-text", model=str(out), dtype=torch.float32)
    [told] = ask(text=[{"role": "user", "content": content}], max_new_tokens=12, return_full_text=False)
    assert told["generated_text"].strip() == trained.answer(image, QUESTION, max_new_tokens=12)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = ["stage=instruct", "stage.lr.llm=0.1", "trainer.precision=32-true"]
    return run_of(tmp_path_factory.mktemp("lora"), *FORMS["clip"], *options)


@pytest.mark.slow
def test_an_adapter_is_merged_or_kept(adapted: Path) -> None:
    image, base = noise(80, 60, 1), vlm.load(adapted, device="cpu", dtype="float32")
    expected = base.answer(image, QUESTION, max_new_tokens=12)
    with base.model.without_adapter():
        without = base.answer(image, QUESTION, max_new_tokens=12)
    merged, kept = adapted.parent / "merged", adapted.parent / "kept"
    for out, option in ((merged, "merge"), (kept, "keep")):
        out.mkdir()  # an empty folder is taken
        with one_process():
            assert export(adapted, f"out={out}", f"lora={option}", "samples=2") == 0
    assert answers(merged, [[image]], QUESTION) == answers(kept, [[image]], QUESTION, adapter="adapter") == [expected]
    assert answers(kept, [[image]], QUESTION) == [without] != [expected]
    assert json.loads((kept / "vlm_export.json").read_text())["lora"] == "adapter"
    assert not (merged / "adapter").exists()


@pytest.mark.slow
def test_weights_in_bfloat16(adapted: Path) -> None:
    out = adapted.parent / "half"
    with one_process():
        assert export(adapted, f"out={out}", "dtype=bfloat16", "samples=2") == 0
    tensors = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    trained = weights(adapted)["connector.layers.0.weight"]
    torch.testing.assert_close(tensors["multi_modal_projector.linear_1.weight"], trained.bfloat16())


def test_an_export_that_answers_differently_is_refused(
    tmp_path: Path, told: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """Granite divides its logits, which LLaVA's class does not."""
    facts = ["llm.config.model_type=granite", "+llm.config.logits_scaling=2.0"]
    run = run_of(tmp_path, *FORMS["clip"], *facts)
    before = {path.name for path in tmp_path.iterdir()}
    capfd.readouterr()
    with one_process():
        assert export(run, f"out={tmp_path / 'out'}", "samples=1") == 2
    pattern = (
        r"Error: the export differs from the run on the held-out sample 'captions.jsonl:\d': its logits differ by "
        r"up to (\S+) where the largest is (\S+) \(1e-03 of that is allowed\); nothing is written"
    )
    found = re.fullmatch(pattern, told())
    assert found
    assert float(found[1]) == pytest.approx(float(found[2]), rel=0.01)  # twice the logits
    assert {path.name for path in tmp_path.iterdir()} == before
