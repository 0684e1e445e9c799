"""Make a run directory of weights from elsewhere: vlm-import <folder or file> out=<run dir>."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.launch.entry import run_program

if TYPE_CHECKING:
    from vlm.exchange.run_folder import Imported

USAGE = """Make a run directory, for ckpt=, of weights that another program has trained.

vlm-import <folder or file> out=<run dir> [<option>=<value> ...]

<folder or file> is one of:
  a folder of Transformers' LlavaForConditionalGeneration, Blip2ForConditionalGeneration or
    InstructBlipForConditionalGeneration
  mm_projector.bin of LLaVA's own code, or its tensors as safetensors
  a checkpoint of BLIP-2 of LAVIS, of which the Q-Former is read
  a checkpoint of OpenFlamingo: its resampler, gated blocks and added tokens

Options:
  chat_template=<name>   the chat template of the training, such as vicuna_v1 (a folder of vlm-export has it)
  encoder=, llm=         of train.py, with all their keys: what a file of a connector alone was trained with
  data=                  of train.py, with all its keys: what eval.py and vlm-export read

What a folder holds is compared with Transformers on a random image and text before the run directory appears."""
FOLDERS = {  # the model type of a folder -> the chat templates of what its authors trained
    "llava": "vicuna_v1 for LLaVA-1.5",
    "blip-2": "blip2 for BLIP-2 with OPT, t5 for BLIP-2 with Flan-T5",
    "instructblip": "instructblip for InstructBLIP with Vicuna",
}
GROUPS = ("encoder", "connector", "llm", "data")


def parse(arguments: Sequence[str]) -> tuple[Path, dict[str, str], list[str]]:
    """The source, the program's own options, and options of train.py. Raises ValueError for others."""
    sources: list[str] = []
    own: dict[str, str] = {}
    options = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or "/" in key:
            sources.append(argument)
        elif key in ("out", "chat_template"):
            own[key] = value
        elif key.lstrip("+").partition(".")[0] in GROUPS:
            options.append(argument)
        else:
            raise ValueError(
                f"there is no option {key}; choose one of out, chat_template, and those of train.py that begin with "
                f"{', '.join(GROUPS)}"
            )
    if len(sources) != 1:
        raise ValueError(f"vlm-import needs one folder or file, and got {len(sources)}")
    if not own.get("out"):
        raise ValueError("vlm-import needs out=<run dir>")
    return Path(os.path.expanduser(sources[0])).absolute(), own, options


def compose_train(given: Sequence[str], options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str | None]]:
    """Settings and choices of train.py with these options, those that the user has given last."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    from vlm import config
    from vlm.launch.entry import CONF
    from vlm.launch.overrides import override

    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        usual = {"data": "shapes", "trainer": "cpu", "trainer.precision": "32-true"}
        words = [override(key, value) for key, value in {**usual, **options}.items()]
        cfg = compose("train", [*words, *given], return_hydra_config=True)
        choices = dict(cfg.hydra.runtime.choices)
        HydraConfig.instance().cfg = None
        del cfg.hydra
        return config.plain(cfg), {key: choice for key, choice in choices.items() if not key.startswith("hydra")}


def reader(source: Path, chat_template: str | None) -> Any:
    """A function of the folder of the run that reads the source. Raises ValueError if it is of no known kind."""
    from vlm.exchange import from_blip2, from_llava

    if source.is_dir():
        kind = _json(source / "config.json").get("model_type")
        if kind not in FOLDERS:
            raise ValueError(
                f"{source} is a model of type {kind}, which cannot be imported; those that can are {', '.join(FOLDERS)}"
            )
        template = _template(source, chat_template, usual=FOLDERS[kind])
        module = from_llava if kind == "llava" else from_blip2
        return lambda run: module.read_folder(source, run, chat_template=template)
    if not source.is_file():
        raise ValueError(f"{source} does not exist; give a folder or a file")
    return lambda run: _of_file(_tensors(source))


def _of_file(state: Mapping[str, Any]) -> Imported:
    from vlm.exchange import from_lavis, from_llava, from_open_flamingo

    if from_open_flamingo.is_open_flamingo(state):
        return from_open_flamingo.read_flamingo(state)
    return from_lavis.read_qformer(state) if from_lavis.is_lavis(state) else from_llava.read_projector(state)


def _tensors(file: Path) -> dict[str, Any]:
    """The tensors of a file. No code in it runs. Raises ValueError if it has none."""
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{file} has no tensors that can be read safely ({type(error).__name__}); take another"
        ) from error
    while isinstance(found, dict) and isinstance(inner := found.get("model", found.get("model_state_dict")), dict):
        found = inner
    if not isinstance(found, dict) or not found or not all(isinstance(each, torch.Tensor) for each in found.values()):
        raise ValueError(f"{file} holds other things than tensors by name; take another file")
    return found


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file.parent} has no {file.name}; give a folder that Transformers reads") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); download it again") from error
    return found if isinstance(found, dict) else {}


def _template(source: Path, asked: str | None, *, usual: str) -> str | None:
    """The name of the chat template, or None for the one of the folder."""
    exported = source / "vlm_export.json"
    if asked is not None or not exported.is_file():
        if asked is None:
            raise ValueError(
                f"{source} does not say with which chat template it was trained; give chat_template={usual}, or "
                "another name of docs/labels.md"
            )
        return asked
    found = _json(exported).get("chat_template")
    return found if isinstance(found, str) else None


def run_command(arguments: list[str]) -> None:
    """Import. Raises ValueError for a source, options or parts that do not fit."""
    source, own, given = parse(arguments)
    from vlm.exchange.run_folder import write_run
    from vlm.training.run import CONSOLE

    out = Path(os.path.expanduser(own["out"])).absolute()
    read = reader(source, own.get("chat_template"))
    difference = write_run(out, read, partial(compose_train, given), source=str(source))
    compared = (
        "nothing to compare its logits with was there"
        if difference is None
        else f"its logits differ from those of Transformers by up to {difference:.1e} of the largest"
    )
    CONSOLE.print(f"Run: {out}; {compared}.", soft_wrap=True, markup=False, highlight=False)


def main() -> None:
    run_program(run_command, usage=USAGE)


if __name__ == "__main__":
    main()
