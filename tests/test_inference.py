"""A trained run answers from Python with the prompt and the answers of its own validation, without its data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

import vlm
from tests.helpers.llms import t5
from tests.helpers.parts import tiny_model
from tests.helpers.programs import LIVELY, QUICK, artifact_program, read, train
from tests.helpers.sources import picture
from vlm import build, config
from vlm.data.collate import collate
from vlm.inference import TrainedModel
from vlm.schema import Batch, Sample

NEW = 8  # tokens of an answer
COLORS = ("red", "blue", "lime", "black", "gray", "navy", "olive", "teal", "maroon", "purple", "silver", "aqua")
MARKED = "data.prompt='What is in\n<image>?'"
FORMS = {
    "tokens": [MARKED],
    "layers": ["connector=cross_attention", r"data.system_prompt='A \<image> is shown.'"],
    "tiles": ["encoder.tiles.grids=[[1,2]]", "encoder.tiles.row_separator=true"],
}


@pytest.fixture(scope="module", params=FORMS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Batch, list]:
    """A run on captions whose data is gone, the prompts of its validation, and the images and questions of these."""
    folder = tmp_path_factory.mktemp(request.param)
    lines = [f'{{"image": "{color}.png", "caption": "All {color}."}}\n' for color in COLORS]
    (folder / "captions.jsonl").write_text("".join(lines))
    for color in COLORS:
        picture(folder / "photos" / f"{color}.png", (40, 20), Image.new("RGB", (1, 1), color).getpixel((0, 0)))
    files = [f"data.annotations={folder / 'captions.jsonl'}", f"data.images={folder / 'photos'}"]
    data = ["data=captions", *files, "data.val_fraction=0.5", f"evaluators.answers.max_new_tokens={NEW}"]
    run = folder / "run"
    assert train(*QUICK, *LIVELY, *FORMS[request.param], *data, f"run_dir={run}") == 0
    settings, _ = config.read_config(run, with_data=True)
    model, _ = build.build_model(settings)
    module = build.connect_data(build.build_data(settings, None), settings, model)
    indices = module.val_indices(2)
    asked = [(module.splits["val"][index].images[0], settings["data"]["prompt"]) for index in indices]
    prompts = next(module.prompts(indices, 2))
    (folder / "captions.jsonl").unlink()
    shutil.rmtree(folder / "photos")
    return run, prompts, asked


@pytest.fixture(scope="module")
def model(trained: tuple[Path, Batch, list]) -> TrainedModel:
    return vlm.load(trained[0], device="cpu")


def assert_same(ours: Batch, theirs: Batch) -> None:
    for field in fields(Batch):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(mine, Tensor):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)
    assert ours.layouts == theirs.layouts


def test_the_prompt_is_that_of_validation(model: TrainedModel, trained: tuple[Path, Batch, list]) -> None:
    _, prompts, asked = trained
    samples = [model._sample(question, image) for image, question in asked]
    assert_same(model._batch(samples), prompts)
    image, question = asked[0]
    assert_same(model.encode(image, question), model._batch(samples[:1]))


def test_greedy_answers_are_those_in_the_samples_of_the_run(
    model: TrainedModel, trained: tuple[Path, Batch, list], tmp_path: Path
) -> None:
    run, _, asked = trained
    expected = [line["prediction"] for line in read(run / "samples.jsonl")]
    images, questions = [image for image, _ in asked], [question for _, question in asked]
    assert len(expected) == 2
    assert all(expected)
    assert model.answer(images, questions, max_new_tokens=NEW) == expected
    assert model.answer(images, questions, max_new_tokens=NEW, batch_size=1) == expected
    assert model.answer(images[0], questions, max_new_tokens=NEW)[0] == expected[0]
    assert model.answer(images[1], questions[1], max_new_tokens=NEW) == expected[1]
    assert model.questions == questions[:1]
    assert model.answer(images[1], max_new_tokens=NEW) == expected[1]
    file = tmp_path / "a folder" / "one.png"
    file.parent.mkdir()
    images[0].save(file)
    for path in (file, str(file)):
        assert model.answer(path, questions[0], max_new_tokens=NEW) == expected[0]
    (tmp_path / "link.png").symlink_to(file)
    assert model.answer([[tmp_path / "link.png"], [images[1]]], questions, max_new_tokens=NEW) == expected
    assert model.answer([], [], max_new_tokens=NEW) == []


def test_a_log_likelihood_is_that_of_the_loss(model: TrainedModel, trained: tuple[Path, Batch, list]) -> None:
    """By the cross-entropy of the conversation with the answer, padded on the other side."""
    image, question = trained[2][0]
    asked = model._sample(question, image)
    for answer in ("All red.", "x"):
        turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        sample = replace(asked, messages=[*asked.messages, turn])
        text = model._reader.text
        rows = [model._reader.row(sample, text.encode(sample))]
        batch = collate(rows, spec=model._reader.spec, pad_id=text.pad_id, side="right")
        with torch.no_grad(), model._autocast():
            logits = model.model(batch).float()
        found = model.log_likelihood(image, question, answer)
        loss = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum")
        assert found.nats == pytest.approx(-float(loss), rel=1e-4)
        assert found.num_tokens == len(batch.targets) == len(answer) + 1  # bytes, and the end of the turn
        assert found.is_greedy == torch.equal(logits.argmax(1), batch.targets)


def test_pieces_of_a_stream_are_the_answer(model: TrainedModel, trained: tuple[Path, Batch, list]) -> None:
    image, question = trained[2][0]
    for number in (1, 40):
        pieces = list(model.stream(image, question, max_new_tokens=number))
        assert "".join(pieces) == model.answer(image, question, max_new_tokens=number)
    assert len(pieces) > 2


def test_a_beam_search_has_one_piece(model: TrainedModel, trained: tuple[Path, Batch, list]) -> None:
    image, question = trained[2][0]
    options: dict = {"max_new_tokens": NEW, "num_beams": 2}
    assert list(model.stream(image, question, **options)) == [model.answer(image, question, **options)]
    assert model.chat().ask(question, image, **options) == model.answer(image, question, **options)


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on questions about shapes, with an adapter."""
    run = tmp_path_factory.mktemp("talks") / "run"
    options = [*LIVELY, "stage=instruct", "trainer.precision=32-true", "data.num_questions=3", "stage.lr.llm=0.05"]
    assert train(*QUICK, *options, f"run_dir={run}") == 0
    return run


