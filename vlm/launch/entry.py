"""How train.py and eval.py start: Hydra composes, and a user's mistake ends in one readable line."""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlm.files import escape_controls
from vlm.launch import help
from vlm.launch.configs import CONF, options_of

CONTINUE = "continue with resume=<run dir>"
LIST = re.compile(r"[^\s,]+(, [^\s,]+){79,}")  # more names than any list of our own has: every class of Transformers


def start(job: Callable[[Any], Any], *, config_name: str) -> None:
    """Run `job` on the composed config; exit with 2 and one line where the user can fix it, 130 on Ctrl-C."""
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(help.text(config_name))
        return
    try:
        _start(job, config_name=config_name)
    except KeyboardInterrupt:  # also while libraries are imported
        sys.exit(130)


def _start(job: Callable[[Any], Any], *, config_name: str) -> None:
    quiet()
    sleep_early()
    keep_freed_memory()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing, also from a multirun
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from vlm.launch.command_line import SWEEP, expand_resume, refuse_empty_mappings, translate
    from vlm.launch.sweep import folder_name, record_failure, start_job

    OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)  # conf/train.yaml names jobs by it
    sweeps = bool({*SWEEP} & {*sys.argv})

    def run_job(cfg: Any) -> Any:
        if sweeps:
            start_job()
        try:  # in here, or Hydra would print its own lines first
            refuse_empty_mappings(cfg, HydraConfig.get().overrides.task)
            return job(cfg)
        except KeyboardInterrupt:
            sys.exit(130)
        except SystemExit as end:
            code = exit_code(end)
            if not sweeps or not isinstance(code, int) or not 0 < code < 128:  # above is a signal, which ends the sweep
                sys.exit(code)
            record_failure("see its message above")
        except Exception as error:
            message = None if os.environ.get("VLM_TRACEBACK") else mistake(error)
            if message is None:
                raise
            if not sweeps:
                fail(message)
            print(f"Error: {escape_controls(message)}", file=sys.stderr)
            record_failure(message)
        return None

    try:
        sys.argv = [sys.argv[0], *expand_resume(translate(sys.argv[1:], config_name=config_name))]
        hydra.main(version_base="1.3", config_path=CONF, config_name=config_name)(run_job)()
    except (HydraException, OmegaConfBaseException) as error:
        fail(config_error(error))
    except OSError as error:  # of a folder that Hydra makes
        if error.errno == errno.ENAMETOOLONG:
            fail("so many options make too long a name for a job's folder; add 'hydra.sweep.subdir=${hydra.job.num}'")
        if error.filename is None:
            raise
        fail(
            f"the folder '{error.filename}' cannot be made ({error.strerror}); set run_dir=, or hydra.sweep.dir= for a "
            "sweep, to a folder that you may write"
        )
    except ValueError as error:
        if os.environ.get("VLM_TRACEBACK"):
            raise
        fail(sentence(error))
    except RuntimeError as error:
        if type(error).__module__.startswith("submitit.") or "on a slurm cluster" in str(error):
            fail(f"SLURM refused the jobs: {sentence(error)}; see hydra.launcher.* (conf/hydra/launcher)")
        if "Unknown plugin class" not in str(error):
            raise
        fail(f"this hydra/launcher is not installed ({error}); pip install 'vlm-template[launchers]'")


def mistake(error: Exception) -> str | None:
    """The sentence for an error that the user can fix; None for a defect of the program."""
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, OmegaConfBaseException):  # some are also ValueErrors
        return config_error(error)
    if isinstance(error, ValueError | OSError):
        return sentence(error)
    if str(error).startswith("DataLoader worker"):
        return (
            f"a data worker died: {sentence(error)}; where memory was short, set data.num_workers or "
            f"data.batch_size lower, and {CONTINUE}"
        )
    if "gloo" in str(error) or type(error).__name__ == "DistBackendError":
        said = re.search(r"connection [a-z ]+ by peer|timed out|timeout", str(error), re.IGNORECASE)
        return f"another process of this run has ended ({said[0] if said else type(error).__name__}); {CONTINUE}"
    if isinstance(error, ImportError) and "site-packages" in _raised_in(error):  # of a library, for what it lacks
        other = ", or set llm.attention=sdpa" if "attention" in str(error).lower() else ""
        return f"a package for these options is not installed: {' '.join(sentence(error).split())}; install it{other}"
    return addon_refusal(error)


def _raised_in(error: Exception) -> str:
    """The file whose code has raised an error."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last.tb_frame.f_code.co_filename if last else ""


def addon_refusal(error: Exception) -> str | None:
    """What a callback, logger or strategy of Lightning raises in the middle of a run about its own options, else None.

    It comes from the add-on's own code; an error that only passes through that code comes from a deeper frame.
    """
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code.co_filename if last else ""
    found = re.search(r"lightning/\w+/(callbacks|loggers|strategies)/", code)
    if last is None or not (found or type(error).__name__ == "MisconfigurationException"):
        return None
    owner = type(last.tb_frame.f_locals.get("self")).__name__
    options = {"callbacks": "callbacks.*", "loggers": "logger.*"}.get(found[1] if found else "", "trainer.*")
    return f"Lightning's {owner} refuses its options: {' '.join(sentence(error).split())}; see {options}"


def sentence(error: Exception) -> str:
    """What an error says, without the stack trace that a data worker puts before it, and without a library's tables."""
    text = str(error).rstrip(" .\n")
    if LIST.search(text):
        text = " ".join(LIST.sub(_first_of_list, text).split())
    if re.match(r"Caught \w+ in DataLoader worker process \d+\.\n", text):
        text = text.rpartition("\n")[2].partition(": ")[2]
    return text


