"""Options against constructors: an unknown, missing or wrongly typed one is told before anything is made."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from beartype.door import is_bearable
from beartype.roar import BeartypeException

from vlm.quote import LONGEST, quoted
from vlm.ranges import LIBRARIES, Known


class Kind(NamedTuple):
    """What a config group may name: classes of its own folders, which a stored config may name too, or of a base."""

    base: str
    folders: tuple[str, ...]
    needs: tuple[str, ...] = ()  # what a class of any module must have, where a base says nothing of it


MODULE = "torch.nn.Module"
KINDS = {  # a key stands for all below it, unless a longer one does
    "encoder": Kind(MODULE, ("vlm.encoders.",), ("blocks",)),
    "connector": Kind(MODULE, ("vlm.connectors.",), ("fusion",)),
    "llm": Kind(MODULE, ("vlm.llms.",), ("fusions", "layers", "add_lora")),
    "model": Kind("vlm.models.base.Model", ("vlm.models.",)),
    "objective": Kind("vlm.objectives.base.Objective", ("vlm.objectives.",)),
    "evaluators": Kind("vlm.evaluation.base.Evaluator", ("vlm.evaluation.",)),
    ".scorer": Kind("vlm.evaluation.scorers.base.Scorer", ("vlm.evaluation.scorers.",)),  # of an evaluator
    "data": Kind("vlm.schema.Source", ("vlm.data.sources.",)),
    "trainer": Kind("lightning.pytorch.Trainer", ("lightning.pytorch.Trainer",)),
    "trainer.strategy": Kind(
        "lightning.pytorch.strategies.Strategy", ("lightning.pytorch.strategies.", "vlm.training.sharding.")
    ),
    "callbacks": Kind("lightning.pytorch.Callback", ("lightning.pytorch.callbacks.", "vlm.callbacks.")),
    "logger": Kind("lightning.pytorch.loggers.Logger", ("lightning.pytorch.loggers.", "vlm.loggers.")),
}
PASSED_ON = {  # where what a constructor does not know ends up
    "lightning.pytorch.loggers.WandbLogger": "wandb.init",
    "lightning.pytorch.loggers.TensorBoardLogger": "torch.utils.tensorboard.SummaryWriter",
}
WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    Path: "a path",
    Any: "finite",
    type(None): "null",
}


def bind(name: str, options: Any, derived: Mapping[str, Any] | None = None) -> partial[Any]:
    """The call that makes one part, its options checked against the constructor.

    Raises ValueError for a target that is no class of the group's kind, an unknown option (naming the choices), a
    missing one, or a value of the wrong type.
    """
    mapping(name, options)
    arguments = dict(options)
    target = arguments.pop("_target_", None)
    return _bound(name, find_class(name, target), arguments, derived, target)


def bind_class(
    name: str, constructor: Callable[..., Any], options: Any, derived: Mapping[str, Any] | None = None
) -> partial[Any]:
    """As `bind`, for a section that is always made by the same class and names none."""
    mapping(name, options)
    return _bound(name, constructor, dict(options), derived)


def _bound(
    name: str,
    constructor: Callable[..., Any],
    arguments: dict[str, Any],
    derived: Mapping[str, Any] | None,
    target: str = "",
) -> partial[Any]:
    derived = dict(derived or {})
    taken = parameters(constructor)
    receiver = _import(PASSED_ON[target]) if target in PASSED_ON else None
    passed_on = parameters(receiver).keys() - taken.keys() if receiver is not None else set()
    known(name, arguments, (taken.keys() | passed_on) - derived.keys())
    missing = [key for key, p in taken.items() if p.default is p.empty and key not in arguments and key not in derived]
    if missing:
        raise ValueError(f"{name} lacks the option {missing[0]}; set {name}.{missing[0]}=")
    typed(name, {key: value for key, value in arguments.items() if key in taken}, constructor)
    if receiver is not None:
        typed(name, {key: value for key, value in arguments.items() if key in passed_on}, receiver)
    return partial(constructor, **arguments, **derived)


def find_class(name: str, target: Any) -> Callable[..., Any]:
    """The class that a config names. Raises ValueError unless it is of the kind that the config's group takes.

    A class of the user's own package is, if it is derived from the group's base. Whether the user has said so or a
    stored config does, which must not, `vlm.training.trust` looks at.
    """
    kind = kind_of(name)
    folders = " or ".join(folder.rstrip(".") for folder in kind.folders)
    wanted = f"name a class of {folders}, or one that is derived from {kind.base}"
    if not folders:
        wanted = f"name a class that is derived from {kind.base}"
    if not isinstance(target, str) or "." not in target.strip("."):
        raise ValueError(f"{name}._target_={target} is not allowed; {wanted}")
    try:
        found = _import(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name}._target_={target} cannot be imported ({error})") from error
    if not inspect.isclass(found) or not (found.__module__.startswith(kind.folders) or _derived(found, kind.base)):
        raise ValueError(f"{name}._target_={target} is not allowed; {wanted}")
    if inspect.isabstract(found):
        raise ValueError(f"{name}._target_={target} is abstract and cannot be made; {wanted}")
    if missing := [attribute for attribute in kind.needs if not hasattr(found, attribute)]:
        raise ValueError(f"{name}._target_={target} cannot be the {name}: it has no attribute {missing[0]}; {wanted}")
    return found


def kind_of(name: str) -> Kind:
    """The kind of classes that an option's group takes; a part that only some model knows is any module."""
    nested = next((key for key in KINDS if key.startswith(".") and name.endswith(key)), None)
    group = nested or max((key for key in KINDS if name == key or name.startswith(f"{key}.")), key=len, default=None)
    return Kind(MODULE, ()) if group is None else KINDS[group]


