"""From YAML to objects: where the config lies, how it is composed, checked and built."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from qtrain.data.loaders import DataLoaders
from qtrain.eager import find_engine
from qtrain.quant.base import Quantizer
from qtrain.task.base import Task
from qtrain.trainer import OptimizerFactory, SchedulerFactory, Trainer
from qtrain.truth import TruthGate


class ConfigError(ValueError):
    """Everything that is wrong with a config, one line a mistake."""


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
        config.device = find_device(config.device)
    except ConfigError as err:
        mistakes.append(str(err))
        config.device = "cpu"  # to find out what else is wrong
    for role in ("weight", "activation"):
        spec = OmegaConf.select(config, f"quant.{role}")
        if spec is not None and isinstance(spec.get("observer"), str):
            try:
                spec.observer = hydra.compose(f"observer/{spec.observer}").observer
            except MissingConfigException:
                known = ", ".join(GlobalHydra.instance().config_loader().get_group_options("observer"))
                mistakes.append(f"quant.{role}.observer={spec.observer}: allowed are {known}")
                spec.observer = None
    if mistakes:
        config.mistakes = mistakes
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as err:
        raise ConfigError(str(err)) from err
    return config


def find_device(name: str) -> str:
    """Returns the device of that name; "auto" is the first there is of cuda, mps, cpu.

    Raises:
        ConfigError: the device is not there.
    """
    there = [d for d, ok in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())) if ok]
    there.append("cpu")
    if name == "auto":
        return there[0]
    try:
        kind = torch.device(name).type
    except (RuntimeError, TypeError):
        kind = None
    if kind not in there:
        raise ConfigError(f"device={name}: not usable here; allowed are auto, {', '.join(there)}")
    return name


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
    problems = list(_check_values(config))
    made: dict[str, Any] = {}
    for key in ("data", "task", "quant", "trainer", "optimizer", "scheduler", "truth", "transform", "model"):
        if key == "model":
            torch.manual_seed(config.seed if _is_whole(config.seed) else 0)
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


def objectives(config: DictConfig) -> list[str]:
    """Returns the metrics that a sweeper shall optimize, such as quantized.accuracy; none: the task's own."""
    found = config.objective
    return [found] if isinstance(found, str) else list(found or [])


def _try_spec(quant: DictConfig, role: str) -> list[str]:
    try:
        instantiate(quant.get(role), _convert_="all")
    except Exception as err:
        return _explain(f"quant.{role}", quant[role], err)
    return []


def _is_whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def _check_values(config: DictConfig) -> Iterator[str]:
    yield from config.get("mistakes", ())
    if not _is_whole(config.seed):
        yield f"seed={config.seed}: must be a whole number of at least 0"
    for key in ("calib_batches", "threads"):
        if config[key] is not None and not (_is_whole(config[key]) and config[key]):
            yield f"{key}={config[key]}: must be a whole number of at least 1, or null"
    if config.calib_split not in ("train", "val", "test"):
        yield f"calib_split={config.calib_split}: allowed are train, val and test"
    if config.checkpoint is not None and not (isinstance(config.checkpoint, str) and Path(config.checkpoint).is_file()):
        yield f"checkpoint={config.checkpoint}: there is no such file; allowed is a state dict, as float.pt of a run"
    sizes = config.measure.batch_sizes
    if not OmegaConf.is_list(sizes) or not all(_is_whole(size) and size for size in sizes):
        yield f"measure.batch_sizes={sizes}: must be a list of whole numbers of at least 1, such as [1, 64]"
    for key, least in (("repeats", 1), ("warmup", 0)):
        if not (_is_whole(config.measure[key]) and config.measure[key] >= least):
            yield f"measure.{key}={config.measure[key]}: must be a whole number of at least {least}"
    engine = OmegaConf.select(config, "quant.engine")
    if engine is not None:
        try:
            find_engine(engine)
        except ValueError as err:
            yield f"quant.{err}"
    for key in ("optimizer.lr", "quant.optimizer.lr"):
        rate = OmegaConf.select(config, key)
        if rate is not None and not (isinstance(rate, int | float) and rate > 0):
            yield f"{key}={rate}: must be a number above 0"


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
    if not isinstance(cause, ValueError | TypeError | ImportError):
        raise err
    lines = []
    for line in str(cause).splitlines():
        if re.match(r"[\w.*]+=", line):  # our own constructors begin with `parameter=value: `
            lines.append(f"{where}.{line}")
        elif line.startswith(" ") and lines:
            lines[-1] += f"\n{line}"  # a list that goes with the line before
        elif line.strip():
            # A library's constructor names no key: show what it was given.
            values = {k: v for k, v in section.items() if not str(k).startswith("_") and not OmegaConf.is_config(v)}
            given = ", ".join(f"{where}.{k!s}={v}" for k, v in values.items())
            lines.append(f"{where}: {line} (given {given})")
    return lines or [f"{where}: {type(cause).__name__}"]
