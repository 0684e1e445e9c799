"""A web page on this machine that answers with a trained run: vlm-demo ckpt=<run dir>. Gradio is the extra `demo`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from vlm.cli.run_options import HELP, RunOptions, opened, parse
from vlm.launch.entry import run_program, sentence
from vlm.ranges import Range

if TYPE_CHECKING:
    from vlm.inference import Chat, TrainedModel

HOST = "127.0.0.1"  # other machines do not reach it
ERROR = "Error"  # the title of a message that is no answer
USAGE = f"""Talk with the model of a run in a web page on this machine. Its training data is not needed.

vlm-demo ckpt=<run dir> [<option>=<value> ...]

Options:
  port=7860              of the page, http://{HOST}:7860; other machines do not reach it
{HELP}"""


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    port: Annotated[int, Range(1, 65_535)] = 7860


def page(model: TrainedModel, *, title: str, generation: Mapping[str, Any]) -> Any:
    """The page, a `gradio.ChatInterface`. It sends nothing to other machines."""
    import gradio

    def answer(message: dict[str, Any], history: list[dict[str, Any]]) -> Iterator[Any]:
        text, files = "", message["files"]
        try:
            chat = conversation(model, history)
            for piece in chat.stream(message["text"], files, **generation):
                text += piece
                yield text
        except (ValueError, OSError) as error:  # raised, it would end the conversation
            why = sentence(error)
            for file in files:
                why = why.replace(file, os.path.basename(file))
            yield gradio.ChatMessage(why, metadata={"title": ERROR})

    return gradio.ChatInterface(
        answer,
        multimodal=True,
        title=title,
        # An answer is shown as plain text: Markdown could load an image from another machine.
        chatbot=gradio.Chatbot(show_label=False, render_markdown=False, buttons=["copy"], height="70vh"),
        textbox=gradio.MultimodalTextbox(
            file_types=["image"],
            file_count="multiple",
            placeholder="Add an image and ask a question",
            show_label=False,
            stop_btn=True,
        ),
        analytics_enabled=False,
        api_visibility="private",
    )


def conversation(model: TrainedModel, history: Sequence[Mapping[str, Any]]) -> Chat:
    """The conversation that the page shows, without questions that were answered by an error."""
    chat = model.chat()
    question: Mapping[str, Any] = {}
    for message in history:
        if message["role"] == "user":
            question = message
        elif (message.get("metadata") or {}).get("title") != ERROR:
            files = [piece["file"]["path"] for piece in question["content"] if piece["type"] == "file"]
            chat.add(_text(question), _text(message), files)
    return chat


def _text(message: Mapping[str, Any]) -> str:
    return "".join(piece["text"] for piece in message["content"] if piece["type"] == "text")


def demo(arguments: list[str]) -> None:
    """Load the run and serve the page until Ctrl-C. Raises ValueError for what cannot be used."""
    options, overrides = parse("vlm-demo", Options, arguments)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    with tempfile.TemporaryDirectory(prefix="vlm-demo-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        try:
            import gradio
        except ImportError as error:
            raise ValueError("vlm-demo needs Gradio; pip install 'vlm-template[demo]'") from error
        model = opened(options, overrides)
        chat = page(model, title=os.path.basename(os.path.abspath(options.ckpt)), generation=options.generation)
        fonts: Any = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
        try:
            _, address, _ = chat.launch(
                server_name=HOST,
                server_port=options.port,
                share=False,
                mcp_server=False,
                ssr_mode=False,
                enable_monitoring=False,
                max_file_size=model.reading.max_image_bytes,
                theme=gradio.themes.Default(**fonts),  # the default theme loads its fonts from another machine
                css="[aria-label=Share] { display: none }",  # it would send an image to a hub
                footer_links=[],
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError as error:
            raise ValueError(f"port={options.port} is in use or not allowed; choose another port=") from error
        print(f"Open {address} in a browser on this machine. Ctrl-C ends the program.", flush=True)
        chat.block_thread()


def main() -> None:
    run_program(demo, usage=USAGE)


if __name__ == "__main__":
    main()
