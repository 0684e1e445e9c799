"""Artifacts: the tensors that a run trained, and a manifest of the model that they belong to.

    artifact/weights.safetensors   tensors trained in this stage or an earlier one
    artifact/manifest.json         format, step, parts and options, identities of the bases, template, stages, code

Both files are written to temporary paths, flushed and renamed, so a full disk or a killed process keeps the previous
files. All saves of a run have the same tensor names, so any pair of the two files fits. If a process is killed between
the renames, the manifest has the step of the previous save; the header of the weights has the correct step.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlm import files
from vlm.models.base import Model
from vlm.options import check_keys, check_types, defaults
from vlm.options import parameters as options_of
from vlm.training.optim import lora_names, match_buffers

FORMAT_VERSION = 3


class Each(NamedTuple):
    """The type of all values of a mapping."""

    kind: Any


OBJECTIVE = "objective."  # prefix of the names of the objective's tensors
MAX_MANIFEST = 2**26  # bytes; enough for the names of a million tensors
FIELDS: dict[str, Any] = {  # required fields of a manifest and their types
    "parts": Each(dict),
    "bases": Each({"fingerprint": str}),
    "quantization": str,
    "num_image_tokens": int,
    "lora": (dict, type(None)),
    "stages": [{"name": str, "run": str, "options": dict}],
    "code": {"packages": dict},
    "tensors": [str],
}


class Damaged(ValueError):
    """An artifact with a missing, truncated or corrupt file."""


class SaveError(ValueError):
    """Saving failed; the previous files are intact."""


def short_hash(content: Any) -> str:
    """A hash of a JSON value."""
    return hashlib.blake2b(_json(content).encode(errors="backslashreplace"), digest_size=8).hexdigest()


def class_path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def trained_names(model: Model, inherited: list[str]) -> list[str]:
    """Parameters trained in this stage or an earlier one, even if LoRA has renamed them since.

    Of a part without pretrained weights, they are all parameters as soon as one is trained.
    """
    earlier = {name.replace(".base_layer.", ".") for name in inherited}
    new = {part for part in model.parts if part not in model.pretrained and _is_trained(getattr(model, part))}
    return [
        name
        for name, p in model.named_parameters()
        if p.requires_grad or name.partition(".")[0] in new or name.replace(".base_layer.", ".") in earlier
    ]


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def save(folder: Path, *, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any], step: int | None) -> None:
    """Write an artifact. Raises SaveError if writing fails; the previous artifact is kept."""
    weights, manifest_file = folder / "weights.safetensors", folder / "manifest.json"
    content = {**manifest, "format_version": FORMAT_VERSION, "step": step, "tensors": list(tensors)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        header = {"format": "pt", "step": str(step), "checksum": checksum(tensors)}
        if run := manifest.get("run"):
            header["run"] = run["id"]
        with files.create(temporary_path(weights)):
            pass
        save_file(dict(tensors), temporary_path(weights), metadata=header)
        write(temporary_path(manifest_file), _json(content))
        shutil.copymode(temporary_path(manifest_file), temporary_path(weights))  # safetensors writes it with mode 600
        commit(weights)
        commit(manifest_file)
    except (OSError, SafetensorError) as error:
        for left in folder.glob("*.tmp"):
            left.unlink()
        before = "the previous artifact is intact" if weights.exists() else "none was saved before"
        raise SaveError(f"could not save the artifact of step {step} in {folder}: {error}; {before}") from error


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of all values, in the order of the names."""
    crc = 0
    for name in sorted(tensors):
        values = tensors[name].contiguous().reshape(-1).view(torch.uint8).clone()  # NumPy would hold FSDP's storage
        crc = zlib.crc32(cast(Any, values.numpy()), crc)
    return f"{crc:08x}"


def temporary_path(file: Path) -> Path:
    """The path to which a file is written before `commit`."""
    return file.with_name(file.name + ".tmp")


def flush(file: Path) -> None:
    """Write a file to disk (fsync); some file systems report only then that they are full."""
    with files.named(file), open(file, "rb") as written:
        os.fsync(written.fileno())


def commit(file: Path) -> None:
    """Flush the temporary file and rename it to `file`."""
    flush(temporary_path(file))
    os.replace(temporary_path(file), file)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(temporary_path(path), _json(content))
    commit(path)


def write(file: Path, text: str) -> None:
    """Write a new file; no link is followed."""
    with files.create(file) as opened:
        opened.write(text)


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"


