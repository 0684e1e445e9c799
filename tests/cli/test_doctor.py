"""vlm-doctor on a dataset with one of each defect: it finds every one and nothing else; then training reads clean."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from PIL import Image

from tests.helpers.text import byte_tokenizer
from vlm import build, config
from vlm.cli.doctor import main
from vlm.data.datamodule import VLMDataModule
from vlm.data.sources.instruct import Instruct
from vlm.launch.entry import CONF
from vlm.llms.bytes import byte_tokenizer as tiny_tokenizer
from vlm.schema import Sample, Split, VisualSpec
from vlm.training import artifact
from vlm.training.sharding import gather

LONG = "a very long caption " * 100
MACHINE = "I cannot see the image."


def picture(number: int, size: tuple[int, int] = (72, 64)) -> Image.Image:
    """A smooth picture of its own: 9 x 8 random cells, enlarged."""
    cells = np.random.default_rng(number).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


def turns(image: str | None, question: str, answer: str, name: str) -> dict[str, Any]:
    return {
        "id": name,
        **({"image": image} if image else {}),
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
    }


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 sound samples of train and 12 of val, and the defects after them, each named by its id."""
    root = tmp_path_factory.mktemp("planted")
    folder, benchmark = root / "images", root / "benchmark"
    (benchmark / "deep").mkdir(parents=True)
    folder.mkdir()
    for number in range(50):
        picture(number).save(folder / f"{number}.png")
    train = [turns(f"{n}.png", "<image>\nWhat?", f"Thing number {n}.", f"sound-{n}") for n in range(30)]
    val = [turns(f"{n}.png", "<image>\nWhat?", f"Thing number {n}.", f"val-{n}") for n in range(30, 42)]

    def plant(name: str, image: str, question: str = "<image>\nWhat?", answer: str = "") -> None:
        train.append(turns(image, question, answer or f"It is {name}.", name))

    plant("missing", "nowhere.png")
    picture(60).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:600])
    plant("cut", "cut.jpg")
    picture(3).save(folder / "copy.png")
    plant("copy", "copy.png")
    plant("twice", "4.png", answer="Thing number 4.")
    plant("another caption", "5.png")  # ordinary: an image may have several
    picture(6).resize((50, 44)).save(folder / "small.jpg", quality=75)
    plant("small", "small.jpg")
    picture(33).save(folder / "leak.png")
    plant("leak", "leak.png")
    picture(34).save(folder / "leak.jpg", quality=80)
    plant("near leak", "leak.jpg")
    picture(42).resize((90, 80)).save(benchmark / "deep" / "a.jpg", quality=80)
    (benchmark / "broken.png").write_bytes(b"no picture")
    plant("known", "42.png")
    plant("silent", "43.png", answer=" ")
    plant("endless", "44.png", answer=LONG)
    plant("no mark", "45.png", question="What?")
    for number in range(46, 50):
        plant(f"machine {number}", f"{number}.png", answer=MACHINE.upper() if number % 2 else MACHINE)
    train.append(turns(None, "Who are you?", MACHINE, "machine alone"))
    (root / "train.json").write_text(json.dumps(train))
    (root / "val.json").write_text(json.dumps(val))
    return root


def options(root: Path) -> list[str]:
    """The dataset on the command line, with parts that take no time."""
    names = {"annotations": "train.json", "val_annotations": "val.json", "images": "images"}
    data = [f"data.{key}={root / name}" for key, name in names.items()]
    tiny = ["llm=tiny", "encoder=tiny", "encoder.image_size=32", "trainer=cpu", "connector=linear"]
    return ["data=instruct", *data, *tiny, "data.num_workers=0", "data.max_length=2048"]


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """The program in this process; its exit code."""
    monkeypatch.chdir(tmp_path)
    for name in ("TOKENIZERS_PARALLELISM", "HYDRA_FULL_ERROR"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["vlm-doctor", "doctor.languages=false", *arguments])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return call


def found(out: Path) -> dict[str, set[str]]:
    """Per kind, the ids of the findings, or the index where there is no id."""
    findings = json.loads((out / "report.json").read_text())["findings"]
    kinds: dict[str, set[str]] = {}
    for finding in findings:
        kinds.setdefault(finding["kind"], set()).add(finding["id"] or f"{finding['split']} {finding['index']}")
    return kinds


MACHINES = {*(f"machine {number}" for number in range(46, 50)), "machine alone"}


