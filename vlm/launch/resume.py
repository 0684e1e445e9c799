"""`resume=<run dir>`: the settings of a resumed run, and which of them the command line may change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from vlm import config
from vlm.launch.overrides import chosen
from vlm.training import trust
from vlm.training.trust import within

# Options that change no weight: evaluators, loggers, callbacks, workers, and how long the run may take.
FREE = (
    *("resume", "run_dir", "plan", "preflight", "evaluators", "logger", "callbacks"),
    *("data.num_workers", "trainer.max_time", "trainer.log_every_n_steps"),
)


def settings(cfg: DictConfig, run_dir: Path) -> tuple[dict[str, Any], dict[str, str | None]]:
    """A run's own settings and choices with the changes of the command line; enters the run's working directory.

    Raises ValueError, naming the keys, where more is changed than `resume.allow` says.
    """
    before, choices, is_own = config.stored_config(run_dir)
    if (run_dir / "llm").is_dir():
        raise ValueError(
            f"{run_dir} is a merged run, which cannot be resumed; start a next stage from it with ckpt={run_dir}"
        )
    if before["trainer"].get("overfit_batches"):
        raise ValueError("resume= cannot continue a run that repeats a few batches (debug=overfit); start it again")
    after, choices = _overridden(before, choices, cfg)
    old, new = dict(_leaves(before)), dict(_leaves(after))
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key) and not within(key, FREE)]
    if refused := [key for key in changed if not within(key, cfg.resume.allow)]:
        values = ", ".join(f"{key} is {old.get(key)} and would be {new.get(key)}" for key in refused)
        raise ValueError(
            f"resume= continues a run with its own settings, but {values}; leave that out, allow it with "
            f"'resume.allow=[{','.join(refused)}]', or start a new run from its artifact with ckpt={run_dir}"
        )
    for options in filter(None, after["logger"].values()):
        options |= {key: str(run_dir) for key, value in options.items() if value == before["run_dir"]}
    after["run_dir"] = str(run_dir)
    if not is_own:
        composed: Any = OmegaConf.to_container(cfg, resolve=True)
        sections = (*trust.model_sections(after), *config.MANY, "data", "trainer", "ckpt")
        after = trust.restrict(after, run_dir=run_dir, sections=sections, given=_said(cfg, choices), composed=composed)
    config.enter_folder_of(run_dir)
    return after, choices


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys in which two configs of a run differ, with both values, but for those that change no figure."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    ignored = {*FREE, "sweep"} - {"evaluators"}
    keys = [key for key in {**old, **new} if not within(key, ignored)]
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def _overridden(
    before: dict[str, Any], choices: dict[str, str | None], cfg: DictConfig
) -> tuple[dict[str, Any], dict[str, str | None]]:
    """Settings and choices with the overrides of the command line, whose values Hydra has composed."""
    hydra = HydraConfig.get()
    choices, after = dict(choices), OmegaConf.create(before)
    for override in OverridesParser.create().parse_overrides(hydra.overrides.task):
        key = override.key_or_group
        if key == "connector.lr":
            raise ValueError("connector.lr only sets the default of a new run; give stage.lr.connector= instead")
        if key not in choices:
            OmegaConf.update(after, key, _plain(OmegaConf.select(cfg, key)), merge=False)
        elif (option := chosen(hydra)[key]) != choices[key]:
            composed = config.plain(cfg)
            if not isinstance(composed.get(key), dict):  # experiment and debug have no section of their own
                raise ValueError(f"resume= cannot change {key}={choices[key]} to {option}; leave it out")
            after[key], choices[key] = composed[key], option
    after["resume"] = _plain(cfg.resume)
    changed: Any = OmegaConf.to_container(after)
    return changed, choices


def allows_other_data(cfg: DictConfig) -> bool:
    """Whether `resume.allow` names an option of the data, so that its rows may differ."""
    return any(within(key, ["data"]) for key in cfg.resume.allow)


def _said(cfg: DictConfig, before: Mapping[str, str | None]) -> list[str]:
    """The keys that the command line gives, but for the choices that `resume=` itself has repeated."""
    hydra = HydraConfig.get()
    overrides = OverridesParser.create().parse_overrides(hydra.overrides.task)
    keys = [override.key_or_group for override in overrides]
    return [key for key in keys if key not in before or chosen(hydra)[key] != before[key]]


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each key in full with its value."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
