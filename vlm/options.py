"""Checks options against constructors: unknown, missing and wrongly typed ones raise before anything is created."""

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
    """The classes that a config group accepts: those in `folders`, also from stored configs, or derived from `base`."""

    base: str
    folders: tuple[str, ...]
    needs: tuple[str, ...] = ()  # attributes that the class must have, if the base does not define them


MODULE = "torch.nn.Module"
KINDS = {  # by config key; the longest matching prefix counts
    "encoder": Kind(MODULE, ("vlm.encoders.",), ("blocks",)),
    "connector": Kind(MODULE, ("vlm.connectors.",), ("fusion",)),
    "llm": Kind(MODULE, ("vlm.llms.",), ("fusions", "layers", "add_lora")),
    "model": Kind("vlm.models.base.Model", ("vlm.models.",)),
    "objective": Kind("vlm.objectives.base.Objective", ("vlm.objectives.",)),
    "benchmark": Kind("vlm.evaluation.benchmarks.base.Benchmark", ("vlm.evaluation.benchmarks.",)),
    "rival": Kind("vlm.evaluation.openai.OpenAI", ("vlm.evaluation.openai.",)),
    "evaluators": Kind("vlm.evaluation.base.Evaluator", ("vlm.evaluation.",)),
    ".scorer": Kind("vlm.evaluation.scorers.base.Scorer", ("vlm.evaluation.scorers.",)),  # of an evaluator or benchmark
    "data": Kind("vlm.schema.Source", ("vlm.data.sources.",)),
    "trainer": Kind("lightning.pytorch.Trainer", ("lightning.pytorch.Trainer",)),
    "trainer.strategy": Kind(
        "lightning.pytorch.strategies.Strategy", ("lightning.pytorch.strategies.", "vlm.training.sharding.")
    ),
    "callbacks": Kind("lightning.pytorch.Callback", ("lightning.pytorch.callbacks.", "vlm.callbacks.")),
    "logger": Kind("lightning.pytorch.loggers.Logger", ("lightning.pytorch.loggers.", "vlm.loggers.")),
}
KWARGS_OF = {  # functions that get the other arguments of a constructor (**kwargs)
    "lightning.pytorch.loggers.WandbLogger": "wandb.init",
    "lightning.pytorch.loggers.TensorBoardLogger": "torch.utils.tensorboard.SummaryWriter",
    "vlm.loggers.wandb.Wandb": "wandb.init",
    "vlm.loggers.tensorboard.TensorBoard": "torch.utils.tensorboard.SummaryWriter",
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
    """The constructor call of one part, with checked options; `derived` are arguments from code.

    Raises ValueError for a target that the group does not accept, an unknown option (with the choices), a missing
    option, or a value of the wrong type.
    """
    check_mapping(name, options)
    arguments = dict(options)
    target = arguments.pop("_target_", None)
    return _bound(name, find_class(name, target), arguments, derived, target)


def bind_class(
    name: str, constructor: Callable[..., Any], options: Any, derived: Mapping[str, Any] | None = None
) -> partial[Any]:
    """As `bind`, for a section whose class is fixed."""
    check_mapping(name, options)
    return _bound(name, constructor, dict(options), derived)


def _bound(
    name: str,
    constructor: Callable[..., Any],
    arguments: dict[str, Any],
    derived: Mapping[str, Any] | None,
    target: str = "",
) -> partial[Any]:
    derived = dict(derived or {})
    accepted = parameters(constructor)
    receiver = _import(KWARGS_OF[target]) if target in KWARGS_OF else None
    passed_on = parameters(receiver).keys() - accepted.keys() if receiver is not None else set()
    check_keys(name, arguments, (accepted.keys() | passed_on) - derived.keys())
    missing = [
        key for key, p in accepted.items() if p.default is p.empty and key not in arguments and key not in derived
    ]
    if missing:
        raise ValueError(f"{name} lacks the option {missing[0]}; set {name}.{missing[0]}=")
    check_types(name, {key: value for key, value in arguments.items() if key in accepted}, constructor)
    if receiver is not None:
        check_types(name, {key: value for key, value in arguments.items() if key in passed_on}, receiver)
    return partial(constructor, **arguments, **derived)


def find_class(name: str, target: Any) -> Callable[..., Any]:
    """The class that a config names. Raises ValueError unless its config group accepts the class.

    A class of the user's own package must be derived from the group's base. `vlm.training.trust` refuses such classes
    in stored configs.
    """
    kind = kind_of(name)
    folders = " or ".join(folder.rstrip(".") for folder in kind.folders)
    remedy = f"name a class of {folders}, or one that is derived from {kind.base}"
    if not folders:
        remedy = f"name a class that is derived from {kind.base}"
    if not isinstance(target, str) or "." not in target.strip("."):
        raise ValueError(f"{name}._target_={target} is not allowed; {remedy}")
    try:
        found = _import(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name}._target_={target} cannot be imported ({error})") from error
    if not inspect.isclass(found) or not (found.__module__.startswith(kind.folders) or _derived(found, kind.base)):
        raise ValueError(f"{name}._target_={target} is not allowed; {remedy}")
    if inspect.isabstract(found):
        raise ValueError(f"{name}._target_={target} is abstract and cannot be created; {remedy}")
    if missing := [attribute for attribute in kind.needs if not hasattr(found, attribute)]:
        raise ValueError(f"{name}._target_={target} cannot be the {name}: it has no attribute {missing[0]}; {remedy}")
    return found


def kind_of(name: str) -> Kind:
    """The classes that the group of an option accepts; for an unknown group, any module."""
    nested = next((key for key in KINDS if key.startswith(".") and name.endswith(key)), None)
    group = nested or max((key for key in KINDS if name == key or name.startswith(f"{key}.")), key=len, default=None)
    return Kind(MODULE, ()) if group is None else KINDS[group]


def _derived(found: type, base: str) -> bool:
    return issubclass(found, _import(base))


def _import(target: str) -> Any:
    module, _, attribute = target.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def defaults(name: str, target: str) -> dict[str, Any]:
    """The default arguments of a constructor."""
    accepted = parameters(find_class(name, target))
    return {key: p.default for key, p in accepted.items() if p.default is not p.empty}


@cache
def parameters(constructor: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The named parameters of a constructor."""
    signature = inspect.signature(constructor)
    return {name: p for name, p in signature.parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}


def check_keys(name: str, given: Mapping[str, Any], choices: Any) -> None:
    """Raise ValueError for a key that is not one of `choices`."""
    for key in given:
        if key not in choices:
            raise ValueError(unknown_key(f"{name}.{key}" if name else str(key), choices))


def unknown_key(full_key: str, choices: Any, asked: str | None = None) -> str:
    """The error for an unknown key; `asked` is the misspelled word, by default the last part of the key."""
    if not choices:
        return f"there is no option {full_key}; {full_key.rpartition('.')[0]} has no options here"
    close = get_close_matches(asked or full_key.rpartition(".")[2], list(map(str, choices)), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"there is no option {full_key}; {hint}choose one of {', '.join(sorted(map(str, choices)))}"


def check_types(name: str, arguments: Mapping[str, Any], constructor: Callable[..., Any]) -> None:
    """Raise ValueError for a value that the constructor's annotation does not allow, with the allowed ones."""
    hints = _hints(constructor.__init__ if inspect.isclass(constructor) else constructor)
    path = f"{getattr(constructor, '__module__', '')}.{getattr(constructor, '__qualname__', '')}"
    check_values(name, arguments, {**hints, **LIBRARIES.get(path, {})})


@cache
def _hints(function: Any) -> dict[str, Any]:
    """The annotations of a function, without names of libraries that only type checkers import."""
    try:
        return get_type_hints(function, include_extras=True)
    except (NameError, TypeError):
        hints: dict[str, Any] = {}
        for key, hint in getattr(function, "__annotations__", {}).items():
            with suppress(NameError, TypeError):
                # One at a time, so that a missing name affects only its own hint.
                hints |= get_type_hints(SimpleNamespace(__annotations__={key: hint}), function.__globals__)
        return hints


def check_mapping(name: str, value: Any) -> None:
    """Raise ValueError if a section or group is not a mapping."""
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
    """A key of a mapping that is not one of `choices`."""

    key: str
    choices: tuple[str, ...]

    def __str__(self) -> str:
        return unknown_key(self.key, self.choices)


def check_values(name: str, values: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Raise ValueError for a value that its hint does not allow; values without a hint must be finite."""
    for key, value in values.items():
        full_key = f"{name}.{key}" if name else str(key)
        if (misfit := _first_misfit(full_key, value, hints.get(key, Any))) is not None:
            raise ValueError(str(misfit))


def _first_misfit(key: str, value: Any, hint: Any) -> Misfit | UnknownKey | None:
    """The first value or key that a hint does not allow; None if there is none."""
    if hint is Any and isinstance(value, Mapping | list):
        hint = dict[Any, Any] if isinstance(value, Mapping) else list[Any]  # checks that each entry is finite
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _outside(key, value, hint)
    if origin in (Union, UnionType):
        misfits = []
        for each in inner:
            if (misfit := _first_misfit(key, value, each)) is None:
                return None
            misfits.append(misfit)
        return next((misfit for misfit in misfits if misfit.key != key), Misfit(key, value, hint))
    if origin in (list, tuple, Sequence, dict, Mapping):
        return _first_misfit_inside(key, value, hint)
    if origin is Literal:
        fits = any(type(value) is type(choice) and value == choice for choice in inner)
    elif hint in (int, float):
        kinds = (int,) if hint is int else (int, float)
        fits = isinstance(value, kinds) and not isinstance(value, bool) and _finite(value)
    else:
        fits = (hint is Any or _bearable(value, hint)) and _finite(value)
    return None if fits else Misfit(key, value, hint)


def _outside(key: str, value: Any, hint: Any) -> Misfit | UnknownKey | None:
    """As `_first_misfit`, for an `Annotated` hint with bounds."""
    kind, *bounds = get_args(hint)
    if (misfit := _first_misfit(key, value, kind)) is not None:
        return Misfit(key, value, hint) if misfit.key == key else misfit
    for bound in bounds:
        if isinstance(bound, Known):
            for name, entry in value.items():
                if (misfit := _first_misfit(f"{key}.{name}", entry, bound.hints.get(name, Any))) is not None:
                    return misfit
            return None
        if value not in bound:
            return Misfit(key, value, hint)
    return None


def _first_misfit_inside(key: str, value: Any, hint: Any) -> Misfit | UnknownKey | None:
    """As `_first_misfit`, for the hint of a list or mapping."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            return Misfit(key, value, hint)
        for name, entry in value.items():
            if get_origin(inner[0]) is Literal and name not in get_args(inner[0]):
                return UnknownKey(f"{key}.{name}", get_args(inner[0]))
            misfit = _first_misfit(f"the name in {key}", name, inner[0]) or _first_misfit(
                f"{key}.{name}", entry, inner[1]
            )
            if misfit:
                return misfit
        return None
    fixed = origin is tuple and Ellipsis not in inner
    if not isinstance(value, list | tuple) or (fixed and len(value) != len(inner)):
        return Misfit(key, value, hint)
    for index, entry in enumerate(value):
        if misfit := _first_misfit(f"{key}[{index}]", entry, inner[index] if fixed else inner[0]):
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
    """A value as on the command line; long values are truncated."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    text = repr(value)
    return quoted(value) if isinstance(value, str) else text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def described(hint: Any) -> str:
    """The allowed values of a hint, in words that follow "must be"."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind, comma, entries = described(inner[0]).partition(", each")
        bounds = [str(bound) for bound in inner[1:] if not isinstance(bound, Known)]
        return " ".join([kind, *bounds]) + comma + entries
    if origin in (Union, UnionType):
        within = {
            int: float in inner,
            str: Path in inner,
            type(None): True,
        }  # covered by the other type, or listed last
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
