"""vlm-demo: the page, driven in headless Chromium, and what it makes of its history."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vlm
from tests.helpers.browser import CHROMIUM, chromium
from tests.helpers.programs import LIVELY, QUICK, ROOT, train
from vlm.cli.demo import ERROR, Options, conversation, main
from vlm.inference import TrainedModel

STAMP = Path("/usr/share/tuxpaint/stamps/animals/birds/adelaide-rosella.png")
NEW = 12  # tokens of an answer
READY = "['textarea:enabled', '[aria-label=Submit]'].every(one => document.querySelector(one) !== null)"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("demo") / "run"
    assert train(*QUICK, *LIVELY, f"run_dir={run}") == 0
    return run


@pytest.fixture(scope="module")
def model(run: Path) -> TrainedModel:
    return vlm.load(run, device="cpu")


@pytest.fixture
def stamp(tmp_path: Path) -> Path:
    """A stamp of Tux Paint, or what looks like one: a PNG file with transparency."""
    file = tmp_path / "stamp.png"
    if STAMP.exists():
        file.write_bytes(STAMP.read_bytes())
    else:
        Image.new("RGBA", (120, 80), (200, 30, 30, 128)).save(file)
    return file


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@pytest.fixture
def server(run: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The program as a process of its own, and the address that it prints."""
    pytest.importorskip("gradio", reason="Gradio is not installed (extra `demo`)")
    options = [f"ckpt={run}", "device=cpu", f"max_new_tokens={NEW}", f"port={free_port()}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vlm.cli.demo", *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    said = process.stdout.readline()
    assert said.startswith("Open http://127.0.0.1:"), said
    yield process, said.split()[1]
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_stamp_is_uploaded_and_a_question_answered(
    server: tuple[subprocess.Popen[str], str], model: TrainedModel, stamp: Path, tmp_path: Path
) -> None:
    psutil, _ = pytest.importorskip("psutil"), pytest.importorskip("aiohttp")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium (apt-get install chromium)")
    process, address = server
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    chat = model.chat()
    turns = [
        ("What is it?", stamp, chat.ask("What is it?", stamp, max_new_tokens=NEW)),
        ("And this?", broken, "image 'broken.png' is not one of JPEG"),
        ("Where?", None, chat.ask("Where?", max_new_tokens=NEW)),
    ]
    assert all(answer for _, _, answer in turns)

    async def visit() -> None:
        async with chromium(address) as page:
            for number, (question, file, answer) in enumerate(turns):
                await page.wait_for(READY, seconds=2)
                if file is not None:
                    await page.upload("input[type=file]", file)
                    await page.wait_for("document.querySelector('.thumbnails img') !== null")
                await page.type("textarea", question)
                words = json.dumps(answer.split())  # the page may break lines elsewhere
                shown = f"[...document.querySelectorAll('[data-testid=bot]')][{number}]?.innerText ?? ''"
                await page.wait_for(f"{words}.every(word => ({shown}).includes(word))")
            await page.screenshot(tmp_path / "page.png")
            elsewhere = [url for url in page.requested if not url.startswith((address, "data:", "blob:"))]
            assert elsewhere == [], "the page asks nothing of other machines"
            assert await page.value("getComputedStyle(document.querySelector('[aria-label=Share]')).display") == "none"

    asyncio.run(visit())
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size[0] > 800
        assert len(picture.convert("RGB").getcolors(10**6) or []) > 20
    heard = [each.laddr.ip for each in psutil.Process(process.pid).net_connections() if each.status == "LISTEN"]
    assert set(heard) == {"127.0.0.1"}
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0


def said(role: str, text: str, *files: str, **more: Any) -> dict[str, Any]:
    """A message as Gradio passes it on."""
    pieces = [{"type": "file", "file": {"path": file}} for file in files]
    return {"role": role, "content": [*pieces, {"type": "text", "text": text}], **more}


def test_the_history_of_the_page_is_the_conversation(model: TrainedModel, stamp: Path) -> None:
    history = [
        said("user", "What is it?", str(stamp)),
        said("assistant", "A bird.", metadata=None),
        said("user", "And this?", "/no/image.png"),
        said("assistant", "image 'image.png' does not exist", metadata={"title": ERROR}),
        said("user", "Which <image>?", str(stamp)),
        said("assistant", "That one.", metadata={"title": None}),
    ]
    chat, expected = conversation(model, history), model.chat()
    expected.add("What is it?", "A bird.", stamp)
    expected.add("Which <image>?", "That one.", stamp)
    assert chat.messages == expected.messages
    assert len(chat.images) == 2


def demo(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    """The program; its exit code."""
    monkeypatch.setattr(sys, "argv", ["vlm-demo", *map(str, arguments)])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_without_gradio_it_says_what_to_install(run: Path, told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert demo(monkeypatch, f"ckpt={run}") == 2
    assert told() == "Error: vlm-demo needs Gradio; pip install 'vlm-template[demo]'"


def test_a_port_in_use_is_named(run: Path, told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio", reason="Gradio is not installed (extra `demo`)")
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        bound.listen()
        port = bound.getsockname()[1]
        assert demo(monkeypatch, f"ckpt={run}", "device=cpu", f"port={port}") == 2
    assert told() == f"Error: port={port} is in use or not allowed; choose another port="


def test_the_program_says_what_it_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code in (([], 2), (["--help"], 0)):
        assert demo(monkeypatch, *arguments) == code
        text = capsys.readouterr().out
        assert text.startswith("Talk with the model of a run in a web page on this machine.")
        for name in Options.__dataclass_fields__:
            assert f"  {name}=" in text or f"vlm-demo {name}=" in text
