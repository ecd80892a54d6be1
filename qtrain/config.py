"""From YAML to objects: where the config lies, how it is composed, checked and built."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from qtrain.data.loaders import DataLoaders
from qtrain.quant.base import Quantizer
from qtrain.settings import ConfigError, check_settings, find_device, objectives
from qtrain.task.base import Task
from qtrain.trainer import OptimizerFactory, SchedulerFactory, Trainer
from qtrain.truth import TruthGate
from qtrain.validate import SEEDS, choice, shown, whole


def config_dir() -> str:
    """Returns the folder of the YAML files: inside the installed package, or else in the checkout."""
    installed = Path(__file__).parent / "conf"
    return str(installed if installed.is_dir() else Path(__file__).parents[1] / "conf")


def hydra_arguments(arguments: list[str]) -> list[str]:
    """Returns a command line of ours in the words that Hydra 1.3 takes.

    It refuses null for a group that the defaults list holds as null, new keys in a mapping without a plus, and the
    quotes around such a key that YAML needs, as in {"*.mlp": float}.
    """
    kept = [a for a in arguments if a not in ("experiment=null", "sweep=null")]
    return ["++" + re.sub(r"(['\"])(.*?)\1(?=\s*:)", r"\2", a) if a.startswith("quant.layers") else a for a in kept]


def compose(*overrides: str) -> DictConfig:
    """Returns the config that the command line `qtrain *overrides` would run; for tests and notebooks."""
    with hydra.initialize_config_dir(config_dir(), version_base="1.3"):
        config = hydra.compose("config", hydra_arguments(list(overrides)), return_hydra_config=True)
        HydraConfig.instance().set_config(config)  # for ${hydra:runtime.choices...}
        return resolve(config)


def resolve(config: DictConfig) -> DictConfig:
    """Returns a copy without Hydra's own section, interpolations and observers' names replaced by what they stand for.

    A device or an observer that is not there becomes a line of `config.mistakes`, for `build` to raise with all others.

    Raises:
        ConfigError: an interpolation leads nowhere.
    """
    config = config.copy()
    OmegaConf.set_readonly(config, False)
    OmegaConf.set_struct(config, False)
    config.pop("hydra", None)
    mistakes = []
    try:
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise ConfigError("\n".join(f"{key}=???: must be given a value" for key in missing))
        try:
            config.device = find_device(config.device)
        except ConfigError as err:
            mistakes.append(str(err))
            config.device = "cpu"  # to find out what else is wrong
        OmegaConf.resolve(config)
    except OmegaConfBaseException as err:
        raise ConfigError(explain_interpolation(err)) from err
    for role in ("weight", "activation"):
        spec = OmegaConf.select(config, "quant").get(role)
        if OmegaConf.is_dict(spec) and isinstance(spec.get("observer"), str):
            known = GlobalHydra.instance().config_loader().get_group_options("observer")
            if spec.observer in known:
                spec.observer = hydra.compose(f"observer/{spec.observer}").observer
            else:
                mistakes += choice(f"quant.{role}.observer", spec.observer, known)
                spec.observer = None
    if mistakes:
        config.mistakes = mistakes
    return config


def explain_interpolation(err: OmegaConfBaseException) -> str:
    """Returns what is wrong with an interpolation, in one line that begins with the key that holds it."""
    reason = str(err).partition("\n")[0]
    return reason if err.full_key is None else f"{err.full_key}: {reason}; name a key of this config, or give a value"


@dataclass(frozen=True)
class Parts:
    """What a run is built from. The generators' state is the one that making the model left behind."""

    data: DataLoaders
    model: nn.Module
    task: Task
    quantizer: Quantizer
    trainer: Trainer
    optimizer: OptimizerFactory
    scheduler: SchedulerFactory
    truth: TruthGate
    transform: Callable[[nn.Module], None] | None
    generator_state: torch.Tensor


