"""vlm-export as a folder with its own modeling file, for what no class of Transformers holds."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vlm
from tests.helpers.exchange import HF, answers, export, noise, one_process, run_of, tower
from tests.helpers.programs import weights

QUESTION = "What is it?"
QFORMER = "depth=2 width=32 num_heads=2 num_queries=3"
FORMS = {
    "mlp": ["encoder=tiny", "encoder.image_size=32", "connector=mlp"],
    "qformer": [
        *(*HF, tower("clip_vision_model"), "connector=qformer"),
        *(f"connector.{option}" for option in QFORMER.split()),
    ],
    "lora": [
        *("encoder=efficientnet_lite0", "encoder.weights=random", "encoder.image_size=64"),
        *("stage=instruct", "stage.lr.llm=0.1"),
    ],
    "after_image": [
        *("encoder=tiny", "encoder.image_size=32", "stage=instruct", "stage.lr.llm=0.1"),
        *("stage.lora.tokens=after_image", "data.text_replay=0"),
    ],
}


SLOW = [pytest.param(form, marks=pytest.mark.slow) for form in ("qformer", "lora", "after_image")]


@pytest.mark.parametrize("form", ["mlp", *SLOW])
def test_a_folder_with_its_own_code_answers_as_the_run_does(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = run_of(tmp_path, *FORMS[form]), tmp_path / "own"
    fresh, keep = form == "mlp", ["lora=keep"] if form == "lora" else []
    with nullcontext() if fresh else one_process():
        assert export(run, f"out={out}", *keep, "samples=2") == 0
    nearest = "Blip2" if form == "qformer" else "Llava"
    message = f"Transformers needs trust_remote_code=True. {nearest}ForConditionalGeneration cannot hold it: "
    assert message in capsys.readouterr().out
    trained = vlm.load(run, device="cpu", dtype="float32")
    asked = [[noise(50, 90, 1)], [noise(90, 50, 2)], [noise(90, 50, 2), noise(60, 60, 3)], []]
    adapter = "adapter" if keep else None
    with one_process():
        found = answers(out, asked, QUESTION, adapter=adapter, trust_remote_code=True)
        with pytest.raises(ValueError, match="trust_remote_code"):
            answers(out, [[]], QUESTION)
    assert found == [trained.answer(images, QUESTION, max_new_tokens=12) for images in asked]
    if form in ("lora", "after_image"):
        with trained.model.without_adapter():
            without = [trained.answer(images, QUESTION, max_new_tokens=12) for images in asked]
        assert [one != other for one, other in zip(found, without, strict=True)] == [True] * 3 + [form == "lora"]
    tensors = load_file(out / "model.safetensors")
    for name, tensor in weights(run).items():
        if name.startswith("connector."):
            torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0)


def test_the_code_imports_nothing_of_this_package_and_the_weights_are_written_once(tmp_path: Path) -> None:
    run, out = run_of(tmp_path, *FORMS["mlp"], "llm.config.tie_word_embeddings=true"), tmp_path / "own"
    with one_process():
        assert export(run, f"out={out}", "samples=1", "dtype=bfloat16") == 0
    tensors = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "language_model.model.embed_tokens.weight" in tensors
    assert "language_model.lm_head.weight" not in tensors  # tied, so written once
    code = {path.name: path.read_text() for path in out.glob("*.py")}
    assert {"modeling_vlm.py", "vlm_connectors_mlp.py", "vlm_encoders_timm.py"} <= code.keys()
    assert "vlm_encoders_hf.py" not in code
    for text in code.values():
        assert "from vlm." not in text
        assert "import jaxtyping" not in text
        assert text.startswith("# Copied from vlm-template")
    assert str(run) not in (out / "config.json").read_text()
    assert json.loads((out / "config.json").read_text())["architectures"] == ["VLMForConditionalGeneration"]