def _first_of_list(found: re.Match[str]) -> str:
    names = found[0].rstrip("); ").split(", ")
    end = found[0].removeprefix(found[0].rstrip("); ")).rstrip()
    return f"{', '.join(names[:5])}, … ({len(names)} in all){end}"


def exit_code(end: SystemExit) -> Any:
    """The code to exit with: 128 + the signal, where Lightning leaves on one with 1, or with 0 on SIGTERM."""
    if isinstance(end.__context__, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return 128 + signal.SIGTERM if type(end).__name__ == "SIGTERMException" else end.code


def fail(message: str) -> None:
    print(f"Error: {escape_controls(message)}", file=sys.stderr)
    sys.exit(2)


def run_program(job: Callable[[list[str]], None], *, usage: str) -> None:
    """Run a program of the package that takes key=value; it exits as `start` does, and without arguments with 2."""
    quiet()
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help", "help"} & {*arguments}:
        print(usage)
        sys.exit(0 if arguments else 2)
    try:
        job(arguments)
    except (ValueError, OSError) as error:
        fail(sentence(error))
    except KeyboardInterrupt:
        sys.exit(130)


def quiet() -> None:
    """Keep the libraries' routine messages out of the output; their errors are still shown."""
    with suppress(AttributeError):  # of a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    launcher = logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script")
    launcher.setLevel(logging.INFO)
    launcher.addFilter(report_lost_process)
    warnings.filterwarnings("ignore", message=r"\n'hydra/launcher/\w+' is validated against ConfigStore schema")
    warnings.filterwarnings("ignore", module=r"(lightning|torch|timm|transformers|peft|huggingface_hub)\b")


def report_lost_process(record: logging.LogRecord) -> bool:
    """Replace Lightning's message before it kills a run that lost a process by one sentence; pass others on."""
    pattern = r"\[rank: (\d+)\] Child process with PID (\d+) terminated with code (-?\d+)"
    if not (found := re.match(pattern, record.getMessage())):
        return True
    rank, pid, code = map(int, found.groups())
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    print(f"Error: rank {rank} (process {pid}) {how}, so the run was stopped; {CONTINUE}", file=sys.stderr, flush=True)
    return False


def sleep_early() -> None:
    """Have GNU OpenMP's threads sleep after some 60 µs of waiting; a setting of the user's own stands.

    They would check for milliseconds whether the next work has come. Where something else has their core meanwhile (a
    data worker, another run), a step took several times as long (docs/log.md). Call it before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, up to 32 MB a piece, instead of returning it; settings of the user's own stand.

    Where no tensor is kept for a backward pass, every layer would take its memory from the system anew, page by page:
    an eighth of the time of generation (docs/log.md). Peak memory is the same.
    """
    set_by_user = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    if sys.platform != "linux" or set_by_user:
        return
    import ctypes

    trim_threshold, mmap_threshold = -1, -3  # parameters of mallopt(3)
    with suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, -1)
        mallopt(mmap_threshold, 32 * 2**20)  # the highest that glibc takes


def _sections_with(key: str, cfg: Any) -> list[str]:
    """The sections of a config that have an option of this name."""
    from omegaconf import DictConfig

    sections = {name: cfg._get_node(name) for name in cfg}
    return [name for name, options in sections.items() if isinstance(options, DictConfig) and key in list(options)]


def config_error(error: Exception) -> str:
    """One sentence for a config that does not compose, with the choices."""
    from hydra.errors import MissingConfigException
    from omegaconf.errors import InterpolationKeyError, InterpolationResolutionError, MissingMandatoryValue

    from vlm.options import unknown_key

    cause = error.__cause__ or error
    if isinstance(error, MissingConfigException) and error.options:
        file = str(error.missing_cfg_file)
        if file == "hydra/sweeper/optuna":
            return "Hydra's Optuna sweeper is not installed; pip install 'vlm-template[sweep]'"
        group, _, option = file.rpartition("/") if file.startswith("hydra/") else file.partition("/")
        choices = [name for name in error.options if not name.startswith("_")]
        return unknown_key(f"{group}={option}", choices, asked=option)
    if isinstance(error, MissingMandatoryValue) or isinstance(cause, MissingMandatoryValue):
        key = getattr(error, "full_key", None) or getattr(cause, "full_key", "")
        return f"{key} must be given; set {key}=<value>"
    if isinstance(cause, InterpolationKeyError | InterpolationResolutionError):
        what = str(cause).partition("\n")[0].rstrip(".")
        return f"{cause.full_key}: {what}; write \\${{ for the characters themselves"
    key, parent = getattr(cause, "full_key", None), getattr(cause, "parent_node", None)
    if key and parent is not None:
        if homes := _sections_with(key, parent):
            return f"there is no option {key}; did you mean {' or '.join(f'{home}.{key}' for home in homes)}?"
        return unknown_key(key, list(parent))
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if found := re.search(r"Could not load '(\w+)/([^']+)'", text):  # one of a list
        return unknown_key(f"{found[1]}={found[2]}", options_of(found[1]), asked=found[2])
    if "No match in the defaults list" in text:
        missing = text.split("'")[1]
        groups = [path.name for path in Path(CONF).iterdir() if path.is_dir()]
        return unknown_key(missing.split("=")[0], groups)
    return text