def test_every_defect_and_nothing_else(
    planted: Path, doctor: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    out = Path("out")
    assert doctor(*options(planted), f"doctor.against={planted / 'benchmark'}", "doctor.out=out") == 0
    assert found(out) == {
        "unreadable_image": {"train 30", "train 31"},
        "duplicate": {"copy", "twice"},
        "near_duplicate": {"small"},
        "shared_with_val": {"leak", "near leak"},
        "in_benchmark": {"known"},
        "empty_text": {"train 39"},
        "contradiction": {"copy"},
        "long_text": {"endless"},
        "placeholder_mismatch": {"train 41"},
        "repeated_answer": MACHINES,
    }
    report = json.loads((out / "report.json").read_text())
    assert report["parts"] == {"encoder": "tiny", "connector": "linear", "llm": "tiny"}
    assert report["against"] == {"folder": str(planted / "benchmark"), "images": 2, "unreadable": 1}
    assert report["counts"]["val"] == dict.fromkeys(report["counts"]["train"], 0)
    assert report["splits"]["train"]["answers"][0] == {
        "answer": MACHINE, "count": 5, "ratio": 5 / 47
    }  # fmt: skip
    visual = report["splits"]["val"]["visual_tokens"]
    assert visual["mean"] == visual["max"] == report["visual_tokens_per_image"] == 16
    histogram = report["splits"]["train"]["tokens"]["histogram"]
    assert (sum(histogram["counts"]), histogram["beyond"]) == (
        47 - 4 - 1,
        1,
    )  # but four without a length, and the longest
    assert json.loads((out / "filter.json").read_text()) == {
        "train": {
            "num_samples": 47,
            "indices": [30, 31, 32, 33, 36, 37, 38, 39, 40, 41],
            "ids": [None, None, "copy", "twice", "leak", "near leak", "known", None, "endless", None],
        },
        "val": {"num_samples": 12, "indices": [], "ids": []},
    }
    page = (out / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2 * 6 + 1 + 1 + 4  # pairs; known, endless; machines with an image
    assert "http" not in page
    printed = capfd.readouterr().out
    share = (
        "filter.json leaves out 21 % of train, 10 of 47 samples (unreadable_image 2, duplicate 2, shared_with_val 2, "
    )
    for words in ("repeated_answer", "yes", share, "data.filter=out/filter.json", "report.html"):
        assert words in printed


@pytest.mark.slow
def test_through_the_filter_the_data_are_clean(planted: Path, doctor: Callable[..., int]) -> None:
    against = f"doctor.against={planted / 'benchmark'}"
    kinds = "doctor.filter_kinds=[duplicate,near_duplicate,shared_with_val,in_benchmark,long_text,repeated_answer]"
    assert doctor(*options(planted), against, kinds, "doctor.out=first", "data.num_workers=2") == 0
    file = Path("first/filter.json").absolute()
    train = json.loads(file.read_text())["train"]
    assert {*train["ids"]} >= {"small", "machine 46", "machine 49", "machine alone"}
    assert doctor(*options(planted), against, f"data.filter={file}", "doctor.out=second") == 0
    report = json.loads(Path("second/report.json").read_text())
    assert report["findings"] == []
    assert report["splits"]["train"]["samples"] == 47 - len(train["indices"]) == 31
    assert not Path("second/filter.json").exists()

    data = module(planted, filter=str(file), on_bad_sample="raise", batch_size=31)
    assert sorted(next(iter(data.train_dataloader())).ids) == sorted(
        [f"sound-{n}" for n in range(30)] + ["another caption"]
    )
    with pytest.raises(ValueError, match=r"bad samples? of 47"):
        list(module(planted, on_bad_sample="raise").train_dataloader())


def module(root: Path, **options: Any) -> VLMDataModule:
    def source(split: Split) -> Instruct:
        return Instruct(
            split=split, annotations=root / "train.json", val_annotations=root / "val.json", images=root / "images"
        )

    data = VLMDataModule(source=source, max_length=2048, **options)
    spec = VisualSpec(num_tokens=1, image_size=(4, 4), transform=lambda image: torch.zeros(3, 4, 4))
    data.connect(spec=spec, tokenizer=byte_tokenizer(), chat_template="chatml")
    return data


def test_tokens_are_those_of_the_llm(planted: Path, doctor: Callable[..., int], tmp_path: Path) -> None:
    """The LLM's own tokenizer is read, its weights are not."""
    data = module(planted)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["Thing number"])  # 12 bytes of every answer
    tokenizer.save_pretrained(tmp_path / "llm")
    few = [*options(planted), f"data.annotations={planted / 'val.json'}"]
    assert doctor(*few, "llm.weights=pretrained", f"llm.pretrained={tmp_path / 'llm'}", "doctor.out=out") == 0
    tokens = json.loads(Path("out/report.json").read_text())["splits"]["val"]["tokens"]
    sample = data.splits["val"][0]
    in_bytes = len(data.text.encode(Sample(sample.id, [], sample.messages)).input_ids)
    assert tokens["p50"] == tokens["max"] == in_bytes - 1 + 16 - 11


def test_what_pictures_and_texts_say_of_each_other(
    doctor: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """X-rays of 12 bits in 16, a contradiction, a caption that reads like markup, and one sample without an end."""
    records = []
    for number in range(8):
        deep = np.asarray(picture(number).convert("L"), dtype=np.uint16) * 16
        Image.fromarray(deep).save(tmp_path / f"{number}.png")
        records.append({"image": f"{number}.png", "caption": f"[/b] :smile: \x1b[31m {number} lungs of somebody"})
    records += [{"image": "0.png", "caption": "Normal."}, {"image": "0.png", "caption": "A fracture."}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = ["data=captions", f"data.annotations={tmp_path / 'x.jsonl'}", f"data.images={tmp_path}"]
    data += [f"data.val_annotations={tmp_path / 'x.jsonl'}", "data.num_workers=0"]
    tiny = ["llm=tiny", "encoder=tiny", "encoder.image_size=32", "trainer=cpu", "connector=linear"]
    assert doctor(*data, *tiny, "doctor.out=out") == 0
    printed = capfd.readouterr().out
    assert "[/b] :smile: \\x1b[31m 0 lungs" in printed
    assert "filter.json leaves out 100 % of train, 10 of 10 samples (shared_with_val 10)" in printed
    assert "data.filter=" not in printed  # which would leave nothing to train on
    first = "First plain_image: sample 'x.jsonl:1' has an image that is very dark"
    assert first in " ".join(printed.split())
    assert found(Path("out"))["contradiction"] == {"x.jsonl:10"}
    assert found(Path("out"))["plain_image"] == {f"x.jsonl:{line}" for line in range(1, 11)}
    assert doctor(*data, *tiny, "data.reading.image_range=found", "doctor.out=scaled") == 0
    assert "plain_image" not in found(Path("scaled"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["doctor.out={root}/images"], "exists already; choose another folder"),
        (["doctor.filter_kinds=[duplicates]"], "there is no option doctor.filter_kinds=duplicates; did you mean dupl"),
        (["doctor.score=true"], "doctor.score=true needs a trained model; set ckpt=<run dir>"),
        (["doctor.against={root}/benchmark/none"], "holds 0 image files; set it to a folder of a benchmark's images"),
        (["doctor.num_low_scores=many"], "doctor.num_low_scores='many' must be a whole number from 0"),
        (
            ["llm.weights=pretrained", "llm.pretrained={root}/images"],
            "no tokenizer for the llm: looked for the folder or",
        ),
        (["data.filter={root}/none.json"], "there is no file '{root}/none.json'; set data.filter="),
    ],
)
def test_a_slip(
    planted: Path, doctor: Callable[..., int], capfd: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    names = [option.format(root=planted) for option in options]
    assert doctor("data=shapes", "llm=tiny", "encoder=tiny", "data.num_train=4", "data.num_val=4", *names) == 2
    assert said.format(root=planted) in capfd.readouterr().err


def test_a_missing_extra_is_one_sentence(
    doctor: Callable[..., int], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "py3langid", None)
    assert doctor("llm=tiny", "encoder=tiny", "doctor.languages=true") == 2
    error = capfd.readouterr().err.strip()
    assert error.startswith("Error: the language histogram needs py3langid")
    assert "pip install 'vlm-template[doctor]'" in error
    assert "\n" not in error


def test_scores_of_a_run_are_findings(planted: Path, doctor: Callable[..., int], tmp_path: Path) -> None:
    """The artifact of an untrained model with its parts; the command line names other parts."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        settings = config.plain(compose("train", [*options(planted), "run_dir=x"]))
    model, manifest = build.build_model(settings)
    names = [name for name, _ in model.named_parameters() if name.startswith("connector.")]
    tensors = gather(model, names)
    rest = {"lora": None, "stages": [], "code": {"packages": {}}}
    artifact.save(tmp_path / "run" / "artifact", tensors=tensors, manifest=manifest | rest, step=1)
    OmegaConf.save(OmegaConf.create(settings), tmp_path / "run" / "config.yaml")
    few = f"data.annotations={planted / 'val.json'}"  # as train too: no long row
    arguments = [*options(planted), few, "connector=mlp", f"ckpt={tmp_path / 'run'}", "doctor.score=true"]
    kinds = ["doctor.num_low_scores=3", "doctor.filter_kinds=[low_score]"]
    assert doctor(*arguments, *kinds, "doctor.out=out") == 0
    report = json.loads(Path("out/report.json").read_text())
    low = [finding for finding in report["findings"] if finding["kind"] == "low_score"]
    assert [finding["split"] for finding in low] == ["train"] * 3 + ["val"] * 3
    assert report["splits"]["train"]["score"]["min"] == pytest.approx(float(low[0]["message"].split()[8]), abs=1e-3)
    assert sum(report["splits"]["val"]["score"]["histogram"]["counts"]) == 12
    left_out = json.loads(Path("out/filter.json").read_text())
    assert left_out["val"]["indices"] == sorted(finding["index"] for finding in low[3:])
    assert report["parts"] == {
        "encoder": "TimmEncoder",
        "connector": "Linear",
        "llm": "CausalLM",
    }  # it named no options
