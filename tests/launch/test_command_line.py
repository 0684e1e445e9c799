"""What a user types: paths with any characters, groups that are left out, and a sentence for the rest."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from PIL import Image

from tests.helpers.programs import FILES, QUICK, evaluate, files, read, train
from vlm.launch.command_line import translate
from vlm.launch.entry import CONF
from vlm.launch.evaluation import keep_other_results
from vlm.launch.overrides import holds_path, override
from vlm.options import _import, parameters

HARD = [
    *(
        "a b",
        "a=b",
        "seed=0,llm=tiny",
        "[q_proj,v_proj]",
        "a]",
        "(1)",
        "{x}",
        "#1",
        "$HOME",
        "it's",
        'a "b" c',
        "a\\b",
    ),
    *("a\\", "写真", "été", "a:b", "a~b", "!x", "&", ";", "5", "true", "1e3", "*", "<a>", "@x", "-x", "a, b", "null."),
]
PATH_OPTIONS = [
    "ckpt",
    "run_dir",
    "data.annotations",
    "data.images",
    "llm.pretrained",
    "data.sources.a.images",
    "+data.filter",
]


def value(argument: str) -> Any:
    return OverridesParser.create().parse_override(argument).value()


@pytest.mark.parametrize("name", HARD)
def test_a_path_has_any_characters(name: str) -> None:
    for key in PATH_OPTIONS:
        (argument,) = translate([f"{key}={name}"], config_name="train")
        assert value(argument) == name
        assert translate([argument], config_name="train") == [argument], "what is quoted stays"


@pytest.mark.parametrize("name", HARD)
def test_any_text_is_read_back(name: str) -> None:
    assert value(override("data.prompt", name)) == name


def test_the_home_folder_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/a user")
    for typed in ("data.images=~/photos [1]", "data.images='~/photos [1]'"):
        assert value(*translate([typed], config_name="train")) == "/home/a user/photos [1]"


def test_a_path_that_is_none_and_one_that_is_empty() -> None:
    assert translate(["ckpt=null"], config_name="train") == ["ckpt=null"]
    with pytest.raises(ValueError, match="run_dir= is empty; give a path"):
        translate(["run_dir="], config_name="train")


def test_encoders_side_by_side_keep_their_list() -> None:
    listed = "encoder.pretrained=[a/b,null]"
    assert translate([listed], config_name="train") == [listed]


def test_commas_separate_paths_in_a_sweep(tmp_path: Path) -> None:
    whole = tmp_path / "seed=0,llm=tiny"
    for name, expected in (("a b,c", ["a b", "c"]), ("[q,v]/1,[q,v]/2", ["[q,v]/1", "[q,v]/2"]), ("glob(*)", None)):
        flag, _, argument = translate([f"ckpt={name}", "-m"], config_name="train")
        assert flag == "-m"
        sweep = OverridesParser.create().parse_override(argument)
        assert sweep.is_sweep_override()
        if expected:
            assert [getattr(each, "text", each) for each in sweep.value().list] == expected
    whole.mkdir()
    *_, argument = translate(["-m", f"ckpt={whole}"], config_name="train")
    assert value(argument) == str(whole)


def test_every_option_that_takes_a_path_is_known_by_its_name() -> None:
    seen = set()
    for file in Path(CONF).glob("*/[!_]*.yaml"):
        options = OmegaConf.to_container(OmegaConf.load(file))
        target = options.get("_target_") if isinstance(options, dict) else None
        taken = parameters(_import(target)) if target else {}
        seen |= {f"{file.parent.name}.{key}" for key, parameter in taken.items() if "Path" in str(parameter.annotation)}
    ours = {key for key in seen if not key.startswith(("logger.", "trainer."))}
    assert {"data.annotations", "data.images", "data.val_annotations", "data.root"} <= ours
    assert [key for key in ours if not holds_path(key)] == []
    assert not any(map(holds_path, ("data.prompt", "llm.chat_template", "seed", "data", "stage.name", "encoder.name")))


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("data.prompt=What is = this?", """quote it twice: "data.prompt='What is = this?'\""""),
        ("data.prompt=Hello, you", "has a comma, which separates the values of a sweep (-m)"),
        ("data.prompt=[a", """the value of data.prompt=[a has characters that Hydra reads as its own"""),
        ("data.prompt=説明", """quote it twice: "data.prompt='説明'\""""),
        ("data.prompt=it's", "quote it twice: "),
        ("data.prompt=a#b", """quote it twice: "data.prompt='a#b'\""""),
        ("foo bar", "'foo bar' is not an option; write <key>=<value>"),
        ("seed", "'seed' is not an option; write <key>=<value>"),
        ("a b=3", "'a b' cannot be the name of an option"),
        (
            "data.system_prompt=a ${b}",
            "data.system_prompt: Interpolation key 'b' not found; write \\${ for the characters",
        ),
        (
            "stage=null",
            "a run cannot do without it; choose stage= one of align, dual_stream, full, instruct, "
            "pretrain, single_stream, vision_tune",
        ),
        ("~encoder", "~encoder is refused because a run cannot do without it; choose encoder= one of clip_"),
        ("stage=[align,instruct]", "stage=[align,instruct] is refused because a run has one of them"),
        ("stage=align,instruct", "stage=align,instruct names several options; give one, or add -m for a run of each"),
        ("logger=[csv,foo]", "there is no option logger=foo; choose one of csv, none, tensorboard, wandb"),
        (
            "llm.config.vocab_size=9",
            "llm.config.vocab_size=9 is less than the 273 tokens of the byte tokenizer; set it",
        ),
        ("trainer=5", "trainer=5 is refused because it is not the name of an option; choose trainer= one of auto, "),
        ("logger={}", "logger={} is refused because it is not the name of an option; choose logger= one of csv, none"),
        ("encoder=a/b", "there is no option encoder=a/b; choose one of clip_vit_b32_224"),
        ("recipe.stages=[1]", "there is no option recipe.stages; recipe has no options here"),
        ("stage.lr={}", "the options that are there (encoder, connector, llm); set them one by one, such as stage.lr"),
        ("+data.reading={}", "Error: data.reading={} changes nothing"),
        ("ckpt=5", "ckpt=5 is not a run directory: there is no such folder"),
    ],
)
def test_a_sentence_in_place_of_hydras_grammar(typed: str, said: str, told: Any) -> None:
    assert train(*QUICK, typed) == 2
    line = told()
    assert said in line
    assert "hydra.cc" not in line
    assert "line 1:" not in line


