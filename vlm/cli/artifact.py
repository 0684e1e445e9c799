"""Inspect artifacts: vlm-artifact show <run> | diff <run> <run> | merge <run> out=<folder>."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from vlm.launch.entry import run_program

COMMANDS = {"show": ("ckpt",), "diff": ("ckpt", "other"), "merge": ("ckpt", "out")}  # what each needs
AGAIN = tuple(f"{part}.{key}" for part in ("encoder", "llm") for key in ("pretrained", "trust_remote_code"))
OPTIONS: dict[str, tuple[str, ...]] = {"show": (), "diff": (), "merge": ("dtype", *AGAIN)}
USAGE = """Inspect artifacts, the trained tensors of a run.

vlm-artifact show <run dir>                  its parts, bases, stages and tensors
vlm-artifact diff <run dir> <run dir>        how two differ: fields, tensors, distances
vlm-artifact merge <run dir> out=<folder>    a run with the adapter merged into the LLM, which Transformers reads
             [dtype=float32|bfloat16]"""
DTYPES = ("float32", "bfloat16")
NUM_LARGEST = 8


def parse(arguments: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The command and its options: `key=value`, or values alone in the order of what the command needs."""
    from vlm.options import check_keys

    command, *words = arguments or [""]
    if command not in COMMANDS:
        close = "".join(f"; did you mean {name}?" for name in get_close_matches(command, COMMANDS, n=1))
        raise ValueError(
            f"vlm-artifact has no command '{command}'{close or ';'} choose one of {', '.join(sorted(COMMANDS))}"
        )
    options: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or "/" in key:  # a folder, in whose name a sweep may have written one
            left = [name for name in COMMANDS[command] if name not in options]
            key, value = left[0] if left else word, word
        options[key] = os.path.expanduser(value)
    check_keys(f"vlm-artifact {command}", options, (*COMMANDS[command], *OPTIONS[command]))
    for key in COMMANDS[command]:
        if not options.get(key):
            raise ValueError(f"vlm-artifact {command} needs {key}=<{'folder' if key == 'out' else 'run dir'}>")
    if options.get("dtype", "float32") not in DTYPES:
        raise ValueError(f"dtype={options['dtype']} is not a type to merge in; choose one of {', '.join(DTYPES)}")
    return command, options


def sizes(run: Path) -> dict[str, dict[str, Any]]:
    """Tensors, parameters, bytes and types of each part."""
    from vlm.training import artifact

    parts: dict[str, dict[str, Any]] = {}
    with artifact.open_weights(run) as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            part = parts.setdefault(name.partition(".")[0], {"tensors": 0, "parameters": 0, "bytes": 0, "types": []})
            part["tensors"] += 1
            part["parameters"] += tensor.numel()
            part["bytes"] += tensor.numel() * tensor.element_size()
            kind = str(tensor.dtype).removeprefix("torch.")
            part["types"] = sorted({*part["types"], kind})
    return parts


def differences(run: Path, other: Path) -> dict[str, Any]:
    """Manifest fields that differ, tensors that one alone has, and how far apart the shared ones are.

    The distance of two tensors, or of all of a part, is |other - run| / |run|, in Euclidean norms.
    """
    from vlm.training import artifact

    ours, theirs = (dict(_fields(artifact.read_manifest(each))) for each in (run, other))
    fields = {key: (ours.get(key), theirs.get(key)) for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)}
    with artifact.open_weights(run) as one, artifact.open_weights(other) as two:
        names = set(one.keys()), set(two.keys())
        shared = sorted(names[0] & names[1])
        shapes = {name: tuple(tuple(file.get_slice(name).get_shape()) for file in (one, two)) for name in shared}
        squares = {}
        for name in shared:
            if shapes[name][0] == shapes[name][1]:
                a, b = one.get_tensor(name).double(), two.get_tensor(name).double()
                squares[name] = (float((b - a).square().sum()), float(a.square().sum()))
    parts = {name.partition(".")[0]: (0.0, 0.0) for name in squares}
    for name, (distance, length) in squares.items():
        part = name.partition(".")[0]
        parts[part] = parts[part][0] + distance, parts[part][1] + length
    return {
        "fields": fields,
        "only": [sorted(names[0] - names[1]), sorted(names[1] - names[0])],
        "shapes": {name: pair for name, pair in shapes.items() if pair[0] != pair[1]},
        "parts": {part: _relative(*sums) for part, sums in parts.items()},
        "tensors": {name: _relative(*sums) for name, sums in squares.items()},
    }


def _relative(distance: float, length: float) -> float:
    return (distance / length) ** 0.5 if length else float("inf") if distance else 0.0


