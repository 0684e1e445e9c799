"""Command-line arguments rewritten for Hydra: paths need no quotes, and errors are sentences, not grammar rules."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from vlm.launch.configs import CONF, OF_EVAL, keys_of, options_of
from vlm.launch.overrides import MANY, for_shell, holds_path, override, written
from vlm.renamed import refuse_renamed_key
from vlm.training.trust import group_choices, stored_config

FUNCTIONS = re.compile(r"(choice|glob|range|interval|shuffle|sort|tag|str|int|float|bool|json_str)\(.*\)$", re.DOTALL)
SWEEP = ("-m", "--multirun")
# What a run from elsewhere may not decide: where weights lie, whose classes are made, whether to trust their code.
SAID_AGAIN = re.compile(
    r"(?!data\.|trainer\.)\w+\.(pretrained|init_from|package|attention|trust_remote_code|_target_)="
)
GROUPS = tuple(sorted(path.name for path in Path(CONF).iterdir() if path.is_dir() and path.name != "hydra"))
NOT_NEEDED = ("experiment", "debug", "sweep")  # groups whose default is none
REQUIRED = tuple(group for group in GROUPS if group not in (*MANY, *NOT_NEEDED))


def translate(arguments: Sequence[str], *, config_name: str) -> list[str]:
    """The arguments for Hydra. Raises ValueError for what Hydra would ignore or not explain."""
    flags = [argument for argument in arguments if argument in SWEEP]
    words = [re.sub(r"^plan=", "plan.show=", argument) for argument in arguments if argument not in SWEEP]
    # `resume.run` is Hydra's key for `resume=`. With run_dir=, expand_resume has written it for another process.
    if not any(word.startswith("run_dir=") for word in words):
        words = [re.sub(r"^resume\.run=", "resume=", word) for word in words]
    words = _for_rival(words, config_name=config_name)
    if config_name == "eval":
        # The run's data has keys of its own, and where weights lie may have to be said again.
        words = [
            f"++{word}" if word.startswith(("data.", "benchmark.", "rival.")) or SAID_AGAIN.match(word) else word
            for word in words
        ]
        refuse_parts(words)
    for word in words:
        refuse_renamed_key(word.partition("=")[0].lstrip("+~"))
    words = [quote_path(argument, sweep=bool(flags)) for argument in words]
    words = [each for argument in words for each in _group_option(argument)]
    keys = {argument.partition("=")[0] for argument in words}
    if not flags and "sweep" in keys:
        raise ValueError("sweep= chooses the jobs of a sweep; add -m")
    if flags and "run_dir" in keys:
        raise ValueError("run_dir= names the folder of one run, but -m makes one a job; set hydra.sweep.dir=<folder>")
    if flags and config_name == "eval" and "out" in keys:
        raise ValueError("out= names the folder of one evaluation, but -m makes several; give a command for each")
    if flags and "resume" in keys:
        raise ValueError("resume= continues one run; leave out -m and give a command for each run")
    for argument in words:
        _check_grammar(argument, sweep=bool(flags))
        key, _, _ = argument.partition("=")
        if key in ("ckpt", "resume") and isinstance(path := _parse(argument).value(), str):
            check_run_dir(key, Path(path))
    return [*flags, *(_job_names(words) if flags else []), *words]  # argparse wants flags first


def _for_rival(words: Sequence[str], *, config_name: str) -> list[str]:
    """`model=openai` as eval.py's group `rival`, and its options, such as `base_url=`, with that prefix.

    Raises ValueError for options of eval.py that another program gets, and for an address with a secret in it, before
    Hydra writes it anywhere.
    """
    rivals = {f"model={name}" for name in options_of("rival")} - {"model=none"}
    if config_name != "eval":
        for word in words:
            if word in rivals or word.lstrip("+~").partition("=")[0].partition(".")[0] in OF_EVAL:
                raise ValueError(f"{word} is an option of eval.py alone; leave it out")
        return [*words]
    chosen = [word.removeprefix("model=") for word in words if word in rivals]
    keys = {key for name in chosen for key, _, _ in keys_of(Path(CONF, "rival", f"{name}.yaml"))}
    words = [f"rival={word.removeprefix('model=')}" if word in rivals else word for word in words]
    words = [f"rival.{word}" if re.split(r"[.=]", word)[0] in keys else word for word in words]
    for word in words:
        if word.lstrip("+").startswith("rival.base_url="):
            from vlm.evaluation.openai import check_url  # imports torch, which the errors of other options need not

            check_url(word.partition("=")[2].strip("'\""))
    return words


def expand_resume(arguments: Sequence[str]) -> list[str]:
    """The arguments with `resume=<run dir>` replaced by Hydra's key `resume.run`, `run_dir` and the run's options.

    With the option of each config group, Hydra knows all keys of the run; its settings are read from config.yaml later.
    """
    given = [argument for argument in arguments if argument.startswith("resume=")]
    kept = [argument for argument in arguments if not argument.startswith("resume=")]
    if not given or given[-1] == "resume=null":
        return kept
    run_dir = str(_parse(given[-1]).value())
    choices = group_choices(stored_config(run_dir)[0])
    settled = {argument.partition("=")[0] for argument in kept}
    options = [f"{group}={option}" for group, option in choices.items() if group not in settled]
    return [*kept, *options, *(override(key, run_dir) for key in ("resume.run", "run_dir"))]


def _job_names(words: Sequence[str]) -> list[str]:
    """The option that leaves what all jobs of a sweep share out of the names of their folders.

    Of a sweep with one job (`sweep=` brings others), and of an experiment, whose sweeps have one folder for all, only
    paths are left out.
    """
    options = [_parse(word) for word in words if not word.startswith("-")]
    shared = {each.key_or_group for each in options if not each.is_sweep_override()}
    if (len(shared) == len(options) and "sweep" not in shared) or "experiment" in shared:
        shared = {*filter(holds_path, shared)}
    return [f"hydra.job.config.override_dirname.exclude_keys=[{','.join(sorted(shared))}]"]


def quote_path(argument: str, *, sweep: bool) -> str:
    """An option whose value is a path, quoted for Hydra, and `~` in it written out; any other argument as it is.

    What the user has quoted stays quoted. In a sweep commas separate paths, unless something has the whole name.
    Raises ValueError for an empty path.
    """
    key, equals, value = argument.partition("=")
    if not equals or not holds_path(key) or value == "null":
        return argument
    if not value.strip():
        raise ValueError(f"{key.lstrip('+')}= is empty; give a path, or leave the option out")
    if value[0] in "'\"" and value[-1] == value[0] and len(value) > 1:
        return f"{key}={value[0]}{os.path.expanduser(value[1:-1])}{value[0]}"
    if _exists(value):
        return override(key, os.path.expanduser(value))
    if (key == "encoder.pretrained" and _is_list(value)) or (sweep and FUNCTIONS.match(value)):
        return argument  # a list is of encoders side by side
    paths = _split(value) if sweep else [value]
    return f"{key}={','.join(written(os.path.expanduser(path)) for path in paths)}"


def refuse_empty_mappings(cfg: Any, arguments: Any) -> None:
    """Raise ValueError for a `key={}` that changes nothing, because Hydra merges it into the mapping that is there."""
    given: Any = OmegaConf.to_container(arguments)  # as typed: a ${ in a value is not resolved here
    for each in OverridesParser.create().parse_overrides(given):
        key = each.key_or_group
        if not each.is_delete() and each.value() == {} and (kept := _mapping(cfg, key)):
            names = ", ".join(map(str, kept))
            raise ValueError(
                f"{key}={{}} changes nothing, because it is merged into the options that are there ({names}); set them "
                f"one by one, such as {key}.{next(iter(kept))}=<value>"
            )


def _mapping(cfg: Any, key: str) -> Any:
    found = OmegaConf.select(cfg, key)
    return found if OmegaConf.is_dict(found) else None


def check_run_dir(key: str, path: Path) -> None:
    """Raise ValueError where a path lies inside a run directory, naming the folder to give."""
    if (path / "artifact" / "manifest.json").is_file() or (path / "config.yaml").is_file():
        return
    for parent in path.absolute().parents[:3]:
        if (parent / "artifact" / "manifest.json").is_file():
            raise ValueError(f"{key}={path} is a part of a run directory; give the whole directory, {key}={parent}")


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # a name too long, no home folder, a null character
        return False


def _is_list(value: str) -> bool:
    try:
        return isinstance(_parse(f"x={value}").value(), list)
    except HydraException:
        return False


def _split(value: str) -> Iterator[str]:
    """The paths between commas, of which those inside brackets separate nothing."""
    depth = start = 0
    for position, character in enumerate(value):
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            yield value[start:position].strip()
            start = position + 1
    yield value[start:].strip()


def refuse_parts(arguments: Sequence[str]) -> None:
    """Raise ValueError for an option of eval.py that the run itself has settled."""
    for argument in arguments:
        key = argument.partition("=")[0].lstrip("+~")
        group = key.partition(".")[0]
        if key == "data":
            raise ValueError(
                f"eval.py evaluates on the run's own data, so {argument} cannot be given; change options of that data "
                "by data.<key>=, such as data.val_annotations=<file>"
            )
        takes = group in ("data", "trainer", *OF_EVAL) or SAID_AGAIN.match(argument.lstrip("+"))
        if group in (*REQUIRED, *MANY, *NOT_NEEDED) and not takes:
            raise ValueError(f"eval.py takes the {group} that the run has, so leave out {argument}")


def _group_option(argument: str) -> list[str]:
    """An argument that chooses a group's option: `null` and `~` mean none, where a run can do without."""
    key, _, value = argument.partition("=")
    group = key.lstrip("~+")
    absent = key.startswith("~") or value == "null"
    if group in NOT_NEEDED and absent:
        return []
    if group in MANY and absent:
        return [f"{group}=none"]
    if group in (*REQUIRED, *MANY, *NOT_NEEDED) and (why := _no_option(group, value, absent=absent)):
        choices = ", ".join(options_of(group))
        raise ValueError(f"{argument} is refused because {why}; choose {group}= one of {choices}")
    known = group in (*REQUIRED, *MANY, *NOT_NEEDED)
    return [f"{group}={value}"] if known and key.startswith("+") else [argument]