def test_a_long_value_is_not_repeated_whole() -> None:
    with pytest.raises(ValueError, match="reads as its own") as caught:
        translate([f"data.prompt={'a#' * 5000}"], config_name="train")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        *[("logger=null", ["logger=none"]), ("~logger", ["logger=none"]), ("callbacks=null", ["callbacks=none"])],
        *[
            ("resume.run=a", ["resume=a"]),
            ("experiment=null", []),
            ("~debug", []),
            ("+logger=csv", ["logger=csv"]),
            ("plan=true", ["plan.show=true"]),
        ],
    ],
)
def test_groups_that_a_run_can_do_without(typed: str, meant: list[str]) -> None:
    assert translate([typed], config_name="train") == meant


def test_a_run_without_callbacks_and_loggers(tmp_path: Path) -> None:
    assert train(*QUICK, "callbacks=null", "~logger", f"run_dir={tmp_path / 'run'}") == 0
    assert files(tmp_path / "run") == FILES


def test_a_sweep_names_no_run_dir(told: Any) -> None:
    for option in ("run_dir=a", "resume=a"):
        assert train("-m", "seed=0,1", option) == 2
    with pytest.raises(ValueError, match=r"-m makes one a job; set hydra.sweep.dir=<folder>"):
        translate(["seed=0,1", "run_dir=a", "-m"], config_name="train")
    with pytest.raises(ValueError, match=r"out= names the folder of one evaluation, but -m makes several"):
        translate(["ckpt=a,b", "out=c", "-m"], config_name="eval")


