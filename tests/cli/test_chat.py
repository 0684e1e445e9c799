"""vlm-chat: what is typed, and what the model of a run answers."""

from __future__ import annotations

import io
import os
import pty
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import vlm
from tests.helpers.programs import LIVELY, QUICK, ROOT, train
from vlm.cli.chat import Options, Terminal, main
from vlm.cli.run_options import parse
from vlm.files import escape_controls


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("chat") / "run=1"
    assert train(*QUICK, *LIVELY, f"run_dir='{run}'") == 0
    Image.new("RGB", (40, 30), "red").save(run.parent / "a photo.png")
    return run


def chat(monkeypatch: pytest.MonkeyPatch, lines: str, *arguments: Any) -> int:
    """The program; its exit code."""
    monkeypatch.setattr(sys, "argv", ["vlm-chat", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_conversation(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(run.parent)
    lines = """Hello?
        /image a photo.png
        /image 'a photo.png'
        Which is <image>, which <image>?

        And <image>?
        /image none.png
        /image
        /imagine
        /history
        /reset
        What?
        /quit
        never read"""
    assert chat(monkeypatch, lines, run, "device=cpu", "max_new_tokens=6") == 0
    model = vlm.load(run, device="cpu")
    expected, new = model.chat(), model.chat()
    image = Image.open("a photo.png")
    hello = expected.ask("Hello?", max_new_tokens=6)
    both = expected.ask("Which is <image>, which <image>?", [image, image], max_new_tokens=6)
    what = new.ask("What?", max_new_tokens=6)
    shown = [escape_controls(answer) for answer in (hello, both, what)]
    assert all(shown)
    assert capsys.readouterr().out.split("\n") == [
        "(There is no image; /image <path> shows one.)",
        *shown[0].split("\n"),
        "a photo.png (40 x 30 pixels) goes with the next question.",
        "a photo.png (40 x 30 pixels) goes with the next question.",
        *shown[1].split("\n"),
        r"Error: the question has 1 <image> and 0 images; give an image for each, or write \<image> for the word",
        "Error: image 'none.png' does not exist; give the path of an image file",
        "Error: /image needs the path of an image file",
        "Error: there is no command /imagine; /help lists them",
        "You: Hello?",
        *f"Model: {shown[0]}".split("\n"),
        "You: Which is <image>, which <image>?",
        *f"Model: {shown[1]}".split("\n"),
        "A new conversation.",
        "(There is no image; /image <path> shows one.)",
        *shown[2].split("\n"),
        "",
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["device=cpu"], "vlm-chat needs ckpt=<run dir>"),
        (["ckpt=none"], "none is not a run directory: there is no such folder; give the folder of a run"),
        (["ckpt=none", "devise=cpu"], "there is no option devise; did you mean device?"),
        (["ckpt=none", "temperature=-1"], "temperature=-1 must be a number from 0 to 100"),
        (["ckpt=none", "max_new_tokens=many"], "max_new_tokens='many' must be a whole number from 1 to 65,536"),
        (["ckpt=RUN", "image=none.png"], "image 'none.png' does not exist; give the path of an image file"),
        (["ckpt=RUN", "llm.attentions=sdpa"], "there is no option llm.attentions; did you mean attention?"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], says: str, run: Path, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chat(monkeypatch, "", *(word.replace("RUN", str(run)) for word in arguments)) == 2
    assert says in told()


def test_the_program_says_what_it_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code in (([], 2), (["--help"], 0)):
        assert chat(monkeypatch, "", *arguments) == code
        said = capsys.readouterr().out
        assert said.startswith("Talk with the model of a run")
        for name in Options.__dataclass_fields__:
            assert f"  {name}=" in said or f"vlm-chat {name}=" in said


def test_options_of_the_run_and_of_the_answers() -> None:
    options, overrides = parse(
        "vlm-chat", Options, ["ckpt=5", "temperature=0.5", "llm.pretrained=7", "llm.generation=x"]
    )
    assert (options.ckpt, options.temperature) == ("5", 0.5)
    assert options.generation == {"max_new_tokens": 256, "do_sample": True, "temperature": 0.5}
    assert overrides == {"llm.pretrained": "7", "llm.generation": "x"}
    assert parse("vlm-chat", Options, ["a/b=c"])[0].generation == {"max_new_tokens": 256}


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    closed = []

    def stream(question: str, images: Any) -> Iterator[str]:
        try:
            yield question.upper()
            if question == "one":
                raise KeyboardInterrupt
        finally:
            closed.append(question)

    fake: Any = SimpleNamespace(stream=stream, messages=["earlier"])
    Terminal(model=fake, chat=fake, waiting=[], generation={}).run(iter(["one", "two\x1b"]))
    assert capsys.readouterr().out == "ONE\n(stopped)\nTWO\\x1b\n"
    assert closed == ["one", "two\x1b"]


@pytest.mark.slow
def test_in_a_terminal(run: Path) -> None:
    """The question of the run and a prompt are shown, and Ctrl-D ends the program."""
    pid, terminal = pty.fork()
    if pid == 0:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"}
        arguments = [f"ckpt={run}", "device=cpu", "max_new_tokens=3"]
        os.execve(sys.executable, [sys.executable, "-m", "vlm.cli.chat", *arguments], environment)
    said = ""
    for awaited, typed in (("lists the commands.\r\n> ", "/reset\n"), ("A new conversation.\r\n> ", "\x04")):
        while not said.endswith(awaited):
            said += os.read(terminal, 1024).decode()
        os.write(terminal, typed.encode())
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0
    assert said.startswith('In its validation, the model was asked "List the objects."')
