"""Recipes: stages in one command, each the run that a user could start by hand, and the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from tests.helpers.programs import QUICK, ROOT, TINY, another_process, evaluate, read, train
from vlm.callbacks.save import Save
from vlm.callbacks.stop import StopOnTime
from vlm.launch import recipe
from vlm.training import run

SHIPPED = [*TINY, "experiment=shapes_align_instruct"]
TWO = "recipe={stages:[{stage:align,trainer.max_steps:2},{stage:instruct,trainer.max_steps:12}]}"


def value(line: str) -> Any:
    return OverridesParser.create().parse_override(line).value()


def in_process(command: list[str]) -> int:
    """A stage without a start: train.py or eval.py in this process, under the recipe's own Hydra."""
    hydra, config = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    GlobalHydra.instance().clear()
    program = {"train.py": train, "eval.py": evaluate}[Path(command[1]).name]
    try:
        return program(*command[2:])
    finally:
        GlobalHydra.instance().hydra, HydraConfig.instance().cfg = hydra, config


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[str]], int]], list[list[str]]]:
    """Let a function stand for the processes of a recipe; what they were started with, without the interpreter."""

    def stand_in(act: Callable[[list[str]], int]) -> list[list[str]]:
        seen: list[list[str]] = []

        def wait_for(command: list[str]) -> int:
            seen.append([Path(command[1]).name, *command[2:]])
            return act(command)

        monkeypatch.setattr(recipe, "wait_for", wait_for)
        return seen

    return stand_in


