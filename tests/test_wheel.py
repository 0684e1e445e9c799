"""The console programs work where only the wheel is installed: the configs are in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def call(*command: str | Path, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_programs_of_an_installed_wheel_find_their_configs(tmp_path: Path) -> None:
    source, new, empty = tmp_path / "source", tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    for folder in ("vlm", "conf"):  # a build leaves files beside its source
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / file, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    offline = ("--no-deps", "--no-index")
    call(*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", tmp_path, source, folder=tmp_path)
    venv.create(new, symlinks=True)
    (wheel,) = tmp_path.glob("*.whl")
    call(*pip, f"--python={new}", "install", *offline, wheel, folder=tmp_path)
    packages = call(
        new / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=empty
    )
    Path(packages.strip(), "others.pth").write_text(sysconfig.get_path("purelib"))  # the packages that vlm needs

    parts = ("data=shapes", "llm=tiny", "encoder=tiny", "connector=linear")
    data = ("data.num_train=40", "data.num_val=8", "data.num_workers=0", "doctor.languages=false")
    told = call(new / "bin" / "vlm-doctor", *parts, *data, "doctor.out=found", folder=empty)
    assert "found/report.html" in told
    assert json.loads((empty / "found" / "report.json").read_text())["splits"].keys() == {"train", "val"}
    where = call(new / "bin" / "python", "-c", "import vlm.launch.configs as it; print(it.CONF)", folder=empty)
    assert Path(where.strip()) == Path(packages.strip(), "vlm", "conf")
    assert "vlm-artifact show" in call(new / "bin" / "vlm-artifact", "--help", folder=empty)
