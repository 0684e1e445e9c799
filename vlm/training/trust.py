"""Trust in the config.yaml of a run. A file that this user's programs wrote is signed; any other file is untrusted.

The signature is the last line, a keyed hash (HMAC) of the text; the key is in the user's home. A copied file keeps its
signature. An edited file, and a file of another user, has no valid signature. Its paths, classes of other packages and
remote code are used only if the user gives them again on the command line.
"""

from __future__ import annotations

import hashlib
import hmac
import importlib
import os
import re
import secrets
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from vlm import files
from vlm.options import kind_of

SIGNATURE = "# written here: "
MAX_BYTES = 2**20  # largest config.yaml; a typical one has 6,000
NEEDED = (
    "model",
    "data",
    "stage",
    "trainer",
    "logger",
    "callbacks",
    "choices",
    "preflight",
)  # sections of every config.yaml
OPTIONAL = ("encoder", "connector", "llm", "objective", "checkpoint", "answers")  # sections that may be absent
MAY_BE_NONE = ("logger", "callbacks", "evaluators")
# Sections that do not describe the model.
OF_THE_RUN = (
    "data",
    "trainer",
    *MAY_BE_NONE,
    "choices",
    "preflight",
    "plan",
    "resume",
    "sweep",
    "recipe",
    "checkpoint",
)
# A path, not a name or hub id: absolute, in a home or parent folder, or a URL of a local file.
PATH = re.compile(r"^(~|/|\\|\.{1,2}([/\\]|$)|[A-Za-z]:\\|file:|local-dir:)|(^|/)\.\.(/|$)")
HUB = ("pretrained", "name", "init_from")  # keys whose value is a hub id or a folder
OPTION = re.compile(r"(?!.*\.\.)\w[\w.+/-]*")
FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+")  # such as 1e-3, a string in YAML 1.1


def signed(text: str) -> str:
    """The text with the user's signature; unchanged if the key cannot be stored."""
    key = _key()
    return text if key is None else f"{text}{SIGNATURE}{_hash(key, text)}\n"


def is_own(text: str) -> bool:
    """Whether the text has a valid signature of this user."""
    content, separator, found = text.rpartition(SIGNATURE)
    key = _key() if separator else None
    return key is not None and hmac.compare_digest(_hash(key, content), found.strip())