def _no_option(group: str, value: str, *, absent: bool) -> str:
    """Why a value cannot be an option of a group; empty where it may be the name of one."""
    if absent:
        return "a run cannot do without it"
    if group in REQUIRED and value.startswith("["):
        return "a run has one of them"
    try:
        found = _parse(f"x={value}")
    except HydraException:  # which _check_grammar explains
        return ""
    named = found.is_sweep_override() or isinstance(found.value(), str | list)
    return "" if named else "it is not the name of an option"


def _check_grammar(argument: str, *, sweep: bool) -> None:
    """Raise ValueError for an option that Hydra cannot read, with a way to write it that it can."""
    if argument.startswith("-"):  # a flag of Hydra's
        return
    key, equals, value = argument.partition("=")
    try:
        if sweep or not _parse(argument).is_sweep_override():
            return
        if key in (*REQUIRED, *NOT_NEEDED):
            raise ValueError(f"{_short(argument)} names several options; give one, or add -m for a run of each")
        why = "has a comma, which separates the values of a sweep (-m)"
    except HydraException:
        why = "has characters that Hydra reads as its own"
    if not equals:
        raise ValueError(f"'{_short(argument)}' is not an option; write <key>=<value>")
    try:
        _parse(quoted := override(key, value))
    except HydraException as error:
        raise ValueError(f"'{_short(key)}' cannot be the name of an option; write <key>=<value>") from error
    example = for_shell(quoted) if len(quoted) < 200 else f"\"{key}='…'\""
    raise ValueError(f"the value of {key}={_short(value)} {why}; quote it twice: {example}")


def _parse(argument: str) -> Any:
    return OverridesParser.create().parse_override(argument)


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