@pytest.mark.parametrize(
    ("typed", "excluded"),
    [
        (["seed=0,1", "ckpt=a/b", "data.prompt=x"], "ckpt,data.prompt"),
        (["seed=0,1", "ckpt=a,b", "+data.filter=c"], "data.filter"),
        (["seed=0", "ckpt=a/b"], "ckpt"),
        (["experiment=x", "seed=0,1", "ckpt=a/b", "llm=tiny"], "ckpt"),
    ],
)
def test_a_job_is_named_by_the_options_in_which_it_differs(typed: list[str], excluded: str) -> None:
    names = translate(["-m", "--config-dir=x", *typed], config_name="train")[1]
    assert names == f"hydra.job.config.override_dirname.exclude_keys=[{excluded}]"


@pytest.mark.slow
def test_a_sweep_over_runs_to_start_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(*QUICK, "run_dir=runs/a b") == 0
    shutil.copytree("runs/a b", "runs/c")
    assert train("-m", *QUICK, f"ckpt=runs/a b,{tmp_path}/runs/c", "hydra.sweep.dir=sweep") == 0
    names = ["ckpt=runs_a b", f"ckpt={tmp_path}/runs/c".replace("/", "_")]
    assert sorted(path.name for path in Path("sweep").iterdir() if path.is_dir()) == sorted(names)
    started = [OmegaConf.load(Path("sweep", name, "config.yaml")).ckpt for name in names]
    assert started == ["runs/a b", f"{tmp_path}/runs/c"]


def test_a_part_of_a_run_directory_is_told_the_whole(tmp_path: Path, told: Any) -> None:
    run = tmp_path / "a run"
    for part in ("artifact/manifest.json", "checkpoints/last.ckpt", "best/artifact/manifest.json"):
        (run / part).parent.mkdir(parents=True, exist_ok=True)
        (run / part).touch()
    for part in ("checkpoints/last.ckpt", "artifact", "checkpoints", "artifact/weights.safetensors"):
        assert train(*QUICK, f"ckpt={run / part}") == 2
        assert told().endswith(f"is a part of a run directory; give the whole directory, ckpt={run}")
    assert train(f"resume={run / 'checkpoints' / 'last.ckpt'}") == 2
    assert told().endswith(f"give the whole directory, resume={run}")
    assert translate([f"ckpt={run / 'best'}"], config_name="eval") == [override("ckpt", str(run / "best"))]


def test_a_run_directory_that_cannot_be_made(tmp_path: Path, told: Any) -> None:
    (tmp_path / "file").touch()
    assert train(*QUICK, f"run_dir={tmp_path / 'file' / 'run'}") == 2
    assert told().startswith(
        f"Error: the folder '{tmp_path / 'file' / 'run'}' cannot be made (Not a directory); set run_"
    )


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("data=captions", "eval.py evaluates on the run's own data, so data=captions cannot be given"),
        ("llm=tiny", "eval.py takes the llm that the run has, so leave out llm=tiny"),
        ("connector.depth=3", "eval.py takes the connector that the run has, so leave out connector.depth=3"),
        ("trainer=null", "trainer=null is refused because a run cannot do without it; choose trainer= one of auto, "),
        ("ckpt=null", "ckpt=null must be a text that is not empty"),
        ("ckpt=5", "/5 is not a run directory: there is no such folder"),
        ("batch_size=0", "batch_size=0 must be a whole number from 1 to 65,536"),
        ("max_new_tokens=nan", "max_new_tokens=nan must be a whole number from 1 to 65,536"),
        ("num_samples=0", "num_samples=0 must be a whole number from 1 to 100,000,000 or null"),
        ("foo=1", "there is no option foo; choose one of against, batch_size, "),
        ("+foo=1", "there is no option foo; choose one of against, batch_size, "),
        ("trainer.foo=1", "there is no option trainer.foo; choose one of _target_, accelerator"),
    ],
)
def test_a_slip_in_the_options_of_an_evaluation(typed: str, said: str, told: Any) -> None:
    assert evaluate("ckpt=x", typed) == 2
    assert said in told()


