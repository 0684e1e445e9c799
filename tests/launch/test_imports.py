"""Garbage collection is off while libraries are imported, and on afterwards whatever happens."""

from __future__ import annotations

import gc

import pytest

from vlm.launch.imports import without_collection


def test_collection_is_on_again_after_an_import_that_fails() -> None:
    with pytest.raises(ImportError, match="not installed"), without_collection():
        assert not gc.isenabled()
        raise ImportError("not installed")
    assert gc.isenabled()
