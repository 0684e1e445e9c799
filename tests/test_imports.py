"""Imports of libraries: without garbage collection, and without packages that are not needed."""

from __future__ import annotations

import gc
import importlib
import json
import subprocess
import sys

import pytest

from vlm.imports import without_collection, without_package


def test_collection_is_on_again_after_an_import_that_fails() -> None:
    def import_what_is_missing() -> None:
        with without_collection():
            assert not gc.isenabled()
            raise ImportError("not installed")

    with pytest.raises(ImportError, match="not installed"):
        import_what_is_missing()
    assert gc.isenabled()


def test_timm_does_not_import_wandb() -> None:
    """It would take half a second of every start; a logger imports it later all the same."""
    script = "import sys; import vlm.encoders.timm; print('wandb' in sys.modules); import wandb; print(wandb.__name__)"
    seen = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert seen.stdout.split() == ["False", "wandb"]


def test_an_imported_package_stays() -> None:
    with without_package("json"):
        assert sys.modules["json"] is json
    with without_package("vlm_not_there"), pytest.raises(ImportError):
        importlib.import_module("vlm_not_there")
    assert "vlm_not_there" not in sys.modules