@pytest.fixture(scope="module")
def cooked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The shipped recipe with the smallest parts, in this process."""
    root = tmp_path_factory.mktemp("a recipe") / "of seed=0,1"  # what Hydra reads otherwise when it is not quoted
    arguments = [*SHIPPED, recipe.override("run_dir", str(root)), "encoder.image_size=32", "preflight.samples=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "wait_for", in_process)
        assert train(*arguments) == 0
    return root, arguments


def test_each_stage_starts_from_the_one_before_and_is_asked_the_same(cooked) -> None:
    root, _ = cooked
    assert {path.name for path in root.iterdir()} == {
        *(".lock", "1-align", "2-instruct"),
        *("options.json", "recipe.json"),
    }
    settings = [OmegaConf.load(root / name / "config.yaml") for name in ("1-align", "2-instruct")]
    assert [cfg.ckpt for cfg in settings] == [None, str(root / "1-align")]
    assert [(cfg.stage.name, cfg.data.task, cfg.trainer.max_steps) for cfg in settings] == [
        ("align", "caption", 4),  # as debug=fast has it, not the experiment
        ("instruct", "instruct", 4),
    ]
    manifest = json.loads((root / "2-instruct" / "artifact" / "manifest.json").read_text())
    assert [stage["name"] for stage in manifest["stages"]] == ["align", "instruct"]
    result = json.loads((root / "recipe.json").read_text())
    assert (result["experiment"], result["eval"]) == ("shapes_align_instruct", {"data.task": "instruct"})
    first, second = result["stages"]
    assert (first["name"], second["name"]) == ("1-align", "2-instruct")
    assert "val/accuracy/caption" in first["metrics"]
    asked = [read(root / name / "eval" / "samples.jsonl") for name in ("1-align", "2-instruct")]
    kinds = [{name for name in stage["eval"] if name.startswith("val/accuracy/")} for stage in (first, second)]
    assert kinds[0] == kinds[1] == {f"val/accuracy/{record['type']}" for record in asked[1]}
    assert second["eval"]["val/loss"] == pytest.approx(second["metrics"]["val/loss"], rel=1e-3)
    assert first["eval"]["val/loss"] != pytest.approx(first["metrics"]["val/loss"], rel=1e-3)
    assert [record["prompt"] for record in asked[0]] == [record["prompt"] for record in asked[1]]


def test_a_finished_recipe_runs_nothing_again(cooked, commands, capfd: pytest.CaptureFixture[str]) -> None:
    root, arguments = cooked
    seen = commands(lambda command: 7)
    file = root / "2-instruct" / "metrics.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "text/forgetting": 0.25}))
    capfd.readouterr()
    assert train(*arguments) == 0
    printed = capfd.readouterr().out
    assert seen == []
    assert f"1-align is finished: {root / '1-align'}" in printed
    rows = {line.split("│")[1].strip(): line.split("│")[2:4] for line in printed.splitlines() if line.startswith("│")}
    assert [cell.strip() for cell in rows["text/forgetting"]] == ["", "0.250"]
    result = json.loads((root / "recipe.json").read_text())
    by_type = {name for name in result["stages"][1]["eval"] if name.startswith("val/accuracy/")}
    by_type |= {name.replace("accuracy", other) for name in by_type for other in ("accuracy_no_image", "num_answers")}
    by_type |= {name for name in result["stages"][1]["metrics"] if name.startswith("text/")}
    shown = {"val/loss", "val/visual_gain", "val/exact_match", "val/exact_match_no_image", "val/num_answers"}
    assert rows.keys() == {"on its own data", "on data.task=instruct"} | shown | by_type
    assert [float(cell) for cell in rows["val/loss"]] == [round(s["eval"]["val/loss"], 3) for s in result["stages"]]


def test_a_recipe_with_other_options_is_refused(cooked, told) -> None:
    _, arguments = cooked
    changed = [line for line in arguments if line not in ("encoder.image_size=32", "preflight.samples=2")]
    assert train(*changed, "seed=1", "data.num_questions=2") == 2
    difference = "with encoder.image_size=32 and without seed=1 data.num_questions=2"
    assert told().endswith(f"was started {difference}; give that command again to continue it, or another run_dir")


def test_a_recipe_runs_once_at_a_time(cooked, told) -> None:
    root, arguments = cooked
    with another_process(root):
        assert train(*arguments) == 2
    assert f"run_dir={root} is in use by process" in told()


def test_an_evaluation_takes_the_keys_of_the_runs_data(cooked, told) -> None:
    root, _ = cooked
    path = recipe.override("ckpt", str(root / "1-align"))
    assert evaluate(path, "data.tusk=instruct") == 2
    assert "there is no option data.tusk; did you mean task?" in told()


@pytest.mark.slow
def test_stopped_in_the_second_stage_and_continued_there(tmp_path: Path, commands, told) -> None:
    root = tmp_path / "root"
    arguments = [
        *(line for line in QUICK if line not in ("debug=fast", "trainer.max_steps=2")),
        *("trainer.log_every_n_steps=1", "trainer.val_check_interval=12", "data.batch_size=2"),
        *(TWO, f"run_dir={root}"),
    ]
    commands(lambda command: 7 if "stage=instruct" in command else in_process(command))
    assert train(*arguments) == 7
    assert told() == "Error: 2-instruct ended with exit code 7; give the same command again to continue there"
    assert run.status(root / "1-align") == "finished"

    same_sums = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    log = root / "2-instruct" / "metrics.jsonl"
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen(
            [sys.executable, "train.py", *arguments], cwd=ROOT, env=same_sums, stdout=out, stderr=out
        )
        try:
            until = time.monotonic() + 240
            while not (log.exists() and '"step": 2,' in log.read_text()):
                assert process.poll() is None, Path(out.name).read_text()
                assert time.monotonic() < until
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)  # to the recipe alone, which tells its stage
            assert process.wait(timeout=120) == 128 + signal.SIGTERM
        finally:
            process.terminate()
    printed = Path(out.name).read_text()
    assert "1-align is finished" in printed
    assert printed.splitlines()[-1] == "Error: 2-instruct was stopped; give the same command again to continue there"
    assert (root / "2-instruct" / "metrics.json").exists()
    assert run.status(root / "2-instruct") != "finished"

    seen = commands(lambda command: in_process(command))
    assert train(*arguments) == 0
    ((program, resumed, *free),) = seen
    assert (program, resumed) == ("train.py", f"resume={root / '2-instruct'}")
    assert set(free) == {line for line in arguments if line.startswith(("evaluators", "preflight", "trainer.log"))}
    steps = [line["step"] for line in read(log) if "train/loss" in line]
    assert steps == list(range(1, 13))
    stages = json.loads((root / "recipe.json").read_text())["stages"]
    assert [stage["eval"] for stage in stages] == [None, None]
    assert all("val/exact_match" in stage["metrics"] for stage in stages)


@pytest.mark.slow
def test_a_stage_that_was_stopped_is_resumed_by_itself(
    tmp_path: Path, commands, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe's command then finds it finished."""
    root = tmp_path / "root"
    stages = "recipe={stages:[{stage:align,trainer.max_steps:1},{stage:instruct,trainer.max_steps:3}]}"
    quick = [line for line in QUICK if line not in ("debug=fast", "trainer.max_steps=2")]
    arguments = [*quick, "data.batch_size=2", "callbacks.save.every_n_steps=1", stages, f"run_dir={root}"]
    start = Save.on_train_batch_start

    def stop(self: Save, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == 2:
            raise ValueError("stopped here")
        start(self, trainer, *rest)

    commands(in_process)
    with monkeypatch.context() as patch:
        patch.setattr(Save, "on_train_batch_start", stop)
        assert train(*arguments) == 2
    assert run.status(root / "2-instruct") is None
    assert train(f"resume={root}") == 2
    assert (
        "holds a recipe; run its command again, or give one of its stages, such as 2-instruct" in capfd.readouterr().err
    )
    assert train(f"resume={root / '2-instruct'}") == 0
    assert run.status(root / "2-instruct") == "finished"
    seen = commands(lambda command: 7)
    assert train(*arguments) == 0
    assert seen == []
    assert (root / "recipe.json").exists()


@pytest.mark.parametrize("name", ["shapes_align_instruct", "embedded_mix", "llava15_7b", "llava15_7b_lora"])
def test_every_stage_of_a_shipped_recipe_is_checked(
    name: str, commands, told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen = commands(lambda command: 7)
    assert train(f"experiment={name}", "seed=3", "ckpt=published") == 7
    assert told().startswith("Error: 1-align ended with exit code 7")
    (root,) = (tmp_path / "runs" / "recipes" / name).iterdir()
    assert root.name.endswith("-seed3")  # no time of day
    options = json.loads((root / "options.json").read_text())
    assert list(options) == ["1-align", "2-instruct"]
    assert all(
        lines[:3] == [f"experiment={name}", "recipe=null", f"stage={stage[2:]}"] for stage, lines in options.items()
    )
    assert ["ckpt=published" in lines for lines in options.values()] == [True, False]
    assert seen == [["train.py", *options["1-align"], f"run_dir={root / '1-align'}"]]
    if name.startswith("llava"):
        lora = name.endswith("_lora")
        states = ["stage.lora.r=128", "stage.lora.alpha=256"] if lora else ["stage.llm=full"]
        rates = ["stage.lr.connector=2e-05", f"stage.lr.llm={'0.0002' if lora else '2e-05'}"]
        changed = ["llm.chat_template=vicuna_v1", "encoder.resize=pad"]
        data = ["data.image_first=true", "data.batching=modality", "data.batch_size=16"]
        assert options["2-instruct"][3:] == [*states, *rates, *changed, *data, "trainer.max_steps=5198", "seed=3"]


@pytest.mark.slow
def test_a_recipe_under_multirun(commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "_report", lambda *_: None)

    def stage(command: list[str]) -> int:
        """Writes the figure that the job returns."""
        for folder in (Path(value(line)) for line in command if line.startswith("run_dir=")):
            folder.mkdir(parents=True)
            (folder / "metrics.json").write_text('{"status": "finished", "val/loss": 1.0}')
        return 0

    seen = commands(stage)
    assert train("-m", *SHIPPED, "seed=0,1") == 0
    assert [command[0] for command in seen] == ["train.py", "eval.py"] * 4
    roots = [Path(value(line)).parent for command in seen for line in command if line.startswith("run_dir=")]
    assert {path.parent for path in roots} == {tmp_path / "multirun" / "shapes_align_instruct"}
    assert ["seed=1" in path.name for path in roots] == [False, False, True, True]


@pytest.mark.slow
def test_a_plan_of_every_stage(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """LLaVA-1.5's: 20,979,712 parameters of its MLP, and of a LoRA of rank 128 on the 7 matrices of 32 layers."""
    arguments = ["experiment=llava15_7b_lora", f"run_dir={tmp_path / 'root'}", f"plan.json={tmp_path / 'plan.json'}"]
    assert train(*arguments) == 0
    plans = [json.loads((tmp_path / f"plan-{name}.json").read_text()) for name in ("1-align", "2-instruct")]
    assert [plan["parts"]["connector"]["trainable"] for plan in plans] == [20_979_712] * 2
    lora = 32 * 128 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert [plan["parts"]["llm"]["trainable"] for plan in plans] == [0, lora]
    assert {path.name for path in tmp_path.iterdir()} == {"plan-1-align.json", "plan-2-instruct.json"}
    assert "2-instruct: python" in capfd.readouterr().out


def test_a_recipe_is_for_one_process(commands, told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = commands(lambda command: 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train(*TINY, "recipe={stages:[{stage:align}]}", f"run_dir={tmp_path / 'root'}") == 2
    assert "but 2 processes were started with it; start one" in told()
    assert (seen, list((tmp_path / "root").iterdir())) == ([], [])


def test_what_may_change_and_own_config_folders_go_with_a_stage_that_goes_on(commands, told, tmp_path: Path) -> None:
    folder = tmp_path / "conf" / "connector"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("_target_: vlm.connectors.linear.Linear\n")
    own = f"hydra.searchpath=[file://{tmp_path / 'conf'}]"
    stage = tmp_path / "root" / "1-align"

    def begin(command: list[str]) -> int:
        stage.mkdir()
        (stage / "config.yaml").write_text("")
        return 7

    seen = commands(begin)
    arguments = [*TINY, "recipe={stages:[{stage:align}]}", f"run_dir={tmp_path / 'root'}", "connector=mine", own]
    assert train(*arguments) == 7
    commands(lambda command: seen.append(command) or 7)
    changed = ["logger=csv", "evaluators.forgetting.max=2"]
    assert train(*arguments, *changed) == 7
    assert f"hydra.searchpath=['file://{tmp_path / 'conf'}']" in seen[0]
    assert seen[1][2:] == [f"resume={stage}", *changed, f"hydra.searchpath=['file://{tmp_path / 'conf'}']"]


@pytest.mark.slow
def test_a_stage_whose_time_is_up_goes_on(tmp_path: Path, commands, told, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not handed on half trained; every call has the time again, which is that of a step."""
    monkeypatch.setattr(StopOnTime, "on_fit_start", lambda *_: None)
    seen = commands(in_process)
    arguments = [*TINY, "recipe={stages:[{stage:align}]}", f"run_dir={tmp_path / 'root'}", "trainer.max_steps=3"]
    arguments += ["trainer.max_time=00:00:00:00", *QUICK[-2:]]
    assert train(*arguments) == 2
    assert told() == "Error: 1-align reached trainer.max_time; give the same command again to continue there"
    assert run.status(tmp_path / "root" / "1-align") == "time_up"
    for code in (2, 0):
        assert train(*arguments) == code
    assert [command[1].partition("=")[0] for command in seen] == ["stage", "resume", "resume"]


def test_the_command_line_is_stronger_than_what_all_stages_are_measured_with(commands, tmp_path: Path) -> None:
    seen = commands(lambda command: 0 if command[1].endswith("train.py") else 7)
    mine = ["data.annotations=mine.json", "data.images=mine", f"run_dir={tmp_path / 'root'}"]
    theirs = "data:instruct,data.annotations:theirs.json,data.images:theirs"
    recipe = f"recipe={{stages:[{{stage:align,{theirs}}}],eval:{{{theirs}}}}}"
    assert train(*TINY, recipe, "data=instruct", *mine) == 7
    paths = [line for line in seen[0] if line.startswith(("data.annotations=", "data.images="))]
    assert dict(line.split("=") for line in paths) == dict(line.split("=") for line in mine[:2])
    assert seen[1][0] == "eval.py"
    assert not [option for option in seen[1] if option.startswith("data.")]


@pytest.mark.slow
def test_a_recipe_and_a_run_with_its_settings_have_directories_of_their_own(tmp_path: Path, monkeypatch) -> None:
    """And an option of the stage that makes an adapter may be given to all of them."""
    monkeypatch.chdir(tmp_path)
    assert train(*SHIPPED, "recipe=null", "stage.lora.r=4") == 0
    (run_dir,) = (path.parent for path in Path("runs").rglob("metrics.json"))
    assert run_dir.parts[:2] == ("runs", "align")


def test_a_command_tells_its_end() -> None:
    assert recipe.wait_for(["sh", "-c", "exit 3"]) == 3
    assert recipe.wait_for(["sh", "-c", "kill -KILL $$"]) == 128 + signal.SIGKILL


@pytest.mark.parametrize(("before", "code"), [(signal.SIG_DFL, 128 + signal.SIGHUP), (signal.SIG_IGN, 0)])
def test_nohup_is_for_the_command_too(before: Any, code: int) -> None:
    """A terminal that is closed tells this process and no other."""
    kept = signal.signal(signal.SIGHUP, before)
    try:
        assert recipe.wait_for(["sh", "-c", "kill -HUP $PPID; sleep 1"]) == code
    finally:
        signal.signal(signal.SIGHUP, kept)


STAGES = "[{stage:align},{stage:instruct,%s}]"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["experiment=foo"], ["experiment=foo", "choose one of blip2_flan_t5_xl, "]),
        (["recipe=[]"], ["recipe=[] has no stages"]),
        (["recipe={stages:[]}"], ["recipe.stages=[] must be a list of stages"]),
        (["recipe={stages:[{data:shapes}]}"], ["must be a list of stages; write [{stage: align}, {stage: instruct}]"]),
        (["recipe={stages:[{stage:align}],evl:{}}"], ["recipe.evl", "did you mean eval?"]),
        (["recipe={stages:[{stage:align}],eval:yes}"], ["recipe.eval=yes must be a mapping of options of eval.py"]),
        ([f"recipe={{stages:{STAGES % 'trainer.max_stepz:3'}}}"], ["stage 2-instruct of", "did you mean max_steps?"]),
        ([f"recipe={{stages:{STAGES % 'data.max_length:x'}}}"], ["stage 2-instruct of", "data.max_length='x'"]),
        ([f"recipe={{stages:{STAGES % 'stage.llm:loar'}}}"], ["stage 2-instruct of", "stage.llm='loar' is not"]),
        (["recipe={stages:[{stage:align}],eval:{data.tusk:x}}"], ["stage 1-align of", "did you mean task?"]),
        (["recipe={stages:[{stage:align}],eval:{num_sample:2}}"], ["stage 1-align of", "did you mean num_samples?"]),
        ([f"recipe={{stages:{STAGES % 'ckpt:x'}}}"], ["stage 2-instruct of", "ckpt cannot be set by a stage"]),
        (["recipe={stages:[{stage:alignn}]}"], ["stage 1-alignn of", "did you mean align?"]),
        (["recipe={stages:[{stage:align}]}", "stage=instruct"], ["runs the stages align; leave out stage="]),
        (["recipe={stages:[{stage:align}]}", "resume=x"], ["x' is not a run directory"]),
    ],
)  # fmt: skip
def test_a_slip(arguments: list[str], said: list[str], commands, told, tmp_path: Path) -> None:
    seen = commands(lambda command: 0)
    run_dir = [] if "resume=x" in arguments else [f"run_dir={tmp_path / 'root'}"]
    assert train(*TINY, *run_dir, *arguments) == 2
    line = told()
    for words in said:
        assert words in line, line
    assert seen == []


@pytest.mark.parametrize(
    "value_",
    [3, 2e-5, True, None, "mlp", "a/b c.json", "true", "1e-3", "a,b", "it's {x}: [1]", "${seed}", [1, "a,b"], {"n": 2}],
)
def test_a_value_comes_back_from_the_command_line(value_: Any) -> None:
    assert value(recipe.override("x", value_)) == value_
