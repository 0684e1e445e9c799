"""The layout of DESIGN section 2: who may import whom, and that tests lie as what they test."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "vlm").rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
# schema -> encoders, connectors, llms -> models, data -> objectives, evaluation -> training -> module -> config ->
# build, report -> launch -> inference, exchange -> cli.
RANK = {
    **dict.fromkeys(("schema", "hub", "file_kinds", "architecture", "ranges", "files"), 0),
    **dict.fromkeys(("identity", "imports", "quote", "renamed"), 0),
    **dict.fromkeys(("text", "encoders", "connectors", "llms", "options"), 1),
    **dict.fromkeys(("models", "data"), 2),
    **dict.fromkeys(("objectives", "evaluation", "training"), 3),
    "module": 4,
    **dict.fromkeys(("callbacks", "loggers", "config"), 5),
    **dict.fromkeys(("build", "report"), 6),
    "launch": 7,
    **dict.fromkeys(("inference", "exchange"), 8),
    "cli": 9,
}
ALLOWED_PEERS = {("hub", "file_kinds")}  # a hub file may be a Git LFS pointer


TESTS = sorted((ROOT / "tests").rglob("*.py"))


def part(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, as a dotted name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "vlm" else {node.module}
    return found


def owner(path: Path) -> str:
    return path.relative_to(ROOT / "vlm").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_point_downwards(path: Path) -> None:
    mine = owner(path)
    if mine == "__init__":
        return
    wrong = []
    for name in sorted(imports(path)):
        if name.startswith("vlm."):
            theirs = part(name)
            peer = RANK[theirs] == RANK[mine] and theirs != mine and (mine, theirs) not in ALLOWED_PEERS
            if RANK[theirs] > RANK[mine] or peer:
                wrong.append(name)
    assert wrong == [], f"{path.relative_to(ROOT)} imports what stands beside or above it"


def test_every_part_has_a_rank() -> None:
    assert {owner(path) for path in FILES} - {"__init__"} == RANK.keys()


def test_data_never_imports_models() -> None:
    for path in (ROOT / "vlm" / "data").rglob("*.py"):
        assert not {part(n) for n in imports(path) if n.startswith("vlm.")} & {
            "models",
            "encoders",
            "llms",
            "connectors",
        }


def test_only_config_launch_and_cli_import_hydra() -> None:
    users = {owner(path) for path in FILES if any(n.split(".")[0] in ("hydra", "omegaconf") for n in imports(path))}
    assert users == {"config", "launch", "cli"}


def test_init_files_are_empty() -> None:
    full = [str(path.relative_to(ROOT)) for path in FILES if path.name == "__init__.py" and path.read_text()]
    assert full == ["vlm/__init__.py"], "it alone offers something: vlm.load"


def test_every_folder_is_a_package() -> None:
    assert {path.parent for path in FILES} == {path.parent for path in FILES if path.name == "__init__.py"}


def test_no_utils() -> None:
    assert [name for name, path in zip(NAMES, FILES, strict=True) if path.stem in ("utils", "helpers", "misc")] == []


@pytest.mark.parametrize("path", TESTS, ids=[str(path.relative_to(ROOT)) for path in TESTS])
def test_tests_import_helpers_alone(path: Path) -> None:
    """No test module is imported by another file; train.py and eval.py by one helper."""
    names = imports(path)
    ours = {name for name in names if name.split(".")[0] == "tests"}
    assert [name for name in ours if not name.startswith("tests.helpers")] == []
    if path.name != "programs.py":
        assert names & {"train", "eval"} == set(), "tests.helpers.programs runs these"


def test_tests_lie_as_what_they_test() -> None:
    folders = {path.parent.relative_to(ROOT / "tests") for path in TESTS} - {Path("helpers")}
    assert [str(folder) for folder in sorted(folders) if not (ROOT / "vlm" / folder).is_dir()] == []
    assert [str(path) for path in TESTS if path.name == "__init__.py" and path.read_text()] == []
