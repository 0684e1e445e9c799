"""A folder's tokenizer files: SentencePiece's alone, none, and those that are broken."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.helpers.text import sentencepiece_folder
from vlm.llms.loading import load_tokenizer


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentencepiece_folder(tmp_path_factory.mktemp("published"))


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "llm"))


def test_a_folder_with_tokenizer_model_alone(published: Path) -> None:
    """As Vicuna is published. The ids are those of SentencePiece itself."""
    from sentencepiece import SentencePieceProcessor

    tokenizer = load_tokenizer(str(published), package=None, trust=False)
    theirs = SentencePieceProcessor(model_file=str(published / "tokenizer.model"))
    assert tokenizer.is_fast
    for text in ("A red circle", "2  squares\n", "赤い丸 🙂", "é\t", "3.14"):
        assert tokenizer(text).input_ids == [theirs.bos_id(), *theirs.encode(text)]


def test_without_the_package_that_reads_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match=r"tokenizer.model needs the package sentencepiece, which is not"):
        load_tokenizer(str(folder), package=None, trust=False)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("tokenizer.model", b"cut", r"tokenizer.model \(3 bytes\) is not a SentencePiece model \("),
        ("tokenizer.model", LFS.encode(), r"tokenizer.model \(\d+ bytes\) is not a SentencePiece model \("),
        (
            "tokenizer.json",
            b'{"version": "1.0", "model": {"typ',
            r"tokenizer.json \(33 bytes\) is not valid JSON \(Unterm",
        ),
        (
            "tokenizer.json",
            LFS.encode(),
            r"tokenizer.json \(\d+ bytes\) is not valid JSON \(Expecting value: line 1 colu",
        ),
        ("tokenizer.json", b"", r"tokenizer.json \(0 bytes\) is not valid JSON"),
        ("tokenizer.json", b'{"model": {"type": "BPX"}}', r"tokenizer.json \(26 bytes\) is not a tokenizer \("),
        ("tokenizer.json", b"\xff\xfe", r"tokenizer.json \(2 bytes\) is not valid JSON \('utf-8' codec"),
        ("tokenizer_config.json", b"{", r"tokenizer_config.json \(1 bytes\) is not valid JSON"),
    ],
)
def test_a_broken_file_is_named(folder: Path, name: str, content: bytes, error: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"the tokenizer file .*/{error}.*; download it again") as caught:
        load_tokenizer(str(folder), package=None, trust=False)
    assert "\n" not in str(caught.value)


def test_a_folder_with_no_vocabulary(folder: Path) -> None:
    """Transformers makes a tokenizer of three words from its settings alone."""
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.vocab").unlink()
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "LlamaTokenizer"
    with pytest.raises(ValueError, match=r"no tokenizer for the llm.* with its tokenizer\.json or tokenizer\.model; "):
        load_tokenizer(str(folder), package=None, trust=False)
