"""The config.yaml of a run: the user's own, as a mark at its end shows, or somebody else's, which is data alone.

A config that this user's programs wrote ends in a line with a keyed hash of its text; the key is in the user's home. A
copy keeps the mark; an edited file and one from elsewhere have none that fits. What such a file names beyond classes
of this code and their options counts only if the user says it: paths, classes of other packages, code of a model.
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

MARK = "# written here: "
MAX_BYTES = 2**20  # of a config.yaml, which has about 6,000
NEEDED = ("model", "data", "stage", "trainer", "logger", "callbacks", "choices", "preflight")  # in each config.yaml
USUAL = ("encoder", "connector", "llm", "objective", "checkpoint", "answers")  # in most
MAY_BE_NONE = ("logger", "callbacks", "evaluators")
# Sections that no model is built from; the parts of a model are among the others.
OF_THE_RUN = ("data", "trainer", *MAY_BE_NONE, "choices", "preflight", "plan", "resume", "recipe", "checkpoint")
# Not a name or hub id: absolute, from a home or a folder above, or one of the schemes for local files.
PATH = re.compile(r"^(~|/|\\|\.{1,2}([/\\]|$)|[A-Za-z]:\\|file:|local-dir:)|(^|/)\.\.(/|$)")
HUB = ("pretrained", "name", "init_from")  # a name on the hub, or a folder
OPTION = re.compile(r"(?!.*\.\.)\w[\w.+/-]*")
FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+")  # 1e-3, which YAML 1.1 takes for a text


def signed(text: str) -> str:
    """The text with the mark of this user, or as it is where there is no home to keep the key in."""
    key = _key()
    return text if key is None else f"{text}{MARK}{_hash(key, text)}\n"


def is_own(text: str) -> bool:
    """Whether this user's programs wrote the text as it is."""
    before, mark, found = text.rpartition(MARK)
    key = _key() if mark else None
    return key is not None and hmac.compare_digest(_hash(key, before), found.strip())