def build(config: DictConfig) -> Parts:
    """Returns the parts of a run; the only place where `_target_` becomes an object.

    Raises:
        ConfigError: all mistakes at once, each with its key, its value and what is allowed.
    """
    problems = list(check_settings(config))
    made: dict[str, Any] = {}
    for key in ("data", "task", "quant", "trainer", "optimizer", "scheduler", "truth", "transform", "model"):
        if key == "model":
            torch.manual_seed(0 if whole("seed", config.seed, 0, SEEDS) else config.seed)
        if key == "quant":  # its two specs first: the first to fail would hide the other
            problems += [line for role in ("weight", "activation") for line in _try_spec(config.quant, role)]
            if any(re.match(r"quant\.(weight|activation)\.", problem) for problem in problems):
                continue
        try:
            made[key] = instantiate(config[key], _convert_="all")
            _try_out(key, made, problems)
        except Exception as err:
            problems += _explain(key, config[key], err)
    generator_state = torch.get_rng_state()
    task, data = made.get("task"), made.get("data")
    if task is not None:
        problems += [
            f"objective={path}: allowed are size_bytes, latency_ms, or float, fake or quantized, a dot, and one of "
            f"{', '.join(task.numbers)}"
            for path in objectives(config)
            if path not in ("size_bytes", "latency_ms")
            and (
                path.partition(".")[0] not in ("float", "fake", "quantized")
                or path.partition(".")[2] not in task.numbers
            )
        ]
    if task is not None and "model" in made:
        problems += task.mistakes(made["model"])
    if data is not None and data.val is None and config.calib_split == "val":
        problems.append(
            "calib_split=val: there are no validation data; set data.val_size above 0, or use train or test"
        )
    quantizer = made.get("quant")
    if quantizer is not None and quantizer.trains:
        for key in ("optimizer", "scheduler"):
            try:
                _try_out(key, vars(quantizer), problems, prefix="quant.")
            except Exception as err:
                problems += _explain(f"quant.{key}", config.quant[key], err)
        if quantizer.convert_every and data is not None and data.val is None:
            problems.append(
                f"quant.convert_every={quantizer.convert_every}: the best epoch is chosen on validation data, and "
                "there is none; set data.val_size above 0, or quant.convert_every=0"
            )
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    made["quantizer"] = made.pop("quant")
    return Parts(**made, generator_state=generator_state)


def _try_spec(quant: DictConfig, role: str) -> list[str]:
    if role in quant and not OmegaConf.is_dict(quant[role]):
        return [f"quant.{role}={shown(quant[role])}: must be a mapping, such as {{bits: 8}}"]
    try:
        instantiate(quant.get(role), _convert_="all")
    except Exception as err:
        return _explain(f"quant.{role}", quant[role], err)
    return []


def _try_out(key: str, made: dict[str, Any], problems: list[str], prefix: str = "") -> None:
    """Calls an optimizer's or scheduler's factory once, so that what it refuses is known before any training."""
    already_known = any(problem.startswith(f"{prefix}optimizer") for problem in problems)
    if key in ("optimizer", "scheduler") and "optimizer" in made and not already_known:
        optimizer = made["optimizer"]([nn.Parameter(torch.zeros(1))])
        if key == "scheduler":
            made["scheduler"](optimizer, 10)


def _explain(key: str, section: DictConfig, err: Exception) -> list[str]:
    """Returns lines `key=value: reason` for what a constructor raised."""
    found = re.search(r"full_key: ([\w.]+)", str(err))
    where = found[1] if found else key
    cause = err.__cause__ or err
    reason = str(cause)
    if not isinstance(cause, ValueError | TypeError | ImportError):
        reason = f"{type(cause).__name__}: {reason}"  # a library's own, as an index or memory that it lacks
    own = section if where == key else OmegaConf.select(section, where.removeprefix(f"{key}."))
    lines = []
    for line in reason.splitlines():
        if re.match(r"[\w.*]+=", line):  # our own constructors begin with `parameter=value: `
            lines.append(f"{where}.{line}")
        elif line.startswith(" ") and lines:
            lines[-1] += f"\n{line}"  # a list that goes with the line before
        elif line.strip():
            # A library's constructor names no key: show what it was given.
            values = own.items() if OmegaConf.is_dict(own) else ()
            given = [f"{where}.{k!s}={shown(v)}" for k, v in values if k != "_target_" and not OmegaConf.is_config(v)]
            lines.append(f"{where}: {line}" + (f" (given {', '.join(given)})" if given else ""))
    return lines or [f"{where}: {type(cause).__name__}"]
