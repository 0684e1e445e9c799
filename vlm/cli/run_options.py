"""The command line of the programs that take a trained run: vlm-chat, vlm-demo and vlm-export."""

# Annotations are evaluated here, because the subclasses of RunOptions in other files inherit them.
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_type_hints

import yaml

from vlm.options import bind_class
from vlm.ranges import Name, Number, Range

if TYPE_CHECKING:
    from vlm.inference import TrainedModel

HELP = """  device=auto            or cpu, cuda, cuda:1; auto is the accelerator of this machine if it has one
  dtype=auto             or float32, bfloat16, float16; auto is bfloat16 where the hardware supports it
  max_new_tokens=256     an answer is cut after so many tokens
  temperature=0          0 takes the most probable token; above 0 the answers are sampled
  llm.pretrained=<dir>   any option of the run, such as where the weights of a run from elsewhere lie"""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the programs that answer take, beside options of the run."""

    ckpt: Name
    device: Name = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_new_tokens: Annotated[int, Range(1, 65_536)] = 256
    temperature: Annotated[Number, Range(0, 100)] = 0

    @property
    def generation(self) -> dict[str, Any]:
        """The arguments of `TrainedModel.answer`."""
        sampled = {"do_sample": True, "temperature": float(self.temperature)} if self.temperature else {}
        return {"max_new_tokens": self.max_new_tokens, **sampled}


Options = TypeVar("Options")


def parse(program: str, kind: type[Options], arguments: Sequence[str]) -> tuple[Options, dict[str, Any]]:
    """The program's options, and options of the run by their full key; a word without `=` is the run directory.

    Raises ValueError for an unknown option or a value that is not allowed.
    """
    texts = {key for key, hint in get_type_hints(kind).items() if hint in (str, str | None)}
    given: dict[str, Any] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or "/" in key:  # a folder, in whose name a sweep may have written one
            key, value = "ckpt", argument
        given[key] = value if key in texts or key.endswith(".pretrained") else _value(value)
    of_run = {key: value for key, value in given.items() if "." in key}
    for key, what in (("ckpt", "run dir"), ("out", "folder")):
        if key in get_type_hints(kind) and not given.get(key):
            raise ValueError(f"{program} needs {key}=<{what}>")
    options = bind_class("", kind, {key: value for key, value in given.items() if key not in of_run})()
    return options, of_run


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def opened(options: RunOptions, overrides: dict[str, Any]) -> "TrainedModel":
    """The model that the options name."""
    from vlm.inference import load  # imported here, because it takes seconds

    return load(options.ckpt, device=options.device, dtype=options.dtype, overrides=overrides)