def _hash(key: bytes, text: str) -> str:
    return hmac.new(key, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def _key() -> bytes | None:
    """The user's secret key, created at the first call; None if it cannot be stored."""
    try:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        file = Path(state) / "vlm-template" / "key"
        if not file.is_file():
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            new = file.with_name(f"key-{secrets.token_hex(8)}")
            with files.create(new, "wb") as opened:
                os.fchmod(opened.fileno(), 0o600)
                opened.write(secrets.token_bytes(32))
            with suppress(FileExistsError):
                os.link(new, file)
            new.unlink()
        return files.read(file, max_bytes=1024) or None
    except (OSError, RuntimeError, ValueError):  # no home, or it is not writable
        return None


class _Loader(yaml.SafeLoader):
    """Loads plain values only. Aliases are refused, because a few lines could expand to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "it has an alias (*), which a run's config never has", None)
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^{FLOAT.pattern}$"), list("-+.0123456789"))


def stored_config(run_dir: str | Path) -> tuple[dict[str, Any], bool]:
    """A run's config.yaml as plain values without resolving interpolations, and whether it is signed by this user.

    Raises ValueError if it is missing or incomplete.
    """
    file = Path(run_dir, "config.yaml")
    if not file.exists():
        stages = sorted(path.parent.name for path in file.parent.glob("*/config.yaml"))
        if stages and (file.parent / "options.json").exists():
            raise ValueError(
                f"'{run_dir}' holds a recipe; run its command again, or give one of its stages, such as {stages[-1]}"
            )
        why = "it has no config.yaml" if file.parent.exists() else "there is no such folder"
        raise ValueError(f"'{run_dir}' is not a run directory: {why}; give the folder of a run")
    remedy = "take it from a copy of the run, or start a new run"
    try:
        text = files.read(file, max_bytes=MAX_BYTES).decode("utf-8")
        content = yaml.load(text, _Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason}); {remedy}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if not isinstance(error, (yaml.YAMLError, RecursionError)) and str(file) in str(error):
            raise
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = "" if line is None else f" in line {line + 1}"
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise ValueError(f"{file} is not YAML{where} ({reason}); {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} has {'no content' if content is None else 'no settings'}; {remedy}")
    content.setdefault("choices", {})
    for name in (*NEEDED, *(key for key in OPTIONAL if key in content)):
        if not isinstance(content.get(name), dict) and not (name in MAY_BE_NONE and name in content):
            raise ValueError(f"{file} is incomplete: its {name} is {content.get(name, 'missing')!r:.40}; {remedy}")
    return content, is_own(text)


def model_sections(content: Mapping[str, Any]) -> tuple[str, ...]:
    """The sections of a config that describe the model."""
    return tuple(key for key, value in content.items() if isinstance(value, Mapping) and key not in OF_THE_RUN)


def group_choices(content: Mapping[str, Any]) -> dict[str, str]:
    """The option that a run had of each config group, if it can be given on a command line."""
    found = {}
    for group, option in content["choices"].items():
        if not isinstance(group, str) or not re.fullmatch(r"[a-z_]+", group) or group == "hydra" or option is None:
            continue  # a nested group, or Hydra's
        several = group in MAY_BE_NONE and isinstance(option, str) and option[:1] + option[-1:] == "[]"
        options = option[1:-1].split(",") if several else [option]
        if not all(isinstance(each, str) and OPTION.fullmatch(each) for each in options):
            raise ValueError(
                f"config.yaml of this run has the choice {group}={option!r:.80}, which is not the name of an option"
            )
        found[group] = option
    return found


def restrict(
    settings: Mapping[str, Any],
    *,
    run_dir: Path,
    sections: Collection[str],
    given: Collection[str] = (),
    composed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The settings of an untrusted run, with `trust_remote_code` off.

    Trusted are the keys `given` by the user, with all keys below them, and values that are also in `composed`, the
    user's own configs. Raises ValueError if another value names a class of another package, a path outside the run,
    code to load, or a regular expression.
    """
    own = dict(leaves(composed or {}))

    def trusted(key: str, value: Any) -> bool:
        return within(key, given) or (key in own and own[key] == value)

    def safe(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: safe(f"{key}.{name}", each) for name, each in value.items()}
        return False if key.endswith(".trust_remote_code") and not trusted(key, value) else value

    chosen = {section: settings[section] for section in sections if settings.get(section) is not None}
    if wanted := [
        (key, value)
        for key, value, hint in _values("", chosen)
        if not trusted(key, value) and _is_unsafe(key, value, hint, run_dir)
    ]:
        arguments = " ".join(f"{key}={files.escape_controls(str(value)):.120}" for key, value in wanted)
        raise ValueError(
            f"{run_dir / 'config.yaml'} was not written by your programs here, or was changed since, so its paths, "
            f"classes and patterns are not used; give them on the command line if they are right ({arguments})"
        )
    return {**settings, **{section: safe(section, value) for section, value in chosen.items()}}


def within(key: str, prefixes: Collection[str]) -> bool:
    """Whether a dotted key is one of `prefixes`, or below one."""
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def leaves(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Each value with its full key; an empty section counts as a value."""
    return [(key, value) for key, value, _ in _values("", settings)]


def _values(key: str, value: Any, hint: Any = None) -> Iterator[tuple[str, Any, Any]]:
    """Each value with its full key and the annotation of its option, if known."""
    if not isinstance(value, Mapping) or (key and not value):
        yield key, value, hint
        return
    hints = _annotations(key, value.get("_target_"))
    for name, each in value.items():
        yield from _values(f"{key}.{name}".lstrip("."), each, hints.get(name, hint))


def _annotations(key: str, target: Any) -> dict[str, Any]:
    if not isinstance(target, str) or not _of_this_code(key, target):
        return {}
    from vlm.data.datamodule import VLMDataModule  # imported here, because it takes seconds

    module, _, name = target.rpartition(".")
    found: dict[str, Any] = {}
    for made in (getattr(importlib.import_module(module), name, None), VLMDataModule if key == "data" else None):
        with suppress(NameError, TypeError, AttributeError):  # names imported only for type checkers
            found |= get_type_hints(made.__init__)  # type: ignore[misc]
    return found


def _of_this_code(key: str, target: str) -> bool:
    folders = kind_of(key).folders
    return bool(folders) and target.startswith(folders)


def _is_unsafe(key: str, value: Any, hint: Any, run_dir: Path) -> bool:
    last = key.rpartition(".")[2]
    if isinstance(value, list):
        return last != "target_modules" and any(_is_unsafe(key, each, hint, run_dir) for each in value)
    if last == "_target_":
        return not isinstance(value, str) or not _of_this_code(key.removesuffix("._target_"), value)
    if not isinstance(value, str) or not value:
        return False
    if last == "target_modules":  # a string is a regular expression, except for this word
        return value != "all-linear"
    if last == "package":  # a package that is imported
        return not re.fullmatch(r"\w+_gguf", value)
    if last == "attention" and "/" in value:  # code on the hub
        return True
    if key == "ckpt" or Path in _parts(hint) or PATH.search(value) or (last in HUB and Path(value).exists()):
        return not _inside(value, run_dir)
    return False


def _inside(value: str, run_dir: Path) -> bool:
    return os.path.join(os.path.realpath(value), "").startswith(os.path.join(os.path.realpath(run_dir), ""))


def _parts(hint: Any) -> Iterator[Any]:
    yield hint
    for each in get_args(hint):
        yield from _parts(each)
