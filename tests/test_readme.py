"""The README and the pages of docs/ say what works: commands run as they stand, tables hold what the code has."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.programs import call, evaluate, train
from vlm.cli.doctor import doctor as doctor_program
from vlm.cli.options import MARKS, OPTIONS, PARTS, page, tables
from vlm.renamed import RENAMED

ROOT = Path(__file__).parents[1]
PROGRAMS = {"train.py": train, "eval.py": evaluate}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("python ")]
    return [shlex.split(line)[1:] for line in lines]


@pytest.mark.slow
def test_commands_run_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert len(commands()) == 5
    monkeypatch.chdir(tmp_path)
    for script, *arguments in commands():
        if "plan=true" in arguments:
            arguments.append("plan.probe=false")  # of a model of 8 billion parameters
        assert PROGRAMS[script](*arguments) == 0, f"{script} {arguments}: {capfd.readouterr().err}"
    results = json.loads(Path("runs/second/eval/results.json").read_text())
    assert results["num_samples"] == 8
    assert [stage["name"] for stage in results["stages"]] == ["align", "instruct"]
    assert len(list(Path().glob("multirun/*/*/metrics.json"))) == 2
    for text in (README, (ROOT / "docs" / "use.md").read_text(encoding="utf-8")):
        blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        assert blocks
        assert "runs/…" in blocks[0]
        for name in ("photo.jpg", "other.jpg"):
            Image.new("RGB", (60, 40), "red").save(name)
        blocks = [block for block in blocks if "exported" not in block]  # tests/exchange has that one
        exec("".join(blocks).replace("runs/…", "runs/second"), {})


@pytest.mark.slow
def test_the_example_of_your_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lines in a file, a picture for each, and its two commands with the smallest parts."""
    section = README.partition("## Your own data\n")[2]
    lines = section.partition("```jsonl\n")[2].partition("```")[0]
    doctor, learn = section.partition("```text\n")[2].partition("```")[0].splitlines()
    monkeypatch.chdir(tmp_path)
    Path("captions.jsonl").write_text(lines)
    Path("photos").mkdir()
    for number, line in enumerate(lines.splitlines()):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(Path("photos") / json.loads(line)["image"])
    parts = ["llm=tiny", "encoder=tiny"]
    program, *options = shlex.split(doctor)
    assert program == "vlm-doctor"
    assert call(doctor_program, "doctor", *options, *parts, "doctor.out=found") == 0
    assert json.loads(Path("found/report.json").read_text())["findings"] == []
    assert shlex.split(learn)[:2] == ["python", "train.py"]
    assert train(*shlex.split(learn)[2:], *parts, "debug=fast", "run_dir=run") == 0
    assert {json.loads(line)["id"] for line in Path("run/samples.jsonl").read_text().splitlines()}


def test_table_names_every_option() -> None:
    for group in ("data", "stage", "trainer", "logger", "experiment", "debug", "sweep"):
        row = re.search(rf"^\| `{group}=` \| (.*) \|$", README, flags=re.MULTILINE)
        assert row is not None, f"the README's table has no row for {group}"
        options = {path.stem for path in (ROOT / "conf" / group).glob("[!_]*.yaml")}
        assert set(re.findall(r"`([a-z0-9_]+)`", row[1])) == options


@pytest.mark.slow
def test_tables_of_parts_are_those_of_the_code() -> None:
    written = PARTS.read_text(encoding="utf-8").partition(MARKS[0])[2].partition(MARKS[1])[0]
    assert written.strip() == tables().strip(), "docs/parts.md is behind conf/; run `make options`"


def test_the_page_of_options_is_that_of_the_configs() -> None:
    assert OPTIONS.read_text(encoding="utf-8") == page(), "docs/options.md is behind conf/; run `make options`"


def test_links_between_pages_lead_somewhere() -> None:
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([\w./-]+\.(?:md|sh|svg|py|yaml))[#)]", path.read_text(encoding="utf-8")):
            assert (path.parent / link).exists(), f"{path.name} links to {link}"


def test_the_changelog_has_every_renamed_key() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| `([\w.]+)` \|$", text, flags=re.MULTILINE)
    assert dict(rows) == RENAMED
