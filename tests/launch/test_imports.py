"""Garbage collection is off while libraries are imported, and on afterwards whatever happens."""

from __future__ import annotations

import gc

import pytest

from vlm.launch.imports import without_collection


def test_collection_is_on_again_after_an_import_that_fails() -> None:
    def import_what_is_missing() -> None:
        with without_collection():
            assert not gc.isenabled()
            raise ImportError("not installed")

    with pytest.raises(ImportError, match="not installed"):
        import_what_is_missing()
    assert gc.isenabled()
