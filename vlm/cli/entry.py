"""How train.py and eval.py start: Hydra composes, and a user's mistake ends in one readable line."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONF = str(Path(__file__).parents[2] / "conf")


def start(job: Callable[[Any], None], *, config_name: str) -> None:
    """Run `job` on the composed config; exit with 2 and one line where the user can mend it, 130 on Ctrl-C."""
    quiet()
    sys.argv = [re.sub(r"^plan=", "plan.show=", argument) for argument in sys.argv]  # plan=true beside plan.json=…
    sys.argv += [a.replace("resume=", "run_dir=", 1) for a in sys.argv if a.startswith("resume=")]  # where it was
    if config_name == "eval":  # it changes the data of the run, which has keys of its own
        sys.argv = [re.sub(r"^data\.", "++data.", argument) for argument in sys.argv]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing, also from a multirun
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    def tell(cfg: Any) -> None:
        try:  # in here, or Hydra would print its own lines first
            job(cfg)
        except OmegaConfBaseException as error:  # some are also ValueErrors
            fail(config_error(error))
        except (ValueError, OSError) as error:
            if os.environ.get("VLM_TRACEBACK"):
                raise
            fail(str(error))
        except KeyboardInterrupt:
            sys.exit(130)

    try:
        hydra.main(version_base="1.3", config_path=CONF, config_name=config_name)(tell)()
    except (HydraException, OmegaConfBaseException) as error:
        fail(config_error(error))


def fail(message: str) -> None:
    print(f"Error: {message}", file=sys.stderr)
    sys.exit(2)


def quiet() -> None:
    """Keep the libraries' small talk out of the output; their errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lightning|torch|timm|transformers|peft|huggingface_hub)\b")


def config_error(error: Exception) -> str:
    """One sentence for a config that does not compose, with the choices."""
    from hydra.errors import MissingConfigException
    from omegaconf.errors import MissingMandatoryValue

    from vlm.options import unknown_key

    cause = error.__cause__ or error
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        choices = [name for name in error.options if not name.startswith("_")]
        return unknown_key(f"{group}={option}", choices, asked=option)
    if isinstance(error, MissingMandatoryValue) or isinstance(cause, MissingMandatoryValue):
        key = getattr(error, "full_key", None) or getattr(cause, "full_key", "")
        return f"{key} must be given; set {key}=<value>"
    key, parent = getattr(cause, "full_key", None), getattr(cause, "parent_node", None)
    if key and parent is not None:
        return unknown_key(key, list(parent))
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if "No match in the defaults list" in text:
        missing = text.split("'")[1]
        groups = [path.name for path in Path(CONF).iterdir() if path.is_dir()]
        return unknown_key(missing.split("=")[0], groups)
    return text
