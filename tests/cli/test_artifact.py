"""vlm-artifact: what an artifact holds, in what two differ, and an LLM that has taken up its adapter."""

from __future__ import annotations

import errno
import io
import json
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer

from tests.helpers.parts import IMAGE, LORA, STATES, make_batch, tiny_llm, tiny_model
from tests.helpers.programs import QUICK, artifact_program, evaluate, read, train
from vlm import build, config
from vlm.cli.artifact import differences, parse, sizes
from vlm.cli.artifact_merge import _merge
from vlm.training import artifact
from vlm.training.optim import lora_names, set_trainable

EXACT = [*QUICK, "trainer.precision=32-true", "stage=instruct", "stage.lr.llm=0.05"]


def logits(run: Path) -> Tensor:
    """Of a validation batch, from the artifact alone."""
    settings, _ = config.read_config(run)
    model: Any
    model, manifest = build.build_model(settings)
    artifact.load(run, model=model, manifest=manifest)
    batch = next(iter(build.connect_data(build.build_data(settings, None), settings, model).val_dataloader()))
    with torch.no_grad():
        return model.eval()(batch)


@pytest.fixture(scope="module")
def instructed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("merge") / "run"
    assert train(*EXACT, f"run_dir={run}") == 0
    return run


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """What the merge has printed, a line each."""
    return []


@pytest.fixture(scope="module")
def merged(instructed: Path, printed: list[str]) -> Path:
    out = instructed.parent / "merged = one"
    told = io.StringIO()
    with redirect_stdout(told):
        assert artifact_program("merge", f"ckpt={instructed}", f"out={out}") == 0
    printed += told.getvalue().splitlines()
    return out


@pytest.mark.slow
def test_the_next_command_that_a_merge_prints_is_taken(merged: Path, printed: list[str], tmp_path: Path) -> None:
    assert printed[0] == f"Merged run: {merged}"
    next_stage, python, program, *options = shlex.split(printed[1].replace("A next stage: ", "next "))
    assert (next_stage, python, program) == ("next", "python", "train.py")
    assert "encoder=tiny" in options
    assert "encoder.image_size=32" in options
    few = [option for option in EXACT if not option.startswith(("llm=", "encoder"))]
    assert train(*few, *options, f"run_dir={tmp_path / 'next'}") == 0


def test_what_a_merge_writes_is_readable_and_has_the_template_of_the_training(instructed: Path, merged: Path) -> None:
    modes = {path.stat().st_mode & 0o777 for path in (merged / "llm").iterdir()}
    assert modes == {(merged / "config.yaml").stat().st_mode & 0o777}
    tokenizer = AutoTokenizer.from_pretrained(merged / "llm")
    chat = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A star."}]
    text = "<bos><|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA star.<|im_end|>\n"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == text


def test_the_program_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code in (([], 2), (["--help"], 0), (["show", "-h"], 0)):
        assert artifact_program(*arguments) == code
        told = capsys.readouterr()
        assert told.out.startswith("Inspect artifacts")
        assert "vlm-artifact merge <run dir> out=<folder>" in told.out
        assert told.err == ""


def test_a_part_of_a_run_directory(instructed: Path, told: Any) -> None:
    assert artifact_program("show", instructed / "artifact" / "weights.safetensors") == 2
    assert told().endswith(f"is a part of a run directory; give the whole directory, ckpt={instructed}")


def test_a_merged_run_answers_as_before(instructed: Path, merged: Path) -> None:
    manifest = artifact.read_manifest(merged)
    assert manifest["lora"] is None
    assert {name.partition(".")[0] for name in manifest["tensors"]} == {"connector"}
    assert [stage["name"] for stage in manifest["stages"]] == ["instruct", "merge"]
    before, after = logits(instructed), logits(merged)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    figures = []
    for run in (instructed, merged.rename(merged.with_name("moved"))):
        assert evaluate(f"ckpt={run}", "trainer=cpu", "trainer.precision=32-true", "num_samples=4", "batch_size=2") == 0
        figures.append(json.loads((run / "eval" / "results.json").read_text())["metrics"]["val/loss"])
    merged.with_name("moved").rename(merged)
    assert figures[1] == pytest.approx(figures[0], abs=1e-5)
    predictions = [read(run / "eval" / "samples.jsonl") for run in (instructed, merged)]
    assert predictions[0] == predictions[1]


