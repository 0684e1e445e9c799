"""Write docs/labels.md, what is learned of ten conversations with each chat template: `python -m vlm.cli.labels`.

The page holds rows as `TextEncoder` makes them, with a byte tokenizer that has the marks of every family.
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
# A message is a role's first letter and what it says; an @ is an image.
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

Written by `python -m vlm.cli.labels` (a test keeps it up to date). Each line is a row; what stands between ⟦ and ⟧ is
supervised, `\\n` is a newline, and images are two tokens each. The tokenizer of this page has one token a byte, so that
the page needs no download; the rules are the same for every tokenizer:

- All that follows a turn's generation prompt is supervised, up to the special token that ends the turn, whatever the
  characters are. What a template writes after that token is not.
- A generation prompt is cut before the spaces at its end: `ASSISTANT: ` is asked with as `ASSISTANT:`, and the space is
  learned. Many tokenizers make one token of a space and the word after it (`▁Yes`), and a space alone before a
  number, Japanese or an emoji (`▁` `2`); either is the first thing that the model has to write.
- No token lies across the end of a generation prompt. An answer that begins with a newline, after a prompt that ends
  with one, begins with a token of its own, since generation starts after the prompt's tokens. So the ids of a prompt
  and the ids to learn are the ids of the row.
- The white space around an answer stays, in rows and in references, unless the template itself trims it (`gemma`,
  `llama2`, `llama3`, `llama3_2` and `mistral` do, as published; `qwen3` drops newlines at the start of a last answer).
- With `data.train_on=last_assistant` the last answer alone is supervised, with `all` every token but the images'.
- `qwen3` writes an empty thought before the last answer only, and `mistral` the system text into the last user turn
  only: both as published. An earlier answer of a conversation is then learned without them;
  `data.train_on=last_assistant` learns the last one alone, which is asked for as it was learned.
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