def _hash(key: bytes, text: str) -> str:
    return hmac.new(key, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def _key() -> bytes | None:
    """The user's secret, made when it is first asked for; of processes that make it at once, one is first."""
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
    except (OSError, RuntimeError, ValueError):  # no home, or one that takes no file
        return None


class _Loader(yaml.SafeLoader):
    """Plain values alone. An alias would let a few lines stand for gigabytes, and no config of ours has one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "it has an alias (*), which no config of a run has", None)
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^{FLOAT.pattern}$"), list("-+.0123456789"))


def stored_config(run_dir: str | Path) -> tuple[dict[str, Any], bool]:
    """All of a run's config.yaml as plain values, no interpolation resolved, and whether it is the user's own.

    Raises ValueError in one sentence where there is none, or it is not whole.
    """
    file = Path(run_dir, "config.yaml")
    if not file.exists():
        stages = sorted(path.parent.name for path in file.parent.glob("*/config.yaml"))
        if stages and (file.parent / "options.json").exists():
            raise ValueError(
                f"'{run_dir}' holds a recipe; give its command again, or a stage in it, such as {stages[-1]}"
            )
        why = "it has no config.yaml" if file.parent.exists() else "there is no such folder"
        raise ValueError(f"'{run_dir}' is no run directory: {why}; give the folder that a run has made")
    remedy = "take it from a copy of the run, or start a new run"
    try:
        text = files.read(file, max_bytes=MAX_BYTES).decode("utf-8")
        content = yaml.load(text, _Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text in UTF-8 ({error.reason}); {remedy}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if not isinstance(error, (yaml.YAMLError, RecursionError)) and str(file) in str(error):
            raise
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = "" if line is None else f" in line {line + 1}"
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise ValueError(f"{file} is not YAML{where} ({reason}); {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {'nothing' if content is None else 'no settings'}; {remedy}")
    content.setdefault("choices", {})
    for name in (*NEEDED, *(key for key in USUAL if key in content)):
        if not isinstance(content.get(name), dict) and not (name in MAY_BE_NONE and name in content):
            raise ValueError(f"{file} is not whole: its {name} is {content.get(name, 'missing')!r:.40}; {remedy}")
    return content, is_own(text)


def of_model(content: Mapping[str, Any]) -> tuple[str, ...]:
    """The sections of a config that a trained model is built from."""
    return tuple(key for key, value in content.items() if isinstance(value, Mapping) and key not in OF_THE_RUN)


def group_choices(content: Mapping[str, Any]) -> dict[str, str]:
    """Which option of each group of configs a run had, where that can be said again on a command line."""
    found = {}
    for group, option in content["choices"].items():
        if not isinstance(group, str) or not re.fullmatch(r"[a-z_]+", group) or group == "hydra" or option is None:
            continue  # of a file in a folder of a folder, or Hydra's own
        several = group in MAY_BE_NONE and isinstance(option, str) and option[:1] + option[-1:] == "[]"
        options = option[1:-1].split(",") if several else [option]
        if not all(isinstance(each, str) and OPTION.fullmatch(each) for each in options):
            raise ValueError(f"config.yaml of this run has the choice {group}={option!r:.80}, which names no option")
        found[group] = option
    return found


def restrict(
    settings: Mapping[str, Any],
    *,
    run_dir: Path,
    sections: Collection[str],
    said: Collection[str] = (),
    composed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The settings of a run that somebody else may have written, with `trust_remote_code` off.

    `said` are the keys that the user gave, which count with all below them, and so does a value that is also in
    `composed`, the user's own configs. Raises ValueError where another names a class that is not of this code, a path
    outside the run, code to load, or an expression that may run without end.
    """
    own = dict(leaves(composed or {}))

    def trusted(key: str, value: Any) -> bool:
        return within(key, said) or (key in own and own[key] == value)

    def safe(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: safe(f"{key}.{name}", each) for name, each in value.items()}
        return False if key.endswith(".trust_remote_code") and not trusted(key, value) else value

    chosen = {section: settings[section] for section in sections if settings.get(section) is not None}
    if wanted := [
        (key, value)
        for key, value, hint in _values("", chosen)
        if not trusted(key, value) and _reaches_out(key, value, hint, run_dir)
    ]:
        again = " ".join(f"{key}={files.escape_controls(str(value)):.120}" for key, value in wanted)
        raise ValueError(
            f"{run_dir / 'config.yaml'} was not written by your own programs here, or was changed since, so the paths, "
            f"classes and patterns in it are not used; give them on the command line if they are right ({again})"
        )
    return {**settings, **{section: safe(section, value) for section, value in chosen.items()}}


def within(key: str, beginnings: Collection[str]) -> bool:
    """Whether a key is one of some, or below it."""
    return any(key == beginning or key.startswith(f"{beginning}.") for beginning in beginnings)


def leaves(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Each value with its key in full; an empty section is one."""
    return [(key, value) for key, value, _ in _values("", settings)]


def _values(key: str, value: Any, hint: Any = None) -> Iterator[tuple[str, Any, Any]]:
    """Each value with its key in full and the annotation of the option that takes it, where one is known."""
    if not isinstance(value, Mapping) or (key and not value):
        yield key, value, hint
        return
    hints = _annotations(key, value.get("_target_"))
    for name, each in value.items():
        yield from _values(f"{key}.{name}".lstrip("."), each, hints.get(name, hint))


def _annotations(key: str, target: Any) -> dict[str, Any]:
    if not isinstance(target, str) or not _of_this_code(key, target):
        return {}
    from vlm.data.datamodule import VLMDataModule  # takes seconds, which a misspelled option should not

    module, _, name = target.rpartition(".")
    found: dict[str, Any] = {}
    for made in (getattr(importlib.import_module(module), name, None), VLMDataModule if key == "data" else None):
        with suppress(NameError, TypeError, AttributeError):  # names imported for type checkers alone
            found |= get_type_hints(made.__init__)  # type: ignore[misc]
    return found


def _of_this_code(key: str, target: str) -> bool:
    folders = kind_of(key).folders
    return bool(folders) and target.startswith(folders)


def _reaches_out(key: str, value: Any, hint: Any, run_dir: Path) -> bool:
    last = key.rpartition(".")[2]
    if isinstance(value, list):
        return last != "target_modules" and any(_reaches_out(key, each, hint, run_dir) for each in value)
    if last == "_target_":
        return not isinstance(value, str) or not _of_this_code(key.removesuffix("._target_"), value)
    if not isinstance(value, str) or not value:
        return False
    if last == "target_modules":  # alone, not in a list, it is a regular expression, but for this word
        return value != "all-linear"
    if last == "package":  # imported for its weights
        return not re.fullmatch(r"\w+_gguf", value)
    if last == "attention" and "/" in value:  # code of that name on the hub
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
