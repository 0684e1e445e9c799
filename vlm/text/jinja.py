"""Renders chat templates, which are untrusted code, in Jinja's sandbox with a limit on their work.

The dialect is that of Transformers' `apply_chat_template`: the same extensions, filters and globals.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any

# Loop iterations and calls: a million takes about a second. Published templates need about ten per message.
MAX_STEPS = 1_000_000
STEPS_PER_MESSAGE = 100
MAX_SIZE = 100_000_000  # characters or items in the result of an operator

_steps: ContextVar[Iterator[int]] = ContextVar("_steps")


def render(
    template: str, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, **variables: Any
) -> str:
    """The conversation as the template renders it.

    Raises ValueError where the template is broken, refuses the conversation, does what the sandbox forbids, or takes
    more than `MAX_STEPS` loop iterations and calls.
    """
    from jinja2 import TemplateError  # imported here, because it is slow

    errors = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
    token = _steps.set(iter(range(MAX_STEPS + STEPS_PER_MESSAGE * len(messages))))
    try:
        return _compile(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **variables
        )
    except errors as error:
        raise ValueError(f"the chat template refuses the conversation ({str(error)[:200]})") from error
    finally:
        _steps.reset(token)


def _step() -> None:
    from jinja2.exceptions import SecurityError

    if next(_steps.get(), None) is None:
        raise SecurityError(f"its loops and calls take more than {MAX_STEPS:,} steps")


def _check_size(size: int) -> None:
    from jinja2.exceptions import SecurityError

    if size > MAX_SIZE:
        raise SecurityError(f"it makes a value of {size:,} characters")


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text for other trainers; here only its body is rendered."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Sandbox(ImmutableSandboxedEnvironment):
        """Counts loop iterations and calls, and checks the size of results of operators before they are computed."""

        intercepted_binops = frozenset({"+", "*", "**"})

        def _parse(self, *args: Any) -> Any:
            tree = super()._parse(*args)
            for loop in list(tree.find_all(nodes.For)):
                loop.iter = nodes.Call(nodes.EnvironmentAttribute("bounded"), [loop.iter], [], None, None)
            for joined in list(tree.find_all(nodes.Concat)):
                joined.nodes = [nodes.Call(nodes.EnvironmentAttribute("join"), joined.nodes, [], None, None)]
            return tree

        @staticmethod
        def bounded(items: Iterable[Any]) -> Iterator[Any]:
            for item in items:
                _step()
                yield item

        @staticmethod
        def join(*values: Any) -> str:
            texts = [str(value) for value in values]
            _check_size(sum(map(len, texts)))
            return "".join(texts)

        def call(self, *args: Any, **kwargs: Any) -> Any:
            _step()
            return super().call(*args, **kwargs)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "+":
                size = _size(left) + _size(right)
            elif operator == "*":
                size = max(_size(left) * _number(right), _number(left) * _size(right))
            else:
                size = _number(left).bit_length() * _number(right)
            _check_size(size)
            return super().call_binop(context, operator, left, right)

    class PlainNamespace(Namespace):
        """A namespace without names that begin with an underscore, which would reach Python's internals."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            values = dict(*args[1:], **kwargs)
            Namespace.__init__(args[0])
            for name, value in values.items():
                args[0][name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"it writes the attribute {name!r} of a namespace")
            super().__setitem__(name, value)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    sandbox.filters["tojson"] = tojson
    sandbox.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": PlainNamespace,
    }
    return sandbox.from_string(template)


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _number(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 0
