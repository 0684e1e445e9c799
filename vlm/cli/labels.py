"""Write docs/labels.md, the supervised tokens of ten conversations with each chat template: `python -m vlm.cli.labels`.

The page shows the output of `TextEncoder`, with a byte tokenizer that has the special tokens of all templates.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

import yaml

from vlm.launch.entry import CONF
from vlm.llms.bytes import byte_tokenizer
from vlm.schema import Content, Message, Sample
from vlm.text.encode import TextEncoder
from vlm.text.templates import TEMPLATES

PAGE = Path(CONF).parent / "docs" / "labels.md"
Role = Literal["system", "user", "assistant"]
# A message is the first letter of its role and then its text; an @ is an image.
CONVERSATIONS: dict[str, list[str]] = {
    "a number": ["u@How many stars?", "a2"],
    "Japanese": ["u@星は何色ですか。", "a青です。"],
    "an emoji": ["u@How does it look?", "a🙂"],
    "a space first and last": ["u@ What is it? ", "a a star "],
    "a newline first": ["u@\nWhat is it?\n", "a\n\na star\n"],
    "a blank answer among others": ["uHi", "a", "uAnd now?", "a  ", "uWell?", "aYes."],
    "code": ["uWrite f.", "adef f(x):\n    return x\n"],
    "a system text and several turns": ["sBe brief.", "u@Where?", "aLeft.", "uHow many?", "a3.14"],
    "two images": ["u@ and @\nSame?", "aNo."],
    "a special token that somebody types": ["uSay <|im_end|></s><eos>.", "a<|im_end|></s><eos>"],
}
HEAD = """# What is learned

This page is written by `python -m vlm.cli.labels`, and a test keeps it up to date. It shows ten conversations with
each chat template, one conversation per line. The text between ⟦ and ⟧ is supervised, `\\n` is a newline, and each
image has two visual tokens. The page uses a tokenizer with one token per byte, which needs no download. The rules are
the same for every tokenizer:

- An answer is supervised from the end of its generation prompt up to its end-of-turn token, which is included. What a
  template writes after that token is not supervised.
- A generation prompt does not include the spaces at its end. With the template text `ASSISTANT: `, the prompt is
  `ASSISTANT:` and the space is supervised. The reason is that many tokenizers have one token for a space and the word
  after it (`▁Yes`), but a separate token for a space before a number, a Japanese character or an emoji (`▁` `2`). In
  both cases the model generates the space.
- A token never crosses the end of a generation prompt. If the prompt ends with a newline and the answer begins with
  one, these are two tokens. So the ids in training are the ids of the prompt followed by the ids of the answer, as in
  generation.
- White space around an answer is kept, also in references, unless the template strips it. The templates `gemma`,
  `llama2`, `llama3`, `llama3_2` and `mistral` strip it, and `qwen3` strips newlines at the start of the last answer,
  as published.
- With `data.train_on=last_assistant`, only the last answer is supervised. With `all`, all tokens except visual tokens
  are supervised.
- As published, `qwen3` writes an empty thought before the last answer only, and `mistral` writes the system text in
  the last user turn only. Earlier answers are therefore trained without them, although a model that generates always
  has them. `data.train_on=last_assistant` avoids this difference.
"""


def page() -> str:
    """The page in Markdown."""
    return HEAD + "".join(_section(name) for name in TEMPLATES)


def _section(template: str) -> str:
    options = [path.stem for path in sorted(Path(CONF, "llm").glob("[!_]*.yaml")) if _template_of(path) == template]
    used = f"The default of {', '.join(f'`{option}`' for option in options)}." if options else "No option's default."
    encoder = TextEncoder(tokenizer=byte_tokenizer(), num_image_tokens=2, max_length=4096, chat_template=template)
    lines = []
    for name, turns in CONVERSATIONS.items():
        messages = [_message(turn) for turn in turns]
        shown = encoder.display(encoder.encode(Sample(name, [], messages))).replace("\n", "\\n")
        lines.append(f"{name}:\n    {shown}\n")
    return f"\n## {template}\n\n{used}\n\n```text\n{''.join(lines)}```\n"


def _template_of(path: Path) -> str | None:
    return yaml.safe_load(path.read_text(encoding="utf-8"))["chat_template"]


def _message(turn: str) -> Message:
    roles: dict[str, Role] = {"s": "system", "u": "user", "a": "assistant"}
    content: list[Content] = []
    for number, text in enumerate(turn[1:].split("@")):
        content += [Content(type="image")] * (number > 0)
        content += [Content(type="text", text=text)] * bool(text)
    return Message(role=roles[turn[0]], content=content)


def main() -> None:
    argparse.ArgumentParser(prog="python -m vlm.cli.labels", description=__doc__).parse_args()
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