@pytest.mark.slow
def test_paths_of_any_characters_through_training_and_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Any
) -> None:
    """And a relative path given to eval.py is from the user's folder, not from the training's."""
    pictures = tmp_path / "写真 = [a],(b) #$it's"
    elsewhere = tmp_path / "else where"
    pictures.mkdir()
    elsewhere.mkdir()
    for index in range(6):
        Image.new("RGB", (40, 30), (40 * index, 99, 200)).save(pictures / f"{index}.png")
    rows = [json.dumps({"image": f"{index}.png", "caption": f"number {index}"}) + "\n" for index in range(6)]
    (pictures / "train.jsonl").write_text("".join(rows))
    (pictures / "val.jsonl").write_text("".join(rows[:2]))
    (elsewhere / "val.jsonl").write_text("".join(rows[3:]))
    run = pictures / "run [q,v]"
    data = [f"data.annotations={pictures / 'train.jsonl'}", f"data.images={pictures}", "data.val_annotations=val.jsonl"]
    monkeypatch.chdir(pictures)
    assert train(*QUICK, "data=captions", *data, f"run_dir={run}") == 0
    assert OmegaConf.load(run / "config.yaml").data.images == str(pictures)
    monkeypatch.chdir(elsewhere)
    few = ["trainer=cpu", "num_samples=2", "batch_size=2", "max_new_tokens=2"]
    for option, references in (("data.val_annotations=val.jsonl", [3, 4]), ("out=mine", [0, 1])):
        assert evaluate(f"ckpt={run}", *few, option, *(["out=theirs"] if "out" not in option else [])) == 0
        found = read(elsewhere / ("mine" if "out" in option else "theirs") / "samples.jsonl")
        assert [record["reference"] for record in found] == [f"number {index}" for index in references]
        os.chdir(elsewhere)
    assert not (run / "eval").exists()


def test_results_of_other_options_are_kept(tmp_path: Path, told: Any) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"options": ["ckpt=a", "num_samples=6"]}))
    keep_other_results(tmp_path, ["ckpt=./a", "num_samples=6"])
    keep_other_results(tmp_path / "new", ["num_samples=8"])
    said = (
        rf"results\.json holds results that differ in num_samples=6, num_samples=8; give out=<folder>.*out={tmp_path}"
    )
    with pytest.raises(ValueError, match=said):
        keep_other_results(tmp_path, ["ckpt=a", "num_samples=8"])


def test_a_job_that_fails_does_not_end_its_sweep(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    few = [option for option in QUICK if "image_size" not in option]
    sweep = ["-m", "connector=pixel_shuffle,linear", "encoder.image_size=40", *few, f"hydra.sweep.dir={tmp_path}"]
    assert train(*sweep) == 2
    first, last = capfd.readouterr().err.strip().splitlines()
    assert first.startswith("Error: ")
    assert "grid" in first
    assert last.startswith("Error: 1 job of the sweep failed, the others ran: ")
    assert " connector=pixel_shuffle (" in last
    (done,) = tmp_path.glob("*/metrics.json")
    assert done.parent.name == "connector=linear"
    assert train("-m", "connector=linear", "encoder.image_size=40", *few, "seed=3", f"hydra.sweep.dir={tmp_path}") == 0


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["llm.attention=flash_attention_2"], "is not installed: FlashAttention2 has been toggled on"),
        (["llm.config.model_type=clip"], " in all); correct it"),
        (["llm.config.model_type=foo"], "llm.config.model_type=foo is not a model type of Transformers"),
        (
            ["encoder.name=vit_tiny_patch16_224.foo"],
            "vit_tiny_patch16_224 has no weights 'foo'; the tags of encoder.name= are augreg",
        ),
    ],
)
def test_what_a_library_says_is_a_short_sentence(typed: list[str], said: str, tmp_path: Path, told: Any) -> None:
    assert train(*QUICK, *typed, f"run_dir={tmp_path / 'run'}") == 2
    line = told()
    assert said in line
    assert len(line) < 700