def read_manifest(run: str | Path) -> dict[str, Any]:
    """The manifest of a run directory, migrated to this format version; the file is not changed.

    Raises ValueError if it is missing, a field is missing or has the wrong type, or its format is newer than this code.
    """
    path = Path(run) / "artifact" / "manifest.json"
    if not path.exists():
        why = "it has no artifact/manifest.json" if Path(run).exists() else "there is no such folder"
        raise Damaged(f"ckpt={run} is not a run directory: {why}; give the folder of a run")
    try:
        manifest = json.loads(files.read(path, max_bytes=MAX_MANIFEST))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise Damaged(f"{path} is not a manifest: {error}; take another ckpt=") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {version}, but this code reads 1 to {FORMAT_VERSION}; update the code"
            )
        raise Damaged(f"{path} is not a manifest: its format_version is {version!r:.40}; take another ckpt=")
    try:
        for migrate in MIGRATIONS[version - 1 :]:
            migrate(manifest)
    except (AttributeError, KeyError, TypeError) as error:
        raise Damaged(f"{path} is incomplete ({type(error).__name__}: {error}); take another ckpt=") from error
    if problem := _first_problem(manifest, FIELDS, ""):
        raise Damaged(f"{path} is incomplete: {problem}; take another ckpt=")
    return manifest


def _first_problem(value: Any, kind: Any, field: str) -> str | None:
    """A description of the first field that is missing or has the wrong type; None if there is none."""
    if isinstance(kind, Each):
        kind = dict.fromkeys(value, kind.kind) if isinstance(value, dict) else dict
    if isinstance(kind, list) and isinstance(value, list):
        found = (_first_problem(each, kind[0], f"{field}[{number}]") for number, each in enumerate(value))
    elif isinstance(kind, dict) and isinstance(value, dict):
        missing = [f"it has no {field}.{key}".replace(" .", " ") for key in kind if key not in value]
        if missing:
            return missing[0]
        found = (_first_problem(value[key], each, f"{field}.{key}".lstrip(".")) for key, each in kind.items())
    else:
        return None if isinstance(kind, type | tuple) and isinstance(value, kind) else f"its {field} is {value!r:.40}"
    return next(filter(None, found), None)


def _from_1_to_2(manifest: dict[str, Any]) -> None:
    """Version 2 adds the step, the configs of the bases, the encoder's transform, sizes and templates.

    Fields that version 1 did not have are not compared.
    """
    encoder = manifest["parts"]["encoder"]  # the only model of version 1 had encoder, connector and llm
    encoder["transform"] = {"resize": encoder.pop("resize", "squash")}
    encoder.setdefault("tiles", {"grids": [], "row_separator": False})
    if (side := encoder.pop("image_size", None)) is not None:
        encoder["image_size"] = [side, side]
    if manifest["chat_template"] == "the tokenizer's own":
        del manifest["chat_template"]
    manifest.setdefault("quantization", "none")
    manifest["step"] = None


def _from_2_to_3(manifest: dict[str, Any]) -> None:
    """Version 3 renames `head_width` to `head_dim`."""
    connector = manifest["parts"].get("connector", {})
    if "head_width" in connector:
        connector["head_dim"] = connector.pop("head_width")


MIGRATIONS = (_from_1_to_2, _from_2_to_3)  # MIGRATIONS[i] migrates from version i + 1


@contextmanager
def open_weights(run: str | Path) -> Iterator[Any]:
    """The weights file of a run directory. Raises ValueError if it cannot be read."""
    file = Path(run) / "artifact" / "weights.safetensors"
    if not file.is_file():
        raise Damaged(f"{file} is missing or not a regular file; take another ckpt=")
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{file} cannot be read ({error}); take another ckpt=") from error


def load(
    run: str | Path,
    *,
    model: Model,
    manifest: Mapping[str, Any],
    objective: nn.Module | None = None,
    run_id: str | None = None,
    given: Collection[str] = (),
) -> dict[str, Any]:
    """Load a run's trained tensors into `model`, described by `manifest`, and return the run's manifest.

    A LoRA adapter is added if the run has one. The tensors of the run's objective are loaded into `objective` if it has
    the same class. From a run of another class of model, the parts that both have are compared and loaded. Raises
    ValueError for the first field in which the manifests differ, for tensors that do not fit, and if the artifact is
    not of the run `run_id`. A field of `model.changeable` may differ if its option is among the options that the user
    has `given`. A Damaged artifact leaves the model unchanged.
    """
    saved = read_manifest(run)
    if None not in (run_id, found := (saved.get("run") or {}).get("id")) and found != run_id:
        raise ValueError(
            f"ckpt={run} has the artifact of another run: manifest.json is of run {found!r:.40} and config.yaml of run "
            f"{run_id!r:.40}; take both from one run"
        )
    is_other = _is_other_model(saved, manifest)
    # Compared before the fingerprint, which quantization changes.
    if not is_other and (before := saved["quantization"]) != (now := manifest["quantization"]):
        raise ValueError(_differs(run, "llm.quantization", before, now))
    for field, (before, now) in _differences(saved, manifest, model).items():
        option = _option(field, model)
        if option is None:
            raise ValueError(_differs(run, field, before, now))
        if not any(option == key or option.startswith(f"{key}.") for key in given if "." in key):
            raise ValueError(
                f"ckpt={run} was trained with {option}={before}, here it is {now}; set {option}={before}, or, if this "
                f"stage is to change it, give {option}={now} on the command line or in the recipe's stage"
            )
    dropped = _dropped(saved, manifest, model).values()
    tensors = {
        name: tensor
        for name, tensor in _verified_tensors(run, saved).items()
        if not any(re.match(pattern, name) for pattern in dropped)
    }
    if is_other:
        tensors = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] in model.parts}
        if not tensors:
            raise ValueError(
                f"ckpt={run} has no trained weights of the {' or '.join(model.parts)}, the parts of "
                f"{type(model).__name__}; start from another run, or without ckpt="
            )
    if saved["lora"] and (part := model.lora_part()) and not lora_names(getattr(model, part)):
        _add_adapter(run, part, getattr(model, part), saved["lora"], tensors)
    parameters = dict(model.named_parameters())
    same_objective = objective is not None and class_path(objective) == saved.get("objective")
    if objective is not None and same_objective:
        parameters |= {OBJECTIVE + name: parameter for name, parameter in objective.named_parameters()}
    tensors = {name: tensor for name, tensor in tensors.items() if same_objective or not name.startswith(OBJECTIVE)}
    if unexpected := sorted(set(tensors) - set(parameters)):
        raise ValueError(
            f"ckpt={run} does not fit this model: {len(unexpected)} tensors differ, first {unexpected[0]!r:.80}"
        )
    for name, tensor in tensors.items():
        target = parameters[name]
        if tensor.shape != target.shape:
            raise ValueError(f"ckpt={run}: {name} has shape {tuple(tensor.shape)}, here {tuple(target.shape)}")
        # Copied, because the rounding of sums can depend on the memory address.
        target.data = tensor.to(target.device, copy=True)
    match_buffers(model)
    return saved


def changes(saved: Mapping[str, Any], manifest: Mapping[str, Any], model: Model) -> dict[str, list[Any]]:
    """The options of `model.changeable` that a stage changes, each with both values: those of the run that it starts
    from, with the manifest `saved`, and its own.
    """
    differing = _differences(saved, manifest, model)
    return {option: [*values] for field, values in differing.items() if (option := _option(field, model))}


def _option(field: str, model: Model) -> str | None:
    """The option of a field that a later stage may change; None if it may not."""
    found = (
        option + field.removeprefix(own)
        for own, option in model.changeable.items()
        if field == own or field.startswith(f"{own}.")
    )
    return next(found, None)


def _is_other_model(saved: Mapping[str, Any], manifest: Mapping[str, Any]) -> bool:
    """Whether a run has another class of model; earlier versions had one class and did not name it."""
    now = manifest["parts"].get("model", {}).get("_target_")
    return bool(saved["parts"].get("model", {}).get("_target_", now) != now)


def _dropped(saved: Mapping[str, Any], manifest: Mapping[str, Any], model: Model) -> dict[tuple[str, str], str]:
    """What a run has and this model leaves out: (part, option) -> a pattern of the names of its tensors."""
    return {
        (part, option): rf"{part}\.({pattern})"
        for part, options in manifest["parts"].items()
        for option, pattern in getattr(getattr(model, part, None), "can_be_dropped", {}).items()
        if saved["parts"].get(part, {}).get(option) and not options.get(option)
    }


def _verified_tensors(run: str | Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of a run. Raises ValueError if they do not match the manifest, or are damaged."""
    with open_weights(run) as file:
        stored, header = set(file.keys()), file.metadata() or {}
        manifest_run, weights_run = (manifest.get("run") or {}).get("id"), header.get("run")
        if None not in (manifest_run, weights_run) and manifest_run != weights_run:
            raise ValueError(
                f"ckpt={run} has the weights of another run: weights.safetensors is of run {weights_run!r:.40} and "
                f"manifest.json of run {manifest_run!r:.40}; take both files from one run"
            )
        if differing := sorted(stored ^ set(manifest["tensors"])):
            raise Damaged(
                f"ckpt={run} does not fit its manifest: {len(differing)} tensors differ, first {differing[0]!r:.80}"
            )
        tensors = {name: file.get_tensor(name) for name in sorted(stored)}
    expected, found = header.get("checksum"), checksum(tensors)
    if expected not in (None, found):
        raise Damaged(
            f"ckpt={run} is damaged: its weights' checksum is {found}, not {expected:.40}; take another ckpt="
        )
    for name, tensor in tensors.items():
        if num := num_not_finite(tensor):
            raise Damaged(
                f"ckpt={run} is damaged: {num:,} of the {tensor.numel():,} values of {name} are NaN or infinite; "
                "take another ckpt="
            )
    return tensors


def num_not_finite(tensor: Tensor) -> int:
    """Number of values that are NaN or infinite."""
    return 0 if not tensor.is_floating_point() else int((~torch.isfinite(tensor)).sum())


def _add_adapter(
    run: str | Path, part: str, module: Any, options: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Add the LoRA adapter of a run to a part, at the modules in the names of its tensors.

    The `target_modules` of the manifest are not used, because matching an untrusted regular expression may never end.
    """
    found = [re.fullmatch(rf"{part}\.model\.(.+)\.lora_(embedding_)?A\.default(\.weight)?", name) for name in tensors]
    modules = sorted(match[1] for match in found if match)
    ranks = {tensors[match[0]].shape[0] for match in found if match}
    if ranks != {options.get("r")}:
        raise Damaged(
            f"ckpt={run} has an adapter with r={options.get('r')!r:.40}, and tensors of "
            f"rank {sorted(ranks)}; take another ckpt="
        )
    arguments = {key: value for key, value in options.items() if key != "target_modules"} | {"target_modules": modules}
    check_keys("lora", arguments, options_of(module.add_lora))
    check_types("lora", arguments, module.add_lora)
    module.add_lora(**arguments)


def _comparable(manifest: Mapping[str, Any], default_options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The fields to compare, as JSON values: first the readable ones, then the fingerprints.

    `default_options` fill in the options of parts that a config or older code left out.
    """
    parts, bases = manifest["parts"], manifest["bases"]
    readable = {
        "bases": {part: {key: base[key] for key in base if key != "fingerprint"} for part, base in bases.items()},
        "parts": {part: {**default_options.get(part, {}), **options} for part, options in parts.items()},
        **{field: manifest[field] for field in ("chat_template", "num_image_tokens") if field in manifest},
    }
    fingerprints = {"bases": {part: {"fingerprint": base["fingerprint"]} for part, base in bases.items()}}
    return json.loads(_json([readable, fingerprints]))


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any], model: Model) -> dict[str, tuple[Any, Any]]:
    """The fields in which two manifests differ and may not, in full, each with both values."""
    default_options = {
        part: defaults(part, options["_target_"])
        for part, options in current["parts"].items()
        if part not in current["bases"] and "_target_" in options
    }
    free = {f"parts.{part}.{option}" for part, option in _dropped(saved, current, model)}
    for part in current["parts"]:
        free |= {f"parts.{part}.{option}" for option in getattr(getattr(model, part, None), "not_compared", ())}
    if _is_other_model(saved, current):
        free |= {"chat_template", "num_image_tokens"}
        saved, current = (  # what belongs to the model itself is not compared
            {**each, "parts": {part: options for part, options in each["parts"].items() if part != "model"}}
            for each in (saved, current)
        )
    both = zip(_comparable(saved, default_options), _comparable(current, default_options), strict=True)
    differing = {
        field: values for old, new in both for key in old for field, values in _compare(key, old[key], new[key])
    }
    return {field: values for field, values in differing.items() if field not in free}


def _compare(field: str, saved: Any, current: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The differences of two nested fields; keys that only one of them has are ignored.

    The arguments of a timm model come from the user alone, so all their keys are compared.
    """
    if isinstance(saved, dict) and isinstance(current, dict):
        for key in {**saved, **current}:
            if (key in saved and key in current) or field.endswith(".model_args"):
                yield from _compare(f"{field}.{key}", saved.get(key), current.get(key))
    elif saved != current and not (field.endswith(".pretrained") and (_is_folder(saved) or _is_folder(current))):
        yield field, (saved, current)


def _differs(run: str | Path, field: str, saved: Any, current: Any) -> str:
    return f"ckpt={run} was trained with {field} = {saved}, here it is {current}; use the same parts"


def _is_folder(pretrained: Any) -> bool:
    """Whether `pretrained` is a local folder, which does not identify the weights; config and fingerprint do."""
    if isinstance(pretrained, list):  # of joined encoders
        return any(map(_is_folder, pretrained))
    return isinstance(pretrained, str) and Path(pretrained).is_absolute()
