"""Talk with a trained run in the terminal: vlm-chat ckpt=<run dir> [image=<path>]."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.cli.run_options import HELP, RunOptions, opened, parse
from vlm.files import escape_controls
from vlm.launch.entry import run_program, sentence
from vlm.ranges import Name

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlm.inference import Chat, TrainedModel

COMMANDS = """  /image <path>   show an image with the next question; again for several
  /reset          start a new conversation
  /history        print the conversation
  /help           print this list
  /quit           end, as Ctrl-D does; Ctrl-C stops an answer"""
USAGE = f"""Talk with the model of a run about images. Its training data is not needed.

vlm-chat ckpt=<run dir> [image=<path>] [<option>=<value> ...]

In the conversation, which the model reads from its start at each question:
{COMMANDS}
<image> in a question is the place of an image; without it, images come before the text.

Options:
  image=<path>           an image for the first question
{HELP}"""


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    image: Name | None = None


@dataclass
class Terminal:
    """A conversation, and the images that wait for the next question."""

    model: TrainedModel
    chat: Chat
    waiting: list[Image]
    generation: dict[str, Any]

    def run(self, lines: Iterator[str]) -> None:
        """Answer each line until there are no more, or one is /quit."""
        for line in lines:
            word, _, rest = line.strip().partition(" ")
            try:
                if word == "/quit":
                    return
                if word.startswith("/") and "/" not in word[1:]:  # not a path
                    self._command(word, rest.strip())
                elif word:
                    self._answer(line.strip())
            except (ValueError, OSError) as error:
                print(f"Error: {escape_controls(sentence(error))}")

    def _command(self, word: str, rest: str) -> None:
        if word == "/image":
            self.show(rest)
        elif word == "/reset":
            self.chat.reset()
            self.waiting.clear()
            print("A new conversation.")
        elif word == "/history":
            for message in self.chat.messages:
                pieces = ("<image>" if piece["type"] == "image" else piece["text"] for piece in message["content"])
                print(f"{'You' if message['role'] == 'user' else 'Model'}: {escape_controls(''.join(pieces))}")
        elif word == "/help":
            print(COMMANDS)
        else:
            raise ValueError(f"there is no command {word}; /help lists them")

    def show(self, path: str) -> None:
        """Keep an image for the next question. Raises ValueError if it cannot be read."""
        if not path:
            raise ValueError("/image needs the path of an image file")
        if path[0] in "'\"" and path[-1] == path[0] and not Path(path).exists():  # as terminals write a dropped file
            path = path[1:-1]
        image = self.model.read_image(path)
        self.waiting.append(image)
        print(f"{escape_controls(path)} ({image.width} x {image.height} pixels) goes with the next question.")

    def _answer(self, question: str) -> None:
        pieces = self.chat.stream(question, self.waiting, **self.generation)
        if not self.waiting and not self.chat.messages:
            print("(There is no image; /image <path> shows one.)")
        self.waiting = []
        try:
            for piece in pieces:
                print(escape_controls(piece), end="", flush=True)
            print()
        except KeyboardInterrupt:
            print("\n(stopped)")
        finally:
            pieces.close()  # type: ignore[attr-defined]


def typed() -> Iterator[str]:
    """The lines of standard input. In a terminal there is a prompt, and the arrow keys bring lines back."""
    prompt = ""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401, input() uses it
        prompt = "> "
    with suppress(EOFError):
        while True:
            yield input(prompt)


def chat(arguments: list[str]) -> None:
    """Load the run and talk. Raises ValueError for an option or a run that cannot be used."""
    try:
        options, overrides = parse("vlm-chat", Options, arguments)
        model = opened(options, overrides)
        terminal = Terminal(model, model.chat(), [], options.generation)
        if sys.stdin.isatty():
            if model.questions:
                known = ", ".join(f'"{escape_controls(question)}"' for question in model.questions)
                print(f"In its validation, the model was asked {known}")
            print("Ask a question. /help lists the commands.")
        if options.image is not None:
            terminal.show(options.image)
        terminal.run(typed())
    except KeyboardInterrupt:
        print()  # ends the line of the prompt
        raise


def main() -> None:
    run_program(chat, usage=USAGE)


if __name__ == "__main__":
    main()