@pytest.fixture(scope="module")
def talker(talks: Path) -> TrainedModel:
    return vlm.load(talks, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def talk(talks: Path, talker: TrainedModel) -> tuple[Sample, Batch]:
    """A conversation of three questions, and its prompt as the data makes it."""
    settings, _ = config.read_config(talks, with_data=True)
    data = build.connect_data(build.build_data(settings, None), settings, talker.model)
    sample = data.splits["train"][0]
    row = data.reader.row(sample, data.text.encode_prompt(sample))
    return sample, collate([row], spec=data.spec, pad_id=data.text.pad_id, side="left")


def words(message: Any) -> str:
    return message["content"][-1]["text"]


def test_a_later_turn_has_the_turns_before_it(talker: TrainedModel, talk: tuple[Sample, Batch]) -> None:
    sample, prompt = talk
    assert len(sample.messages) == 6
    chat = talker.chat()
    first = chat.ask(words(sample.messages[0]), sample.images[0], max_new_tokens=NEW)
    assert first == talker.answer(sample.images[0], words(sample.messages[0]), max_new_tokens=NEW)
    assert words(chat.messages[1]) == first
    chat.messages = sample.messages[:4]  # as if the model had answered so
    second = chat.ask(words(sample.messages[4]), max_new_tokens=NEW)
    with torch.no_grad():
        ids = talker.model.generate(prompt, stop_ids=talker._reader.text.stop_ids, max_new_tokens=NEW)
    assert second == talker._decoded(ids[0].tolist())
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 3
    assert chat.messages[:5] == sample.messages[:5]
    assert len(chat.images) == 1
    chat.reset()
    assert (chat.messages, chat.images) == ([], [])
    assert chat.ask("Hello?", max_new_tokens=NEW) == talker.answer(None, "Hello?", max_new_tokens=NEW)


def test_a_new_image_joins_a_conversation(talker: TrainedModel, talk: tuple[Sample, Batch]) -> None:
    image, other = talk[0].images[0], Image.new("RGB", (30, 30), "red")
    chat = talker.chat()
    chat.ask("One?", image, max_new_tokens=2)
    chat.ask("<image> or <image>?", [other, image], max_new_tokens=2)
    assert len(chat.images) == 3
    kinds = [[piece["type"] for piece in message["content"]] for message in chat.messages]
    assert kinds == [["image", "text"], ["text"], ["image", "text", "image", "text"], ["text"]]


def test_an_answer_that_nobody_reads_on_stops(talker: TrainedModel, talk: tuple[Sample, Batch]) -> None:
    chat, before = talker.chat(), threading.active_count()
    pieces: Iterator[str] = chat.stream("What?", talk[0].images[0], max_new_tokens=1500)
    start = next(pieces)
    assert threading.active_count() == before + 1
    pieces.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
    assert [words(message) for message in chat.messages] == ["What?", start]
    assert chat.ask("Go on.", max_new_tokens=2) == words(chat.messages[3])


def test_an_error_in_a_stream_is_raised_where_it_is_read(talker: TrainedModel) -> None:
    chat = talker.chat()
    with pytest.raises(ValueError, match="no_such_option"):
        chat.ask("What?", no_such_option=1)
    assert chat.messages == []


def test_a_merged_run_answers_alike(talks: Path, talker: TrainedModel, talk: tuple[Sample, Batch]) -> None:
    out = talks.parent / "merged"
    assert artifact_program("merge", f"ckpt={talks}", f"out={out}") == 0
    image, question = talk[0].images[0], words(talk[0].messages[0])
    answer = vlm.load(out, dtype=torch.float32).answer(image, question, max_new_tokens=NEW)
    assert answer == talker.answer(image, question, max_new_tokens=NEW)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_type_casts_what_is_frozen_alone(dtype: str, talks: Path, talk: tuple[Sample, Batch]) -> None:
    model = vlm.load(talks, device="cpu", dtype=dtype)
    kinds = {str(parameter.dtype).removeprefix("torch.") for parameter in model.model.llm.parameters()}
    assert kinds == ({"bfloat16", "float32"} if dtype == "bfloat16" else {"float32"})
    assert isinstance(model.answer(talk[0].images[0], "What?", max_new_tokens=2), str)


def test_an_encoder_decoder_answers() -> None:
    model = tiny_model(llm=t5(chat_template="t5"))  # type: ignore[arg-type]
    model.chat_template = "t5"
    reader = build.build_reader({"data": {}}, model)
    ready = TrainedModel(model=model, reader=reader, device=torch.device("cpu"), precision="32-true")
    image = Image.new("RGB", (20, 20), "red")
    answers = ready.answer([image, None], ["What is it?", "Who?"], max_new_tokens=20)
    assert any(answers)
    assert answers == [
        ready.answer(image, "What is it?", max_new_tokens=20),
        "".join(ready.stream(None, "Who?", max_new_tokens=20)),
    ]
    assert ready.encode(image, "What is it?").input_ids[0, -1] == model.tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("images", "question", "says"),
    [
        ("none.png", "What?", "image 'none.png' does not exist; give the path of an image file"),
        (".", "What?", r"image '\.' is not a file; give the path of an image file"),
        ("notes.txt", "What?", "image '.*notes.txt' is not one of JPEG, PNG, .*; convert it to one of them"),
        ("large.png", "What?", r"image '.*large\.png' has 67,200,000 pixels \(8400 x 8000\), more than the limit of"),
        (Image.new("F", (4, 4)), "What?", "image 'from Pillow' holds 32-bit values"),
        (Image.new("1", (8400, 8000)), "What?", "image 'from Pillow' has 67,200,000 pixels"),
        (
            None,
            "What is in <image>?",
            r"the question has 1 <image> and 0 images; give an image for each, or write \\<im",
        ),
        (Image.new("RGB", (4, 4)), "<image> <image>", "the question has 2 <image> and 1 image; give an image for each"),
        (None, "Which <video>?", "the question has '<video>' in it, which is not read"),
        (None, "x" * 3000, "the prompt has 3,0.. tokens, and the llm has 2,048 posi"),
        ([None], ["Who?", "What?"], "there are 2 questions, but images for 1; give the images of each question as one"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(
    images: Any, question: Any, says: str, talker: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("no image")
    Image.new("1", (8400, 8000)).save("large.png")
    with pytest.raises(ValueError, match=says) as caught:
        talker.answer(images, question, max_new_tokens=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"run_dir": "/no/run"},
            "ckpt=/no/run is not a run directory: there is no such folder; give the folder of a run",
        ),
        ({"run_dir": "artifact"}, "ckpt=.*artifact is a part of a run directory; give the whole directory, ckpt=.*run"),
        ({"device": "cuda:99"}, "device=cuda:99 is not a device of this machine; choose one of auto, .*cpu"),
        ({"device": "meta"}, "device=meta is not a device of this machine"),
        ({"dtype": "int8"}, "dtype=int8 is not supported; choose one of auto, float32, bfloat16, float16"),
        ({"overrides": {"llm.attentions": "sdpa"}}, "there is no option llm.attentions; did you mean attention?"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(
    options: dict[str, Any], says: str, talks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(talks)
    with pytest.raises(ValueError, match=says):
        vlm.load(**{"run_dir": str(talks), **options})
    assert Path.cwd() == talks


def test_a_run_from_elsewhere_decides_no_path_and_no_class(talks: Path, tmp_path: Path, monkeypatch) -> None:
    run = Path(shutil.copytree(talks, tmp_path / "run"))
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    stored = yaml.safe_load((run / "config.yaml").read_text())
    stored["data"] |= {"_target_": "evil.Source", "annotations": "/etc/passwd"}  # which is not read
    (run / "config.yaml").write_text(yaml.safe_dump(stored))
    assert isinstance(vlm.load(run, device="cpu").answer(None, "Hello?", max_new_tokens=2), str)
    stored["llm"]["pretrained"] = "/home/weights"
    (run / "config.yaml").write_text(yaml.safe_dump(stored))
    with pytest.raises(ValueError, match=r"was not written by your programs here.*\(llm.pretrained=/home/weights\)"):
        vlm.load(run)
    vlm.load(run, device="cpu", overrides={"llm.pretrained": "weights"})
    stored["stage"]["llm"] = {"last_n": "all"}
    (run / "config.yaml").write_text(yaml.safe_dump(stored))
    with pytest.raises(ValueError, match=r"stage\.llm"):
        vlm.load(run, overrides={"llm.pretrained": "weights"})


def test_the_package_imports_nothing_heavy() -> None:
    code = "import sys, vlm; vlm.load; sys.exit(len({'torch', 'transformers', 'hydra', 'PIL'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ}).returncode == 0
