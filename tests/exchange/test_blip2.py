"""BLIP-2 and InstructBLIP: Transformers' folder -> run -> folder -> run keeps each bit and each answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import processors
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Blip2Processor,
    Blip2VisionConfig,
    Blip2VisionModel,
    BlipImageProcessor,
    InstructBlipProcessor,
)

import vlm
from tests.helpers.blip2 import captioner, instructed, shaken
from tests.helpers.exchange import captions, export, import_, noise, one_process
from tests.helpers.llms import T5
from tests.helpers.pairs import PACKAGE
from tests.helpers.parts import SIDE
from tests.helpers.programs import weights
from vlm.connectors.bert_tokenizer import load_tokenizer
from vlm.encoders.timm import TimmEncoder
from vlm.exchange.blip2 import vision_options, vision_state
from vlm.exchange.reload import inputs_of
from vlm.llms.bytes import byte_tokenizer

QUESTION = "What is it?"
# The prompt that a template writes, without its images.
PROMPTS = {
    "opt": ("blip2", f"{QUESTION}<bos>"),
    "t5": ("t5", f"{QUESTION}<eos>"),
    "instruct": ("instructblip", QUESTION),
}


def published(folder: Path, kind: str) -> Path:
    """A folder as Transformers has them: its processor puts the visual tokens first, and knows no chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    image_processor = BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    model: Any
    if kind == "instruct":
        model = instructed(folder)
        bos = ("<bos>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[bos]
        )
        reads = load_tokenizer("none", PACKAGE, option="none")
        InstructBlipProcessor(image_processor, tokenizer, reads, num_query_tokens=4).save_pretrained(folder)
    else:
        model = captioner(folder, T5) if kind == "t5" else captioner(folder)
        Blip2Processor(image_processor, tokenizer, num_query_tokens=4).save_pretrained(folder)
    model.config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    model.config.save_pretrained(folder)
    return folder


def answer(folder: Path, image: Image.Image, prompt: str, stop_ids: list[int]) -> str:
    """The greedy answer of Transformers to a whole prompt."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    return decoded(model, processor, inputs, eos_token_id=stop_ids)


def decoded(model: Any, processor: Any, inputs: Any, **options: Any) -> str:
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, **options)[0]
    new = ids if model.config.text_config.is_encoder_decoder else ids[inputs["input_ids"].shape[1] :]
    return processor.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("kind", ["opt", pytest.param("t5", marks=pytest.mark.slow), "instruct"])
def test_there_and_back(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template, prompt = PROMPTS[kind]
    theirs, run, out, back = published(tmp_path / "theirs", kind), tmp_path / "run", tmp_path / "out", tmp_path / "back"
    data = [*captions(tmp_path / "data"), f"data.prompt='{QUESTION}'"]
    assert import_(theirs, f"out={run}", f"chat_template={template}", *data) == 0
    assert "its logits differ from those of Transformers by up to " in capsys.readouterr().out
    ours: Any = vlm.load(run.rename(tmp_path / "moved"), device="cpu", dtype="float32")
    images = [noise(50, 90, seed) for seed in range(3)]
    expected = [ours.answer(image, QUESTION, max_new_tokens=12) for image in images]
    assert [answer(theirs, image, prompt, ours._reader.text.stop_ids) for image in images] == expected
    assert len(set(expected)) > 1
    (tmp_path / "moved").rename(run)

    with one_process():
        assert export(run, f"out={out}", "samples=2", "max_new_tokens=8") == 0
    before, after = load_file(theirs / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    model = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    assert type(model).__name__ == json.loads((theirs / "config.json").read_text())["architectures"][0]
    processor = AutoProcessor.from_pretrained(out)
    images[0].save(tmp_path / "image.png")
    content = [{"type": "image", "path": str(tmp_path / "image.png")}, {"type": "text", "text": QUESTION}]
    inputs = inputs_of(processor, [{"role": "user", "content": content}])
    assert decoded(model, processor, inputs) == expected[0], "with its own chat template and stop ids"

    assert import_(out, f"out={back}", *data) == 0
    torch.testing.assert_close(weights(back), weights(run), rtol=0, atol=0)
    assert weights(back).keys() == weights(run).keys()


@pytest.mark.parametrize("name", ["eva_giant_patch14_clip_224", "vit_tiny_patch16_224"])
def test_the_vision_model_gives_the_features_of_timms(name: str) -> None:
    """EVA-CLIP's has no bias of the keys; a vision transformer has."""
    small = {"patch_size": SIDE // 2, "embed_dim": 24, "depth": 3, "num_heads": 2}
    encoder = TimmEncoder(name=name, weights="random", image_size=SIDE, layer=-2, keep_tokens=True, model_args=small)
    encoder = shaken(encoder)
    theirs = Blip2VisionModel(Blip2VisionConfig(**vision_options(encoder))).eval()
    report = theirs.load_state_dict(vision_state(encoder), strict=False)
    assert report.missing_keys == ["post_layernorm.weight", "post_layernorm.bias"]
    pixels = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        expected = theirs(pixels, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(encoder(pixels), expected, atol=1e-5, rtol=0)