def _fields(manifest: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each field in full with its value; without the tensors, which the weights name."""
    for key, value in manifest.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", each) for inner, each in _fields(value))
        elif key == "stages":
            yield key, " → ".join(stage["name"] for stage in value)
        elif key != "tensors":
            yield key, value


def show(run: Path) -> None:
    """Print where an artifact is from, and what it holds."""
    from vlm.training import artifact

    manifest = artifact.read_manifest(run)
    with artifact.open_weights(run) as file:
        step = file.metadata()["step"]
    code = manifest["code"]
    general = {
        "step": step,
        "format version": manifest["format_version"],
        "code version": code["git"] or "unknown",
        "packages": ", ".join(f"{name} {version}" for name, version in code["packages"].items()),
        "chat template": manifest.get("chat_template", "the tokenizer's own"),
        "visual tokens in a row, an image": manifest["num_image_tokens"],
        "llm.quantization": manifest["quantization"],
        "adapter": _inline(manifest["lora"]) if manifest["lora"] else "none",
    }
    _print(f"Artifact of {run}", ("", ""), general.items())
    stages = [
        (
            stage["name"],
            stage["run"],
            _inline({key: v for key, v in stage["options"].items() if "/" not in key}),
            _inline(changes) if isinstance(changes := stage.get("changes"), dict) and changes else "none",
        )
        for stage in manifest["stages"]
    ]
    _print("Stages", ("stage", "run", "options", "changes"), stages)
    _print("Parts", ("part", "options"), [(part, _inline(options)) for part, options in manifest["parts"].items()])
    bases = [
        (part, base["pretrained"] or "none", _hash(base.get("config")), base["fingerprint"])
        for part, base in manifest["bases"].items()
    ]
    _print("Bases", ("part", "hub id or folder", "hash of config", "hash of weights"), bases)
    held = [
        (part, f"{of['tensors']:,}", f"{of['parameters']:,}", f"{of['bytes'] / 1e6:,.3f} MB", ", ".join(of["types"]))
        for part, of in sizes(run).items()
    ]
    _print("Tensors", ("part", "tensors", "parameters", "size", "type"), held, right=(1, 2, 3))


def _hash(config: Any) -> str:
    from vlm.training import artifact

    return artifact.short_hash(config) if config is not None else "not known"


def diff(run: Path, other: Path) -> None:
    """Print how two artifacts differ."""
    found = differences(run, other)
    names = (str(run), str(other))
    _print("Manifest fields that differ", ("field", *names), [(key, *pair) for key, pair in found["fields"].items()])
    for name, only in zip(names, found["only"], strict=True):
        _print(f"Tensors that {name} alone has", ("tensor",), [(tensor,) for tensor in only])
    _print("Tensors of another shape", ("tensor", *names), [(key, *pair) for key, pair in found["shapes"].items()])
    largest = sorted(found["tensors"].items(), key=lambda pair: -pair[1])[:NUM_LARGEST]
    heading = "relative L2 difference"
    for title, rows in (("Shared tensors, by part", found["parts"].items()), ("The largest", largest)):
        _print(title, ("tensors", heading), [(name, f"{value:.3g}") for name, value in rows], right=(1,))


def _inline(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items() if value is not None)


def _print(title: str, headings: Sequence[str], rows: Any, *, right: Sequence[int] = ()) -> None:
    """Print a table, or a line that says that it is empty."""
    from rich.table import Table

    from vlm.training.run import CONSOLE

    rows = [[str(cell) for cell in row] for row in rows]
    if not rows:
        CONSOLE.print(f"{title}: none", soft_wrap=True)
        return
    table = Table(title=title, show_header=any(headings))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    CONSOLE.print(table)


def run_command(arguments: Sequence[str]) -> None:
    """Run a command. Raises ValueError for options or runs that cannot be used."""
    from vlm.launch.command_line import check_run_dir

    command, options = parse(arguments)
    for key in ("ckpt", "other"):
        if key in options:
            check_run_dir(key, Path(options[key]))
    ckpt = Path(options["ckpt"])
    if command == "show":
        show(ckpt)
    elif command == "diff":
        diff(ckpt, Path(options["other"]))
    else:
        from vlm.cli.artifact_merge import merge

        said = {key: value for key, value in options.items() if key in AGAIN}
        given = {key: value == "true" if key.endswith("trust_remote_code") else value for key, value in said.items()}
        merge(ckpt, Path(options["out"]), dtype=options.get("dtype", "float32"), given=given)  # type: ignore[arg-type]


def main() -> None:
    run_program(run_command, usage=USAGE)


if __name__ == "__main__":
    main()