@pytest.mark.slow
def test_a_next_stage_starts_from_a_merged_run(
    merged: Path, tmp_path: Path, told: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = ["llm.weights=pretrained", "llm.package=null", f"llm.pretrained={merged / 'llm'}"]
    assert train(*EXACT, *parts, f"ckpt={merged}", f"run_dir={tmp_path / 'next'}") == 0
    manifest = artifact.read_manifest(tmp_path / "next")
    assert [stage["name"] for stage in manifest["stages"]] == ["instruct", "merge", "instruct"]
    assert manifest["lora"]["r"] == 16
    capfd.readouterr()
    assert train(*EXACT, f"ckpt={merged}", f"run_dir={tmp_path / 'wrong'}") == 2
    assert "was trained with bases.llm.fingerprint = " in told()
    assert train(f"resume={merged}") == 2
    assert "is a merged run, which cannot be resumed; start a next stage from it with ckpt=" in told()


def test_what_cannot_be_merged(
    instructed: Path, merged: Path, tmp_path: Path, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert artifact_program("merge", merged, tmp_path / "out") == 2
    assert "trained nothing in its llm, so there is nothing to merge" in told()
    assert artifact_program("merge", instructed, merged) == 2
    assert f"out={merged} exists already" in told()
    rounded = tmp_path / "rounded"
    (rounded / "artifact").mkdir(parents=True)
    (rounded / "config.yaml").write_bytes((instructed / "config.yaml").read_bytes())
    manifest = json.loads((instructed / "artifact" / "manifest.json").read_text())
    (rounded / "artifact" / "manifest.json").write_text(json.dumps({**manifest, "quantization": "nf4"}))
    assert artifact_program("merge", rounded, tmp_path / "out") == 2
    assert "was trained with an LLM in nf4, and a LoRA cannot be merged into quantized weights" in told()

    said = "No space left on device"
    for error in (SafetensorError(f"I/O error: {said} (os error 28)"), OSError(errno.ENOSPC, said)):

        def full(self: Any, folder: Path, *, error: Exception = error) -> None:
            folder.mkdir(parents=True)
            raise error

        monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        assert artifact_program("merge", instructed, tmp_path / "out") == 2
        assert re.search(f"^Error: could not write {tmp_path / 'out' / 'llm'}: (I/O error: )?{said}", told())
        assert list(tmp_path.iterdir()) == [rounded]


@pytest.mark.parametrize(
    "lora", [LORA, {**LORA, "target_modules": "all-linear", "use_dora": True}], ids=["lora", "dora"]
)
def test_merging_takes_the_adapter_away(lora: dict[str, Any]) -> None:
    batch = make_batch(([11, IMAGE, 12], [21, 22]), ([13, 14], [23]))
    model = tiny_model()
    names = [name for name, _ in model.named_parameters()]
    set_trainable(model, {**STATES, "connector": "frozen", "llm": "lora"}, lora)
    torch.manual_seed(0)
    for name in lora_names(model.llm):
        model.llm.get_parameter(name).data.add_(0.2 * torch.rand(()))
    with torch.no_grad():
        before = model(batch)
        _merge(model.llm)
        after = model(batch)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    assert [name for name, _ in model.named_parameters()] == names
    assert not torch.allclose(tiny_model()(batch), after, atol=1e-2), "the adapter had changed the answers"


def test_an_adapter_that_changes_tied_matrices_is_refused() -> None:
    model = tiny_model(llm=tiny_llm(tie_word_embeddings=True))
    model.llm.add_lora(**{**LORA, "target_modules": ["lm_head"]})
    for name in lora_names(model.llm):
        model.llm.get_parameter(name).data += 0.1
    with pytest.raises(ValueError, match="an adapter that changes tied matrices cannot be merged"):
        _merge(model.llm)


def test_show(instructed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert artifact_program("show", f"ckpt={instructed}") == 0
    shown = "".join(capsys.readouterr().out.split())
    base = artifact.read_manifest(instructed)["bases"]["llm"]
    for text in ("step│2", "instruct", base["fingerprint"], artifact.short_hash(base["config"]), "r=16,alpha=32"):
        assert text in shown
    held = sizes(instructed)
    assert held["llm"]["tensors"] == 28, "two sides of 7 matrices in 2 layers"
    # rank 16 beside q and o 64×64, k and v 64×32, gate, up and down 64×128
    assert held["llm"]["parameters"] == 2 * 16 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert held["llm"]["bytes"] == 4 * held["llm"]["parameters"]
    assert f"llm│28│{held['llm']['parameters']:,}│" in shown


def write(run: Path, tensors: dict[str, Tensor], **manifest: Any) -> Path:
    connector = {"_target_": "vlm.connectors.mlp.MLP", **manifest.pop("connector", {})}
    least = {
        "parts": {"connector": connector, "encoder": {}},
        "bases": {part: {"fingerprint": "0"} for part in ("encoder", "llm")},
        "quantization": "none",
        "num_image_tokens": 4,
        "lora": None,
        "stages": [{"name": "align", "run": "a", "options": {}}],
        "code": {"git": None, "packages": {}},
    }
    artifact.save(run / "artifact", tensors=tensors, manifest={**least, **manifest}, step=1)
    return run


def test_differences_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = {
        "connector.a": torch.tensor([3.0, 4.0]),
        "connector.b": torch.zeros(2),
        "llm.c": torch.ones(4),
        "encoder.d": torch.ones(1),
        "connector.e": torch.ones(2),
    }
    two = {
        "connector.a": torch.tensor([3.0, 1.0]),
        "connector.b": torch.tensor([4.0, 0.0]),
        "llm.c": torch.ones(4),
        "connector.e": torch.ones(3),
    }
    first = write(tmp_path / "1", one, connector={"depth": 2})
    second = write(tmp_path / "2", two, connector={"depth": 3})
    assert differences(first, second) == {
        "fields": {"parts.connector.depth": (2, 3)},
        "only": [["encoder.d"], []],
        "shapes": {"connector.e": ((2,), (3,))},
        "parts": {"connector": pytest.approx(1.0), "llm": 0.0},  # |(0, -3, 4, 0)| / |(3, 4, 0, 0)|
        "tensors": {"connector.a": pytest.approx(0.6), "connector.b": float("inf"), "llm.c": 0.0},
    }
    assert artifact_program("diff", first, second) == 0
    shown = "".join(capsys.readouterr().out.split())
    for text in ("parts.connector.depth│2│3", "encoder.d", "connector.e│(2,)│(3,)", "connector│1│", "connector.b│inf"):
        assert text in shown
    assert "2alonehas:none" in shown


def test_the_command_line(told: Any) -> None:
    assert parse(["diff", "runs/a=1,b=2", "other=runs/b"]) == ("diff", {"ckpt": "runs/a=1,b=2", "other": "runs/b"})
    assert parse(["merge", "out=x", "a"]) == ("merge", {"out": "x", "ckpt": "a"})
    for arguments, text in (
        (["x", "a"], "vlm-artifact has no command 'x'; choose one of diff, merge, show"),
        (["shw", "a"], "vlm-artifact has no command 'shw'; did you mean show? choose one of diff, merge, show"),
        (["merge", "a"], "vlm-artifact merge needs out=<folder>"),
        (["show"], "vlm-artifact show needs ckpt=<run dir>"),
        (["show", "a", "b"], "there is no option vlm-artifact show.b; choose one of ckpt"),
        (["merge", "ckpt=a", "out=b", "dtpe=float32"], "did you mean dtype?"),
        (["merge", "a", "b", "dtype=int8"], "dtype=int8 is not a type to merge in; choose one of float32, bfloat16"),
        (["show", "none"], "ckpt=none is not a run directory"),
    ):
        assert artifact_program(*arguments) == 2
        assert text in told()
