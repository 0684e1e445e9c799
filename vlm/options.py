"""Options against constructors: an unknown, missing or wrongly typed one is told before anything is made."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any, get_type_hints

from beartype import BeartypeConf
from beartype.door import is_bearable
from beartype.roar import BeartypeException

ALLOWED = ("vlm.", "torch.", "lightning.pytorch.")
PASSED_ON = {  # where what a constructor does not know ends up
    "lightning.pytorch.loggers.WandbLogger": "wandb.init",
    "lightning.pytorch.loggers.TensorBoardLogger": "torch.utils.tensorboard.SummaryWriter",
}
TYPES = BeartypeConf(is_pep484_tower=True)  # a whole number is also a float


def bind(name: str, options: Mapping[str, Any], derived: Mapping[str, Any] | None = None) -> partial[Any]:
    """The call that makes one part, its options checked against the constructor.

    Raises ValueError for a target outside the allowed packages, an unknown option (naming the choices), a missing one,
    or a value of the wrong type.
    """
    arguments = dict(options)
    target = arguments.pop("_target_", None)
    constructor = _constructor(name, target)
    derived = dict(derived or {})
    taken = parameters(constructor)
    passed_on = parameters(_import(PASSED_ON[target])).keys() if target in PASSED_ON else set()
    known(name, arguments, (taken.keys() | passed_on) - derived.keys())
    missing = [key for key, p in taken.items() if p.default is p.empty and key not in arguments and key not in derived]
    if missing:
        raise ValueError(f"{name} lacks the option {missing[0]}; set {name}.{missing[0]}=")
    typed(name, arguments, constructor)
    return partial(constructor, **arguments, **derived)


def _constructor(name: str, target: Any) -> Callable[..., Any]:
    if not isinstance(target, str) or not target.startswith(ALLOWED):
        raise ValueError(f"{name}._target_={target} is not allowed; targets begin with {', '.join(ALLOWED)}")
    try:
        return _import(target)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name}._target_={target} cannot be imported ({error})") from error


def _import(target: str) -> Any:
    module, _, attribute = target.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def defaults(target: str) -> dict[str, Any]:
    """What a constructor takes where an option is not given."""
    taken = parameters(_constructor("connector", target))
    return {name: p.default for name, p in taken.items() if p.default is not p.empty}


def parameters(constructor: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What a constructor takes by name."""
    signature = inspect.signature(constructor)
    return {name: p for name, p in signature.parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}


def known(name: str, given: Mapping[str, Any], choices: Any) -> None:
    for key in given:
        if key not in choices:
            raise ValueError(unknown_key(f"{name}.{key}" if name else str(key), choices))


def unknown_key(full_key: str, choices: Any, asked: str | None = None) -> str:
    """What to say of a key that does not exist; `asked` is the word that was misspelt, the key's last by default."""
    close = get_close_matches(asked or full_key.rpartition(".")[2], list(map(str, choices)), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"there is no option {full_key}; {hint}choose one of {', '.join(sorted(map(str, choices)))}"


def typed(name: str, arguments: Mapping[str, Any], constructor: Callable[..., Any]) -> None:
    """Raise on a value that the constructor's annotation does not allow; hints that cannot be read are not checked."""
    target = constructor.__init__ if inspect.isclass(constructor) else constructor
    try:
        hints = get_type_hints(target)
    except (NameError, TypeError):  # names imported for type checkers only
        return
    for key, value in arguments.items():
        if key not in hints or key == "objective":
            continue
        # beartype looks at one entry of a dictionary, so each is given alone; YAML knows no tuples.
        values = [{k: v} for k, v in value.items()] if isinstance(value, dict) and value else [value]
        if isinstance(value, list) and not is_bearable(value, hints[key], conf=TYPES):
            values = [tuple(value)]
        try:
            fits = all(is_bearable(each, hints[key], conf=TYPES) for each in values)
            fits &= not (isinstance(value, bool) and hints[key] in (int, float, int | None, float | None))
        except BeartypeException:
            continue
        if not fits:
            wanted = str(hints[key]).replace("typing.", "").replace("<class '", "").replace("'>", "")
            raise ValueError(f"{name}.{key}={value!r} is a {type(value).__name__}, but it takes {wanted}")
