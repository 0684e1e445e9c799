"""vlm-import: LLaVA's weights become a run directory with the same logits, and a round trip keeps each bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaImageProcessor, LlavaProcessor

import vlm
from tests.helpers.exchange import HF, LLAVA, answers, export, import_, noise, one_process, run_of, tower
from tests.helpers.parts import FACTS
from tests.helpers.programs import QUICK, evaluate, train, weights
from vlm.exchange.from_llava import read_projector
from vlm.llms.bytes import byte_tokenizer
from vlm.training import artifact


def llava(folder: Path) -> LlavaForConditionalGeneration:
    """A small random one as its authors' is built: CLIP's layer before the last, an image token, padded images."""
    torch.manual_seed(0)
    small = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    eye = AutoConfig.for_model("clip_vision_model", **small, image_size=32, patch_size=16)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    config = LlavaConfig(
        vision_config=eye,
        text_config=AutoConfig.for_model("llama", **FACTS),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    square = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    LlavaProcessor(
        image_processor=LlavaImageProcessor(do_pad=True, **square),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return model


def test_a_folder_becomes_a_run_with_the_same_logits(
    tmp_path: Path, told: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    theirs, run = llava(tmp_path / "llava"), tmp_path / "run"
    capfd.readouterr()
    assert import_(tmp_path / "llava", f"out={run}") == 2
    assert told() == (
        f"Error: {tmp_path / 'llava'} does not say with which chat template it was trained; give "
        "chat_template=vicuna_v1 for LLaVA-1.5, or another name of docs/labels.md"
    )
    assert import_(tmp_path / "llava", f"out={run}", "chat_template=vicuna_v1") == 0
    manifest = artifact.read_manifest(run)
    assert [stage["name"] for stage in manifest["stages"]] == ["import"]
    assert manifest["bases"]["llm"]["pretrained"] == str(run / "llm")
    assert {path.name for path in run.iterdir()} == {"artifact", "config.yaml", "encoder", "llm"}
    moved = run.rename(tmp_path / "moved")
    ours: Any = vlm.load(moved, device="cpu", dtype="float32")
    batch = ours.encode(noise(40, 40, 0), "What is it?")
    ids = batch.input_ids.masked_fill(batch.image_mask, theirs.config.image_token_id)
    expected = theirs(input_ids=ids, pixel_values=batch.pixel_values).logits[0]
    model = ours.model
    embeds = model.llm.embed(batch.input_ids).masked_scatter(
        batch.image_mask[..., None], model.connector(model.encoder(batch.pixel_values))
    )
    everywhere = torch.ones_like(batch.attention_mask)
    found = model.llm(embeds, batch.attention_mask, batch.position_ids, everywhere)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert ours.model.encoder.transform.resize == "pad"
    assert import_(tmp_path / "llava", f"out={moved}", "chat_template=vicuna_v1") == 2
    assert told() == f"Error: out={moved} exists and is not an empty folder; choose another one"


def test_there_and_back_each_tensor_of_the_artifact_is_the_same(tmp_path: Path) -> None:
    run = run_of(tmp_path, *HF, tower("siglip_vision_model"), "connector=linear", *LLAVA, "encoder.layer=[1,-2]")
    with one_process():
        assert export(run, f"out={tmp_path / 'out'}", "samples=1") == 0
    data = [f"data.annotations={tmp_path / 'captions.jsonl'}", f"data.images={tmp_path / 'photos'}"]
    options = ["data=captions", *data, "data.val_fraction=0.5"]
    assert import_(tmp_path / "out", f"out={tmp_path / 'back'}", *options) == 0
    before, after = weights(run), weights(tmp_path / "back")
    assert before.keys() == after.keys() == {"connector.layers.0.weight", "connector.layers.0.bias"}
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    image = noise(70, 50, 3)
    expected = vlm.load(run, device="cpu", dtype="float32").answer(image, "What?", max_new_tokens=12)
    assert (
        vlm.load(tmp_path / "back", device="cpu", dtype="float32").answer(image, "What?", max_new_tokens=12) == expected
    )
    assert answers(tmp_path / "out", [[image]], "What?") == [expected]
    options = ["num_samples=2", "batch_size=2", "trainer=cpu"]
    assert evaluate(f"ckpt={tmp_path / 'back'}", *options, f"out={tmp_path / 'eval'}") == 0


@pytest.mark.parametrize("kind", [pytest.param("bin", marks=pytest.mark.slow), "safetensors"])
def test_the_projector_of_the_authors(tmp_path: Path, kind: str, told: Any) -> None:
    """The published names and layout: model.mm_projector.0 and .2, a GELU between them, in float16."""
    run, file = tmp_path / "run", tmp_path / f"mm_projector.{kind}"
    shapes = {"0.weight": (64, 64), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    state = {f"model.mm_projector.{name}": torch.randn(shape).half() for name, shape in shapes.items()}
    torch.save(state, file) if kind == "bin" else save_file(state, file)
    assert import_(file, f"out={run}", "encoder=tiny", "llm=tiny") == 0
    tensors = weights(run)
    assert tensors.keys() == {f"connector.layers.{n}.{k}" for n in (0, 1) for k in ("weight", "bias")}
    torch.testing.assert_close(tensors["connector.layers.1.weight"], state["model.mm_projector.2.weight"].float())
    if kind == "bin":
        parts = ["encoder=tiny", "llm=tiny", "connector=mlp", *LLAVA]
        small = [option for option in QUICK if not option.startswith(("encoder", "llm"))]
        assert train(*small, *parts, f"ckpt={run}", f"run_dir={tmp_path / 'next'}") == 0
        return
    assert (
        import_(file, f"out={tmp_path / 'other'}", "encoder=tiny", "llm=tiny", "encoder.model_args.embed_dim=32") == 2
    )
    assert told() == (
        f"Error: {file} does not fit these parts: connector.layers.0.weight has shape (64, 64), here (64, 32); choose "
        "the encoder, connector and LLM that it was trained with"
    )
    assert not (tmp_path / "other").exists()


def test_a_pickle_that_holds_code_is_refused(tmp_path: Path, told: Any) -> None:
    file = tmp_path / "mm_projector.bin"
    torch.save({"model.mm_projector.0.weight": Image.new("RGB", (1, 1))}, file)
    assert import_(file, f"out={tmp_path / 'run'}") == 2
    assert told() == f"Error: {file} has no tensors that can be read safely (UnpicklingError); take another"


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^'vision.weight' is not a tensor of LLaVA's mm_projector.bin, such as "):
        read_projector({"vision.weight": torch.zeros(1)})