def _derived(found: type, base: str) -> bool:
    return issubclass(found, _import(base))


def _import(target: str) -> Any:
    module, _, attribute = target.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def defaults(name: str, target: str) -> dict[str, Any]:
    """What the constructor of an option takes where an option of its own is not given."""
    taken = parameters(find_class(name, target))
    return {key: p.default for key, p in taken.items() if p.default is not p.empty}


@cache
def parameters(constructor: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What a constructor takes by name."""
    signature = inspect.signature(constructor)
    return {name: p for name, p in signature.parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}


def known(name: str, given: Mapping[str, Any], choices: Any) -> None:
    for key in given:
        if key not in choices:
            raise ValueError(unknown_key(f"{name}.{key}" if name else str(key), choices))


def unknown_key(full_key: str, choices: Any, asked: str | None = None) -> str:
    """What to say of a key that does not exist; `asked` is the word that was misspelled, the key's last by default."""
    if not choices:
        return f"there is no option {full_key}; {full_key.rpartition('.')[0]} has no options here"
    close = get_close_matches(asked or full_key.rpartition(".")[2], list(map(str, choices)), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"there is no option {full_key}; {hint}choose one of {', '.join(sorted(map(str, choices)))}"


def typed(name: str, arguments: Mapping[str, Any], constructor: Callable[..., Any]) -> None:
    """Raise ValueError on a value that the constructor's annotation does not allow, naming the key and what is."""
    hints = _hints(constructor.__init__ if inspect.isclass(constructor) else constructor)
    whose = f"{getattr(constructor, '__module__', '')}.{getattr(constructor, '__qualname__', '')}"
    fit(name, arguments, {**hints, **LIBRARIES.get(whose, {})})


@cache
def _hints(function: Any) -> dict[str, Any]:
    """The annotations of a function; in a library's, names that only type checkers import are left out."""
    try:
        return get_type_hints(function, include_extras=True)
    except (NameError, TypeError):
        hints: dict[str, Any] = {}
        for key, hint in getattr(function, "__annotations__", {}).items():
            with suppress(NameError, TypeError):
                # One at a time, so that a name that is missing costs no more than its own hint.
                hints |= get_type_hints(SimpleNamespace(__annotations__={key: hint}), function.__globals__)
        return hints


def mapping(name: str, value: Any) -> None:
    """Raise ValueError where a section or group is a single value."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}={shown(value)} must be a mapping of options, such as {name}.<option>=<value>")


class Misfit(NamedTuple):
    """A value, or an entry inside one, that its hint does not allow."""

    key: str
    value: Any
    hint: Any

    def __str__(self) -> str:
        return f"{self.key}={shown(self.value)} must be {described(self.hint)}"


class UnknownKey(NamedTuple):
    """A name in a mapping that is none of a few."""

    key: str
    choices: tuple[str, ...]

    def __str__(self) -> str:
        return unknown_key(self.key, self.choices)


def fit(name: str, values: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Raise ValueError on a value that its hint does not allow; what has no hint must be finite all the same."""
    for key, value in values.items():
        full_key = f"{name}.{key}" if name else str(key)
        if (misfit := _misfit(full_key, value, hints.get(key, Any))) is not None:
            raise ValueError(str(misfit))


def _misfit(key: str, value: Any, hint: Any) -> Misfit | UnknownKey | None:
    """The first thing in a value that a hint does not allow; None where there is none."""
    if hint is Any and isinstance(value, Mapping | list):
        hint = dict[Any, Any] if isinstance(value, Mapping) else list[Any]  # each entry must be finite
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _outside(key, value, hint)
    if origin in (Union, UnionType):
        misfits = []
        for each in inner:
            if (misfit := _misfit(key, value, each)) is None:
                return None
            misfits.append(misfit)
        return next((misfit for misfit in misfits if misfit.key != key), Misfit(key, value, hint))
    if origin in (list, tuple, Sequence, dict, Mapping):
        return _misfit_inside(key, value, hint)
    if origin is Literal:
        fits = any(type(value) is type(choice) and value == choice for choice in inner)
    elif hint in (int, float):
        kinds = (int,) if hint is int else (int, float)
        fits = isinstance(value, kinds) and not isinstance(value, bool) and _finite(value)
    else:
        fits = (hint is Any or _bearable(value, hint)) and _finite(value)
    return None if fits else Misfit(key, value, hint)


def _outside(key: str, value: Any, hint: Any) -> Misfit | UnknownKey | None:
    """As `_misfit`, of a hint with bounds."""
    kind, *bounds = get_args(hint)
    if (misfit := _misfit(key, value, kind)) is not None:
        return Misfit(key, value, hint) if misfit.key == key else misfit
    for bound in bounds:
        if isinstance(bound, Known):
            for name, entry in value.items():
                if (misfit := _misfit(f"{key}.{name}", entry, bound.hints.get(name, Any))) is not None:
                    return misfit
            return None
        if value not in bound:
            return Misfit(key, value, hint)
    return None


def _misfit_inside(key: str, value: Any, hint: Any) -> Misfit | UnknownKey | None:
    """As `_misfit`, of a list's or a mapping's hint."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            return Misfit(key, value, hint)
        for name, entry in value.items():
            if get_origin(inner[0]) is Literal and name not in get_args(inner[0]):
                return UnknownKey(f"{key}.{name}", get_args(inner[0]))
            misfit = _misfit(f"the name in {key}", name, inner[0]) or _misfit(f"{key}.{name}", entry, inner[1])
            if misfit:
                return misfit
        return None
    fixed = origin is tuple and Ellipsis not in inner
    if not isinstance(value, list | tuple) or (fixed and len(value) != len(inner)):
        return Misfit(key, value, hint)
    for index, entry in enumerate(value):
        if misfit := _misfit(f"{key}[{index}]", entry, inner[index] if fixed else inner[0]):
            return misfit
    return None


def _bearable(value: Any, hint: Any) -> bool:
    try:
        return is_bearable(value, hint)
    except BeartypeException:  # a hint that cannot be checked
        return True


def _finite(value: Any) -> bool:
    """Whether every number in a value is finite."""
    if isinstance(value, Mapping | list | tuple):
        return all(map(_finite, value.values() if isinstance(value, Mapping) else value))
    return not isinstance(value, float) or math.isfinite(value)


def shown(value: Any) -> str:
    """A value as one would write it on the command line, of a long one the beginning."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    text = repr(value)
    return quoted(value) if isinstance(value, str) else text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def described(hint: Any) -> str:
    """What a hint allows, in words that follow "must be"."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind, comma, entries = described(inner[0]).partition(", each")
        bounds = [str(bound) for bound in inner[1:] if not isinstance(bound, Known)]
        return " ".join([kind, *bounds]) + comma + entries
    if origin in (Union, UnionType):
        within = {int: float in inner, str: Path in inner, type(None): True}  # said by the other, or last
        kinds = [each for each in inner if not within.get(_base(each), False)]
        words = list(dict.fromkeys(map(described, kinds))) + ["null"] * (type(None) in inner)
        return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    if origin is Literal:
        choices = [shown(choice) if not isinstance(choice, str) else choice for choice in inner]
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if origin in (list, Sequence):
        return f"a list, each entry {described(inner[0])}"
    if origin is tuple:
        return f"a list of {len(inner)}, each entry {described(inner[0])}"
    if origin in (dict, Mapping):
        return "a mapping" if inner[1] is Any else f"a mapping, each value {described(inner[1])}"
    return WORDS.get(hint) or str(getattr(hint, "__name__", hint)).replace("typing.", "")


def _base(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint
