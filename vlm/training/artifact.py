"""What a run leaves behind: the tensors that were trained, and a manifest of what they belong to.

    artifact/weights.safetensors   every tensor trained in this stage or in one before it, nothing frozen
    artifact/manifest.json         format, step, parts and options, identities of the bases, template, stages, code

Saving writes both files aside, waits until the disk has them, and renames them, so that a full disk or a killed process
leaves the previous ones whole. Both describe the same tensors at every save of a run, so any pair of them fits; after a
kill between the two renames the manifest names the step of the save before, the weights' own header the right one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlm import files
from vlm.models.base import Model
from vlm.options import defaults, known, typed
from vlm.options import parameters as options_of
from vlm.training.optim import lora_names, match_buffers

FORMAT_VERSION = 3


class Each(NamedTuple):
    """The type of each value of a mapping, whatever its keys."""

    kind: Any


OBJECTIVE = "objective."  # before the names of tensors that are the objective's own
MAX_MANIFEST = 2**26  # bytes; the names of a million tensors
FIELDS: dict[str, Any] = {  # of a manifest, with the type of each that this code reads
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
    """An artifact that is not whole: a file of it is missing, cut, or changed by a disk."""


class SaveError(ValueError):
    """The disk did not take what should be saved; what was saved before is intact."""


def short_hash(content: Any) -> str:
    """A hash of something that JSON can write."""
    return hashlib.blake2b(_json(content).encode(errors="backslashreplace"), digest_size=8).hexdigest()


def class_path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def trained_names(model: nn.Module, inherited: list[str]) -> list[str]:
    """Parameters that this stage trains or an earlier one has trained, also where an adapter has renamed them since."""
    earlier = {name.replace(".base_layer.", ".") for name in inherited}
    parameters = model.named_parameters()
    return [name for name, p in parameters if p.requires_grad or name.replace(".base_layer.", ".") in earlier]


def save(folder: Path, *, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any], step: int | None) -> None:
    """Write an artifact. Raises SaveError, leaving the previous one as it was, where the disk does not take it."""
    weights, described = folder / "weights.safetensors", folder / "manifest.json"
    content = {**manifest, "format_version": FORMAT_VERSION, "step": step, "tensors": list(tensors)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"format": "pt", "step": str(step), "checksum": checksum(tensors)}
        if run := manifest.get("run"):
            facts["run"] = run["id"]
        with files.create(aside(weights)):
            pass
        save_file(dict(tensors), aside(weights), metadata=facts)
        write(aside(described), _json(content))
        shutil.copymode(aside(described), aside(weights))  # which safetensors lets nobody else read
        put(weights)
        put(described)
    except (OSError, SafetensorError) as error:
        for left in folder.glob("*.tmp"):
            left.unlink()
        before = "the artifact saved before is intact" if weights.exists() else "none was saved"
        raise SaveError(f"could not save the artifact of step {step} in {folder}: {error}; {before}") from error


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """A CRC-32 of all values, in the order of the names."""
    crc = 0
    for name in sorted(tensors):
        values = tensors[name].contiguous().reshape(-1).view(torch.uint8).clone()  # NumPy would hold FSDP's storage
        crc = zlib.crc32(cast(Any, values.numpy()), crc)
    return f"{crc:08x}"


def aside(file: Path) -> Path:
    """Where a file is written before it takes its place."""
    return file.with_name(file.name + ".tmp")


def flush(file: Path) -> None:
    """Wait until the disk has a file; some tell only then that they are full."""
    with files.named(file), open(file, "rb") as written:
        os.fsync(written.fileno())


def put(file: Path) -> None:
    """Let what was written aside take its place once the disk has it."""
    flush(aside(file))
    os.replace(aside(file), file)


def write_json(path: Path, content: Any) -> None:
    """Write aside, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(aside(path), _json(content))
    put(path)


def write(file: Path, text: str) -> None:
    """A new file with this text; no link is followed."""
    with files.create(file) as opened:
        opened.write(text)


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"


def read_manifest(run: str | Path) -> dict[str, Any]:
    """The manifest of a run directory, brought to this format version; the file stays as it is.

    Raises ValueError where there is none, a field is missing or of the wrong type, or it is of a later format.
    """
    path = Path(run) / "artifact" / "manifest.json"
    if not path.exists():
        why = "it has no artifact/manifest.json" if Path(run).exists() else "there is no such folder"
        raise Damaged(f"ckpt={run} is no run directory: {why}; give the folder that a run has made")
    try:
        manifest = json.loads(files.read(path, max_bytes=MAX_MANIFEST))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise Damaged(f"{path} is not a manifest: {error}; take another ckpt=") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        if isinstance(version, int) and version > FORMAT_VERSION:
            known_to = f"this code reads 1 to {FORMAT_VERSION}"
            raise ValueError(f"{path} has format version {version}, {known_to}; update the code")
        raise Damaged(f"{path} is not a manifest: its format_version is {version!r:.40}; take another ckpt=")
    try:
        for later in MIGRATIONS[version - 1 :]:
            later(manifest)
    except (AttributeError, KeyError, TypeError) as error:
        raise Damaged(f"{path} is not whole ({type(error).__name__}: {error}); take another ckpt=") from error
    if misfit := _misfit(manifest, FIELDS, ""):
        raise Damaged(f"{path} is not whole: {misfit}; take another ckpt=")
    return manifest


def _misfit(value: Any, kind: Any, field: str) -> str | None:
    """The first field that is missing or not of its type, in words."""
    if isinstance(kind, Each):
        kind = dict.fromkeys(value, kind.kind) if isinstance(value, dict) else dict
    if isinstance(kind, list) and isinstance(value, list):
        found = (_misfit(each, kind[0], f"{field}[{number}]") for number, each in enumerate(value))
    elif isinstance(kind, dict) and isinstance(value, dict):
        missing = [f"it has no {field}.{key}".replace(" .", " ") for key in kind if key not in value]
        if missing:
            return missing[0]
        found = (_misfit(value[key], each, f"{field}.{key}".lstrip(".")) for key, each in kind.items())
    else:
        return None if isinstance(kind, type | tuple) and isinstance(value, kind) else f"its {field} is {value!r:.40}"
    return next(filter(None, found), None)


def _from_1_to_2(manifest: dict[str, Any]) -> None:
    """Version 2 adds the step, facts of the bases, the encoder's transform, and sizes and templates in full.

    What version 1 did not know is left out, and so not compared.
    """
    encoder = manifest["parts"]["encoder"]  # the one model that there was had encoder, connector and llm
    encoder["transform"] = {"resize": encoder.pop("resize", "squash")}
    encoder.setdefault("tiles", {"grids": [], "row_separator": False})
    if (side := encoder.pop("image_size", None)) is not None:
        encoder["image_size"] = [side, side]
    if manifest["chat_template"] == "the tokenizer's own":
        del manifest["chat_template"]
    manifest.setdefault("quantization", "none")
    manifest["step"] = None


def _from_2_to_3(manifest: dict[str, Any]) -> None:
    """Version 3 calls the width of an attention head `head_dim`."""
    connector = manifest["parts"].get("connector", {})
    if "head_width" in connector:
        connector["head_dim"] = connector.pop("head_width")


MIGRATIONS = (_from_1_to_2, _from_2_to_3)  # each from the format version of its place, counted from 1, to the next


@contextmanager
def open_weights(run: str | Path) -> Iterator[Any]:
    """The weights file of a run directory. Raises ValueError where it cannot be read."""
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
) -> dict[str, Any]:
    """Put a run's trained tensors into `model`, which `manifest` describes, and return the run's own manifest.

    An adapter is added where the run has one. The tensors of the run's objective go into `objective` if it is of the
    same class. Raises ValueError naming the first field in which the two
    manifests' bases differ, or the tensors that do not fit, and where the artifact is not of the run with `run_id`.
    Where it is Damaged, the model is as it was.
    """
    theirs = read_manifest(run)
    if None not in (run_id, found := (theirs.get("run") or {}).get("id")) and found != run_id:
        raise ValueError(
            f"ckpt={run} has the artifact of another run: manifest.json is of run {found!r:.40} and config.yaml of run "
            f"{run_id!r:.40}; take both from one run"
        )
    # Before the fingerprint, which it changes.
    _compare("llm.quantization", theirs["quantization"], manifest["quantization"], run)
    usual = {
        part: defaults(part, options["_target_"])
        for part, options in manifest["parts"].items()
        if part not in manifest["bases"] and "_target_" in options
    }
    for trained, here in zip(_comparable(theirs, usual), _comparable(manifest, usual), strict=True):
        for field in trained:
            _compare(field, trained[field], here[field], run)
    tensors = _whole_tensors(run, theirs)
    if theirs["lora"] and (part := model.lora_part()) and not lora_names(getattr(model, part)):
        _add_adapter(run, part, getattr(model, part), theirs["lora"], tensors)
    parameters = dict(model.named_parameters())
    same = objective is not None and class_path(objective) == theirs.get("objective")
    if objective is not None and same:
        parameters |= {OBJECTIVE + name: parameter for name, parameter in objective.named_parameters()}
    tensors = {name: tensor for name, tensor in tensors.items() if same or not name.startswith(OBJECTIVE)}
    if odd := sorted(set(tensors) - set(parameters)):
        raise ValueError(f"ckpt={run} does not fit this model: {len(odd)} tensors differ, first {odd[0]!r:.80}")
    for name, tensor in tensors.items():
        target = parameters[name]
        if tensor.shape != target.shape:
            raise ValueError(f"ckpt={run}: {name} has shape {tuple(tensor.shape)}, here {tuple(target.shape)}")
        # A copy, for a tensor of a file may lie at an address that makes a sum round otherwise.
        target.data = tensor.to(target.device, copy=True)
    match_buffers(model)
    return theirs


def _whole_tensors(run: str | Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of a run. Raises ValueError, naming what is wrong, unless they are those that its manifest is of."""
    with open_weights(run) as file:
        stored, facts = set(file.keys()), file.metadata() or {}
        ours, theirs = (manifest.get("run") or {}).get("id"), facts.get("run")
        if None not in (ours, theirs) and ours != theirs:
            raise ValueError(
                f"ckpt={run} has the weights of another run: weights.safetensors is of run {theirs!r:.40} and "
                f"manifest.json of run {ours!r:.40}; take both files from one run"
            )
        if odd := sorted(stored ^ set(manifest["tensors"])):
            raise Damaged(f"ckpt={run} does not fit its manifest: {len(odd)} tensors differ, first {odd[0]!r:.80}")
        tensors = {name: file.get_tensor(name) for name in sorted(stored)}
    said, found = facts.get("checksum"), checksum(tensors)
    if said not in (None, found):
        raise Damaged(f"ckpt={run} is damaged: its weights' checksum is {found}, not {said:.40}; take another ckpt=")
    for name, tensor in tensors.items():
        if num := num_not_finite(tensor):
            raise Damaged(
                f"ckpt={run} is damaged: {num:,} of the {tensor.numel():,} values of {name} are NaN or infinite; "
                "take another ckpt="
            )
    return tensors


def num_not_finite(tensor: Tensor) -> int:
    """How many values are NaN or infinite."""
    return 0 if not tensor.is_floating_point() else int((~torch.isfinite(tensor)).sum())


def _add_adapter(
    run: str | Path, part: str, module: Any, options: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Give a part the adapter of a run, beside the modules that its tensors name.

    So no pattern of a manifest, which may have been written to match for ever, is matched, and no adapter is made that
    the weights are not of.
    """
    found = [re.fullmatch(rf"{part}\.model\.(.+)\.lora_(embedding_)?A\.default(\.weight)?", name) for name in tensors]
    modules = sorted(match[1] for match in found if match)
    ranks = {tensors[match[0]].shape[0] for match in found if match}
    if ranks != {options.get("r")}:
        said = f"{options.get('r')!r:.40}"
        raise Damaged(
            f"ckpt={run} has an adapter with r={said}, and tensors of rank {sorted(ranks)}; take another ckpt="
        )
    taken = {key: value for key, value in options.items() if key != "target_modules"} | {"target_modules": modules}
    known("lora", taken, options_of(module.add_lora))
    typed("lora", taken, module.add_lora)
    module.add_lora(**taken)


def _comparable(manifest: Mapping[str, Any], usual: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is compared, as JSON has it: first what a reader understands, then the fingerprints, which say only that.

    `usual` are the options of parts that a file or older code left out.
    """
    parts, bases = manifest["parts"], manifest["bases"]
    told = {
        "bases": {part: {key: base[key] for key in base if key != "fingerprint"} for part, base in bases.items()},
        "parts": {part: {**usual.get(part, {}), **options} for part, options in parts.items()},
        **{field: manifest[field] for field in ("chat_template", "num_image_tokens") if field in manifest},
    }
    hashed = {"bases": {part: {"fingerprint": base["fingerprint"]} for part, base in bases.items()}}
    return json.loads(_json([told, hashed]))


def _compare(field: str, theirs: Any, ours: Any, run: str | Path) -> None:
    """Raise on the first difference of two nested fields; what only one of them names is not known of the other.

    The arguments of a timm model are the user's own, and so known in full.
    """
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in {**theirs, **ours}:
            if (key in theirs and key in ours) or field.endswith(".model_args"):
                _compare(f"{field}.{key}", theirs.get(key), ours.get(key), run)
    elif theirs != ours and not (field.endswith(".pretrained") and (_is_folder(theirs) or _is_folder(ours))):
        raise ValueError(f"ckpt={run} was trained with {field} = {theirs}, here it is {ours}; use the same parts")


def _is_folder(pretrained: Any) -> bool:
    """Whether it says where weights lie, not what they are; the facts and the fingerprint tell that."""
    if isinstance(pretrained, list):  # of encoders side by side
        return any(map(_is_folder, pretrained))
    return isinstance(pretrained, str) and Path(pretrained).is_absolute()
